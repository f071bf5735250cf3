"""The documents' table of the GPU's sampling kernels before and after their redesign."""

from __future__ import annotations

from typing import Any

MODE = "hot, graph"


def redesign_table(record: dict[str, Any], machine: str) -> str:
    """Times of both, beside one read of the rows and torch.softmax, and the device in words."""
    gpu, first = record["host"]["gpu"], record["cells"][0]
    lines = [
        "| adaptor | N | rows | before, µs | redesigned, µs | one read, µs | torch.softmax, µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in record["cells"]:
        others = [
            f"{cell[name][MODE]:,.0f}" if name in cell else "-"
            for name in ("before_us", "read_us", "softmax_us")
        ]
        ours = f"{cell['us'][MODE]:,.0f}"
        entries = [cell["adaptor"], str(cell["batch"]), cell["rows"], others[0], ours, *others[1:]]
        lines.append(f"| {' | '.join(entries)} |")
    lines += [
        "",
        f"V = {first['vocabulary']:,}, {first['dtype']}, replays of a CUDA graph with a warm L2 "
        f"cache, medians of {record['settings']['rounds']}. {gpu['name']}, driver {gpu['driver']}, "
        f"CUDA {gpu['cuda']}, {machine}, triton {record['host']['versions']['triton']}.",
        *(f"Note: {note}." for note in record["notes"]),
    ]
    return "\n".join(lines) + "\n"
