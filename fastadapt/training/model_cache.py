"""Copies of packaged models in the user's cache folder, complete or made again.

A copy lies in a folder with a manifest of SHA-256 sums, which is written last. It is made under a
lock, in a folder beside it, whose files are then moved in one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import transformers
from platformdirs import user_cache_path

from fastadapt.training.packaged_models import PackagedModel, Progress

_MANIFEST = "manifest.json"
_FORMAT = 1


def root() -> Path:
    """Return the user's cache folder for models."""
    return user_cache_path("fastadapt", appauthor=False) / "models"


def folders(model: PackagedModel) -> tuple[Path, Path]:
    """Return the folders of a model's copies: one made from its file, one from the hub.

    They are named after everything that their bytes depend on.
    """
    # transformers 5 renamed config keys (rope_theta): an older one would load wrong angles silently
    suffix = f"v{_FORMAT}-transformers-{transformers.__version__}"
    stem = model.file.removesuffix(".gguf").lower()
    of_file = f"{stem}-{model.sha256[:12]}-{suffix}"
    return root() / of_file, root() / f"{model.name.lower()}-hub-{suffix}"


def intact_folder(model: PackagedModel) -> Path | None:
    """Return the first complete copy of a model."""
    return next((folder for folder in folders(model) if is_intact(folder)), None)


def intact_file(model: PackagedModel) -> Path | None:
    """Return the model's downloaded GGUF file, if it is complete."""
    file = root() / model.file
    return file if _sum(file) == model.sha256 else None


def was_kept(model: PackagedModel) -> bool:
    """Tell whether the model has a copy here, without checking it."""
    kept = [root() / model.file, *(folder / _MANIFEST for folder in folders(model))]
    return any(path.is_file() for path in kept)


@contextlib.contextmanager
def locked(model: PackagedModel, progress: Progress) -> Iterator[None]:
    """Hold the lock on a model's copies, and clean up after killed processes.

    Args:
        model: the model.
        progress: called if another process has the lock.

    Raises:
        OSError: the cache folder cannot be written.
    """
    root().mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(root() / f".{model.name.lower()}.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            progress("waiting for another process that makes the model", 0, 4)
            lock.acquire()
    except NotImplementedError as error:  # a file system without locks
        raise OSError(str(error)) from error
    try:
        for name in (model.file, *(folder.name for folder in folders(model))):
            for left in root().glob(f".{name}.*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def keep(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill `folder` through `write` atomically, so that no reader sees a partial copy.

    Everything is written beside it and moved in file by file, the manifest last. A folder's name
    determines its bytes, so processes that do this together replace files by equal ones.

    Args:
        folder: the folder to fill; it may exist.
        write: writes the files into the folder that it is given.

    Raises:
        OSError: what `write` raises, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        building = Path(name)
        write(building)
        files = sorted(path for path in building.iterdir() if path.is_file())
        manifest = {path.name: _sum(path) for path in files}
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*files, building / _MANIFEST]:
            os.replace(path, folder / path.name)


def is_intact(folder: Path) -> bool:
    """Tell whether every file in a folder made by `keep` has its recorded checksum."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and all(_sum(folder / n) == found for n, found in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sum(path: Path) -> str | None:
    """Return the SHA-256 checksum of a file, None if there is no file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
