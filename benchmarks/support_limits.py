"""What the benchmarks of supports must show."""

from __future__ import annotations

from collections.abc import Callable

from limit import Limit, Record, mean, medians, worst


def kept_limits(record: Record) -> list[Limit]:
    """The demands on draws that hand over what they kept."""
    cells = record["cells"]
    real = medians([c for c in cells if c["rows"] == "real"], "to_plain", "with")
    whole = medians([c for c in cells if c["full"] == 1], "to_plain", "with")
    return [
        mean("`support=True` to without, a model's rows, geometric mean", real, 1.05),
        worst("the same, worst cell", real, 1.05),
        worst("the same, rows that keep all", whole, 1.05),
    ]


def support_limits(record: Record) -> list[Limit]:
    """The demands on log-odds on a support."""
    cells = record["cells"]
    few = [c for c in cells if c["head"] in ("frozen", "sparse")]
    dense = [(c["to_sum"][1], c) for c in cells if "to_sum" in c]
    times = medians(few, "to_fastadapt", "linear_log_odds")
    label = "`linear_log_odds` to ours, a frozen head or a sparse gradient, least"
    return [
        worst(label, times, 500, at_least=True),
        worst("a dense gradient, to zeros of its size and the sparse call", dense, 1.3),
    ]


def ratios_limits(record: Record) -> list[Limit]:
    """The demands on replayed ratios."""
    cells = {(c["dtype"], c["way"]): c for c in record["cells"]}
    exact, half = (cells.get((dtype, "replay")) for dtype in ("float32", "bfloat16"))
    outside = sum(c["outside"] for c in (exact, half) if c)
    largest = exact and 1e3 * exact["largest_log"]
    label = "largest absolute log ratio, replayed, float32"
    return [
        Limit(label, largest, 1, "thousandths of a nat"),
        Limit("replayed tokens outside their support", outside if exact else None, 0, "tokens"),
    ]


SUPPORT_LIMITS: dict[str, Callable[[Record], list[Limit]]] = {
    "kept": kept_limits,
    "support": support_limits,
    "ratios": ratios_limits,
}
