"""The documents' table of a result of bench_tracker.py."""

from __future__ import annotations

from typing import Any

from limits import limit_rows, tracker_limits


def tracker_table(record: dict[str, Any], machine: str) -> str:
    """What the tracker may cost and costs, and the machine in words."""
    settings, step = record["settings"], record["step_ms"]["none"][1]
    lines = [
        *limit_rows(tracker_limits(record)),
        "",
        f"{settings['model']}, {settings['batch']} pairs a step ({settings['data']}; "
        f"{settings['response_tokens']} tokens of responses in {settings['positions']} positions), "
        f"one step of {settings['interval']} recorded, no extra forwards; {step:,.0f} ms a step "
        f"without the tracker, {settings['rounds']} rounds in turns, medians. {machine}.",
    ]
    return "\n".join(lines) + "\n"
