"""Versions and hardware for a bug report, and which extra brings what cannot be imported."""

import contextlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import torch

from fastadapt import _C

_BESIDE = ("triton", "transformers", "trl")


def show_config(file: TextIO | None = None) -> None:
    """Prints versions, instruction set, threads and GPUs for a bug report.

    Args:
        file: where to, standard output by default.

    Examples:
        >>> fastadapt.show_config()  # doctest: +ELLIPSIS
        fastadapt ..., CPU kernels ...
    """
    out = sys.stdout if file is None else file
    supported = ", ".join(_C.cpu_capabilities())
    lines = [
        f"fastadapt {version('fastadapt')}, CPU kernels {_C.cpu_capability()} (of {supported}), "
        f"{torch.get_num_threads()} threads",
        f"from {Path(__file__).parent}",
        f"Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        *(_package(name) for name in _BESIDE),
        *(_device(i) for i in range(torch.cuda.device_count())),
    ]
    out.write("\n".join(lines) + "\n")


def needs_extra(name: str, extra: str) -> contextlib.AbstractContextManager[None]:
    """Says which extra to install where an import within the block fails, as `needs`."""
    return needs(name, f'pip install "fastadapt[{extra}]"')


@contextlib.contextmanager
def needs(name: str, command: str) -> Iterator[None]:
    """Says what to install where an import within the block fails.

    Raises:
        ImportError: one sentence; where a package is missing a `ModuleNotFoundError` with its name.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:  # transformers raises both
        why = str(error).partition("\n")[0]
        message = f"{name} cannot be imported ({why}): what it needs comes with {command}"
        if isinstance(error, ModuleNotFoundError):
            raise ModuleNotFoundError(message, name=error.name) from error
        raise ImportError(message) from error


def _package(name: str) -> str:
    """Returns the version of a package that may be missing."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} is not installed"


def _device(index: int) -> str:
    """Describes a GPU by name, compute capability and memory."""
    found = torch.cuda.get_device_properties(index)
    memory = found.total_memory / 2**30
    return f"cuda:{index} {found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB"
