"""Writes the files of a study atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class StorageError(OSError):
    """A file could not be written; earlier files are kept."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically: beside its place, then moved there.

    Args:
        path: where the file shall be; its folder is made if it is missing.
        write: writes the file at the path that it is given.

    Raises:
        StorageError: it could not be written; what was at `path` is still there.
    """
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(building)
        with building.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(building, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error}{_free_space(path.parent)}; what is there is kept, and "
            "the same command resumes"
        ) from error
    finally:
        with suppress(OSError):  # not even the folder may be there
            building.unlink(missing_ok=True)


def _free_space(folder: Path) -> str:
    """Describes the free space of the disk, if known."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
