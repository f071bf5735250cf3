"""What every result holds beside its figures: the machine, the software, the commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastadapt import _C

ROOT = Path(__file__).resolve().parent.parent


def host_record(peers: Sequence[str] = ()) -> dict[str, Any]:
    """Describe the machine, the software and the peers, without anything that names the machine."""
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
            **{name: _version(name) for name in ("fastadapt", "torch", "transformers", *peers)},
        },
        **tree_record(),
    }


def gpu_record() -> dict[str, Any] | None:
    """Describe the current CUDA device and what drives it; None where there is none."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_mib": device.L2_cache_size >> 20,
        "memory_mib": device.total_memory >> 20,
        "cuda": torch.version.cuda,
        "driver": driver.partition("\n")[0] or None,
    }


def tree_record() -> dict[str, Any]:
    """Describe the tree that is measured, and when."""
    return {
        "commit": _output("git", "rev-parse", "HEAD") or None,
        # the results are written by the benchmarks themselves
        "dirty": bool(_output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a result as JSON: a line per entry, and in a list of cells a line per cell."""
    compact = partial(json.dumps, separators=(",", ":"))
    entries = []
    for name, value in record.items():
        text = compact(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(map(compact, value)) + "\n]"
        entries.append(f"{compact(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


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


def _output(*command: str) -> str:
    """What a command prints when it is run in the checkout; empty where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
