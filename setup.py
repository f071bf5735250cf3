"""Builds the C++ extension `fastadapt._C`; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# No -march and no -ffast-math: the isa_*.cpp files choose their instructions by a target pragma of
# their own (and are empty on other processors), and every result is the same bits on every machine.
openmp = ["-fopenmp"] if sys.platform == "linux" else []
compile_args = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", *openmp]

extension = Pybind11Extension(
    "fastadapt._C",
    sorted(path.as_posix() for path in Path("csrc").glob("*.cpp")),
    depends=["setup.py", *sorted(path.as_posix() for path in Path("csrc").glob("*.h"))],
    extra_compile_args=compile_args,  # Pybind11Extension adds -fvisibility=hidden
    extra_link_args=openmp,
)

with ParallelCompile():
    setup(ext_modules=[extension])
