"""Builds the C++ extension `fastadapt._C`; everything else is in pyproject.toml."""

import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# A universal2 build of macOS compiles every source for both architectures.
IS_X86 = sysconfig.get_platform().lower().endswith(("x86_64", "amd64", "universal2"))
X86_SOURCES = {"csrc/isa_avx2.cpp", "csrc/isa_avx512.cpp"}

# No -march and no -ffast-math: the isa_*.cpp files choose their instructions by a target pragma of
# their own, and every result is the same bits on every machine.
if sys.platform == "win32":
    compile_args, link_args = ["/std:c++17", "/O2", "/fp:precise", "/openmp"], []
else:
    compile_args = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno"]
    link_args = ["-fopenmp"] if sys.platform == "linux" else []
    compile_args += link_args

sources = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp"))
extension = Pybind11Extension(
    "fastadapt._C",
    [source for source in sources if IS_X86 or source not in X86_SOURCES],
    depends=["setup.py", *sorted(path.as_posix() for path in Path("csrc").glob("*.h"))],
    extra_compile_args=compile_args,  # Pybind11Extension adds -fvisibility=hidden
    extra_link_args=link_args,
)

with ParallelCompile():
    setup(ext_modules=[extension])
