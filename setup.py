"""Builds the C++ extension `fastadapt._C`; everything else is in pyproject.toml."""

import sys
from pathlib import Path
from shutil import which

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

WINDOWS = sys.platform == "win32"
# No -march and no -ffast-math: the isa_*.cpp files choose their instructions by a target pragma of
# their own (and are empty on other processors), and every result is the same bits on every machine.
# On Linux OpenMP is the libgomp that torch has loaded; elsewhere torch has one of its own, and with
# another beside it a process would have two pools, so there the extension has one thread.
STRICT = ["-O3", "-ffp-contract=off", "-fno-math-errno"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


class BuildExtension(build_ext):
    """Compiles with clang-cl on Windows, since the kernels are written for GCC and Clang."""

    def build_extensions(self) -> None:
        """Replaces the compiler; its libraries and the linker stay those of Visual Studio."""
        if WINDOWS:
            compiler = which("clang-cl")
            if compiler is None:
                raise FileNotFoundError(
                    "expected clang-cl, which comes with LLVM, on the PATH; found none"
                )
            self.compiler.initialize()
            self.compiler.cc = compiler
        super().build_extensions()


extension = Pybind11Extension(
    "fastadapt._C",
    sorted(path.as_posix() for path in Path("csrc").glob("*.cpp")),
    depends=["setup.py", *sorted(path.as_posix() for path in Path("csrc").glob("*.h"))],
    # Pybind11Extension adds -fvisibility=hidden, or /EHsc
    extra_compile_args=(
        ["/std:c++17", *(f"/clang:{flag}" for flag in STRICT)]
        if WINDOWS
        else ["-std=c++17", *STRICT, *OPENMP]
    ),
    extra_link_args=OPENMP,
)

with ParallelCompile():
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
