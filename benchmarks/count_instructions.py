"""Instructions per element of a row that each kernel executes, by valgrind's callgrind.

    python benchmarks/count_instructions.py --out benchmarks/results/instructions.json

The counts do not depend on the load, the clock or the caches of the machine: two runs of one
compiler's code give the same figures. They are not times. Four float32 and bfloat16 rows of
128,256 logits, normal with standard deviation 3; one thread. Valgrind has no AVX-512, so the
instruction sets are scalar and avx2. Needs g++ (or the compiler named by --cxx) and valgrind with
its headers; no Python package.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from host import ROOT, tree_record, write_record

FLAGS = ["-std=c++17", "-O3", "-g", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
KERNELS = sorted(str(p) for p in (ROOT / "csrc").glob("*.cpp") if not p.match("*bindings.cpp"))
DRIVER = "benchmarks/count_instructions.cpp"
CAPABILITIES = ("scalar", "avx2")


def main() -> None:
    """Build the driver, count, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--cxx", default="g++", help="the compiler; default: g++")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "driver"
        _run([options.cxx, *FLAGS, "-Icsrc", *KERNELS, DRIVER, "-o", str(driver)])
        counts = {isa: _count(driver, isa, Path(folder) / isa) for isa in CAPABILITIES}
    record = {"benchmark": "instructions", "host": _host(options.cxx), "per_element": counts}
    _print(counts)
    if options.out:
        write_record(options.out, record)


def _count(driver: Path, isa: str, folder: Path) -> dict[str, float]:
    """Run the driver under callgrind; instructions per element by dtype/kernel/adaptor."""
    folder.mkdir()
    dumps = folder / "dump"
    tool = ["valgrind", "--quiet", "--tool=callgrind", "--collect-atstart=no"]
    out = _run([*tool, f"--callgrind-out-file={dumps}", str(driver), isa])
    elements = int(out.split()[-1])
    counts = {}
    for path in sorted(folder.glob("dump.*"), key=lambda path: int(path.suffix[1:])):
        lines = path.read_text(encoding="utf-8").splitlines()
        trigger = next(line for line in lines if line.startswith("desc: Trigger:"))
        total = next(line for line in lines if line.startswith(("totals:", "summary:")))
        name = trigger.partition("Client Request: ")[2]
        counts[name] = round(int(total.split()[1]) / elements, 3)
    return counts


def _host(cxx: str) -> dict[str, Any]:
    """Describe what the counts depend on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "compiler": _run([cxx, "--version"]).splitlines()[0],
        "flags": " ".join(FLAGS),
        "valgrind": _run(["valgrind", "--version"]).strip(),
        **tree_record(),
    }


def _run(command: list[str]) -> str:
    """The output of a command that must succeed, run from the root of the clone."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def _print(counts: dict[str, dict[str, float]]) -> None:
    """Show the counts, one line for each kernel."""
    lines = [f"{'instructions per element':60}" + "".join(f"{isa:>10}" for isa in counts)]
    for name in counts[CAPABILITIES[0]]:
        lines.append(f"{name:60}" + "".join(f"{counts[isa][name]:10.3f}" for isa in counts))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
