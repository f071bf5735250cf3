"""What every result holds beside its figures: the machine, the software, the commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastadapt import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fastadapt", "torch", "transformers")


def host_record(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Describe the machine and the software, without anything that names the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": _C.cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        **tree_record(),
    }


def gpu_record() -> dict[str, Any] | None:
    """Describe the current CUDA device and what drives it; None where there is none."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_mib": device.L2_cache_size >> 20,
        "memory_mib": device.total_memory >> 20,
        "cuda": torch.version.cuda,
        "driver": _output(query).partition("\n")[0] or None,
    }


def tree_record() -> dict[str, Any]:
    """Describe the tree that is measured, and when."""
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        # the results are written by the benchmarks themselves
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def quartiles(values: Sequence[float], digits: int = 4) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return [round(q, digits) for q in statistics.quantiles(values, n=4, method="inclusive")]


def times_us(took: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How many rounds there were, and the quartiles of each call's seconds in microseconds."""
    return {
        "rounds": len(next(iter(took.values()))),
        "us": {name: quartiles([1e6 * s for s in seconds], 2) for name, seconds in took.items()},
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a result as JSON: a line per entry, and in a list of cells a line per cell."""
    entries = []
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(map(_compact, value)) + "\n]"
        else:
            text = _compact(value)
        entries.append(f"{_compact(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def _compact(value: Any) -> str:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":"))


def _cpu_name() -> str:
    """Name the processor: its model, and the family of a name that hides it, as clouds' do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        found.setdefault(name.strip(), value.strip())
    if "model name" not in found:
        return platform.processor()
    if {"cpu family", "model"} <= found.keys():
        return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
    return found["model name"]


def _version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """Output of a git command in the checkout, empty where git or the repository is missing."""
    return _output(["git", *arguments])


def _output(command: Sequence[str]) -> str:
    """What a command prints when it is run in the checkout; empty where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
