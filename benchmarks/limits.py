"""What the benchmarks must show: each figure is computed from a result and set beside its bound."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

LOSS_SHAPE = (1024, 896, 32_768)  # N, H, V of the demands on time and error
GPU_CELL = {"vocabulary": 128_256, "rows": "normal3", "adaptor": "T+k+p", "dtype": "float32"}
GPU_ROWS = (4096, 16_384)  # N of the demands on losses on a GPU, H = 4096, V = 128,256, bfloat16
GPU_LOSS_PEERS = {"plain": "plain PyTorch", "trl": "trl", "liger": "Liger", "cce": "CCE"}
FAST_US = 60  # a call as short as this may cost any multiple of a softmax


class Limit(NamedTuple):
    """One demand. `figure` is None where the result has nothing to compute it from."""

    label: str
    figure: float | None
    bound: float
    unit: str = "x"
    at_least: bool = False
    where: str = ""

    @property
    def met(self) -> str:
        """Whether the figure is within its bound, in words."""
        if self.figure is None:
            return "not measured"
        within = self.figure >= self.bound if self.at_least else self.figure <= self.bound
        return "yes" if within else "no"

    @property
    def shown(self) -> str:
        """The figure with its unit and, if it is one cell's, the cell."""
        if self.figure is None:
            return "-"
        digits = 0 if self.figure >= 100 else 1 if self.figure >= 10 else 2
        text = f"{self.figure:,.{digits}f} {self.unit}"
        return f"{text} ({self.where})" if self.where else text

    @property
    def demanded(self) -> str:
        """The bound with its unit."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g} {self.unit}"


def sampling_limits(record: dict[str, Any]) -> list[Limit]:
    """The demands on `sample`."""
    cells, peers = record["cells"], record["peers"]
    plain = [(_ratio(c, "fastadapt"), c) for c in cells]
    slow = [(ratio, c) for ratio, c in plain if c["us"]["fastadapt"][1] >= FAST_US]
    fields = [_ratio(c, "with_fields") for c in cells]
    narrow = [(c["to_float32"][1], c) for c in cells if "to_float32" in c]
    stock = [
        (p["to_fastadapt"]["stock"][1], p)
        for p in peers
        if p["adaptor"] == "T+p" and p["vocabulary"] >= 128_000 and "stock" in p["to_fastadapt"]
    ]
    return [
        Limit(
            f"time to that of torch.softmax, geometric mean of {len(cells)} cells",
            geometric_mean([ratio for ratio, _ in plain]),
            1.2,
        ),
        _cell_limit(f"the same, worst cell of {FAST_US} µs or more", slow, 2.5, max),
        Limit(
            "the same with `base_logprobs` and `log_mass`, geometric mean",
            geometric_mean(fields),
            1.8,
        ),
        Limit(
            "bfloat16 rows to float32 rows, geometric mean",
            geometric_mean([ratio for ratio, _ in narrow]),
            1.0,
        ),
        _cell_limit("the same, worst cell (5 % for noise)", narrow, 1.05, max),
        _cell_limit(
            "transformers' chain for T+p, softmax and multinomial to `sample`, V >= 128,000, least",
            stock,
            100,
            min,
        ),
        Limit("a call on one row of 8 logits: Python's share", record["call_us"][1], 12, "µs"),
    ]


def gpu_sampling_limits(record: dict[str, Any]) -> list[Limit]:
    """The demands on `sample` on a GPU: each on the worst way of timing, cold or hot, graph or not.

    Only those of N = 1 are on a graph's replay alone: outside of one the host is slower.
    """
    cells, peers = record["cells"], record["peers"]
    here = [c for c in cells if all(c[key] == value for key, value in GPU_CELL.items())]
    at = {n: [c for c in here if c["batch"] == n] for n in (1, 64, 512)}
    at[1] = [c for c in at[1] if "graph" in c["mode"]]

    def slowest(label: str, n: int, bound: float) -> Limit:
        times = [(c["us"]["fastadapt"][1], c) for c in at[n]]
        return _cell_limit(label, times, bound, max)._replace(unit="µs")

    def apart(c: dict[str, Any]) -> tuple[Any, ...]:
        return (c["vocabulary"], c["batch"], c["adaptor"], c["dtype"], c["mode"])

    normal = {apart(c): c["us"]["fastadapt"][1] for c in cells if c["rows"] == "normal3"}
    uneven = [
        (c["us"]["fastadapt"][1] / normal[apart(c)], c)
        for c in cells
        if c["rows"] != "normal3" and apart(c) in normal
    ]
    to_read = [(c["to_bound"]["fastadapt"][1], c) for c in at[512]]
    fields = [
        (c["to_fastadapt"]["with_fields"][1], c)
        for n in at
        for c in at[n]
        if "with_fields" in c["to_fastadapt"]
    ]

    def faster(peer: str, name: str, bound: float) -> Limit:
        found = [p["to_fastadapt"][peer][1] for p in peers if peer in p["to_fastadapt"]]
        label = f"{name}'s time to ours, geometric mean of {len(found)} cells"
        return Limit(label, geometric_mean(found), bound, at_least=True)

    return [
        slowest("T+k+p and the draw, V = 128,256, N = 64, float32", 64, 30),
        _cell_limit("the same, N = 512, to one read of the rows", to_read, 3, max),
        slowest("the same, N = 1, in a CUDA graph", 1, 12),
        _cell_limit(
            "these three with `base_logprobs` and `log_mass`, to without", fields, 1.6, max
        ),
        _cell_limit("flat and tied rows to normal ones, worst cell", uneven, 2, max),
        faster("flashinfer", "FlashInfer", 4),
        faster("vllm", "vLLM", 5),
    ]


def score_limits(record: dict[str, Any]) -> list[Limit]:
    """The demands on `score`."""
    many = [(c["to_one"]["all"][1], c) for c in record["cells"]]
    stock = [(c["stock_to_all"][1], c) for c in record["cells"]]
    count = record["settings"]["adaptors"]
    return [
        _cell_limit(f"{count} adaptors in one call to one adaptor, worst cell", many, 8, max),
        _cell_limit(f"transformers' {count} chains to one call, least", stock, 50, min),
    ]


def memory_shares(record: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Our peak memory in percent of the float32 logits, of each cell with V >= 128,256."""
    return [
        (100e6 * c["memory_mb"]["fastadapt"] / (4 * c["n"] * c["v"]), c)
        for c in record["cells"]
        if c["v"] >= 128_256 and "memory_mb" in c
    ]


def losses_limits(record: dict[str, Any]) -> list[Limit]:
    """The demands on `linear_log_odds`."""
    cells = record["cells"]
    here = {(c["dtype"], c["head"]): c for c in cells if (c["n"], c["h"], c["v"]) == LOSS_SHAPE}
    shape = "N = {:,}, H = {:,}, V = {:,}".format(*LOSS_SHAPE)

    def faster(dtype: str, head: str, peer: str, name: str, bound: float) -> Limit:
        ratio = here.get((dtype, head), {"to_fastadapt": {}})["to_fastadapt"].get(peer)
        label = f"{name}'s time to ours, forward and backward, {dtype}, {head} head"
        return Limit(label, ratio and ratio[1], bound, at_least=True, where=shape)

    wide = memory_shares(record)
    share, worst = max(wide, key=lambda pair: pair[0]) if wide else (None, None)
    errors = [c["rms_error"] for (dtype, _), c in here.items() if dtype == "bfloat16"]
    return [
        faster("bfloat16", "trainable", "plain", "plain PyTorch", 1.5),
        faster("bfloat16", "trainable", "trl", "trl", 2.5),
        faster("bfloat16", "frozen", "plain", "plain PyTorch", 1.7),
        faster("float32", "trainable", "plain", "plain PyTorch", 1.0),
        faster("float32", "frozen", "plain", "plain PyTorch", 1.0),
        Limit(
            "peak memory over inputs and gradients, of float32 logits, V >= 128,256, worst cell",
            share,
            5,
            "%",
            where=_loss_place(worst) if worst else "",
        ),
        Limit(
            "rms error of bfloat16 log-odds to that of full bfloat16 logits",
            max((e["fastadapt"] / e["plain"] for e in errors), default=None),
            0.2,
            where=shape,
        ),
    ]


def gpu_losses_limits(record: dict[str, Any]) -> list[Limit]:
    """The demands on `linear_log_odds` on a GPU; times of calls in turns, peaks over inputs
    and returned gradients."""
    few, many = ({c["task"]: c for c in record["cells"] if c["n"] == n} for n in GPU_ROWS)

    def to_products(task: str, label: str, bound: float) -> Limit:
        cell = few.get(task)
        return Limit(f"{label}, forward and backward", cell and cell["to_products"][1], bound)

    def peak(task: str, label: str) -> Limit:
        own = few.get(task, {"peak_mib": {}})["peak_mib"].get("fastadapt")
        return Limit(f"{label}, peak memory", own and own / 1024, 0.3, "GiB")

    both = [(few[task], many[task]) for task in few if task in many]
    per_row = GPU_ROWS[1] / GPU_ROWS[0]
    slower = [b["ms"]["fastadapt"][1] / a["ms"]["fastadapt"][1] / per_row for a, b in both]
    peaks = [tuple(c["peak_mib"].get("fastadapt") for c in pair) for pair in both]
    limits = [
        to_products("ce", "cross entropy, 1.25 GiB of logits kept, to three products", 1.15),
        to_products("tokens", "random upstream, nothing kept, to four products", 1.12),
        peak("tokens", "the same"),
        to_products("frozen", "frozen head, to two products", 1.15),
        peak("frozen", "the same"),
        Limit("time a row, N = 16,384 to N = 4,096, worst task", max(slower, default=None), 1.1),
        # float32 sums of the hidden states' gradient grow with the rows, tiles do not
        Limit(
            "peak memory, N = 16,384 to N = 4,096, worst task (rows: 4 x)",
            max((b / a for a, b in peaks if a and b), default=None),
            3,
        ),
    ]
    for peer, name in GPU_LOSS_PEERS.items():
        cells = [few[task] for task in ("ce", "dpo", "dpo+exmate") if task in few]
        sides = [_beside(c, peer) for c in cells if peer in c["ms"] and peer in c["peak_mib"]]
        label = f"{name}'s time to ours, CE, DPO and DPO+ExMATE, least"
        least = min((time for time, _ in sides), default=None)
        most = max((share for _, share in sides), default=None)
        limits += [
            Limit(label, least, 1, at_least=True),
            Limit(f"our peak memory to {name}'s there, most", most, 1),
        ]
    return limits


def train_limits(record: dict[str, Any]) -> list[Limit]:
    """The demands on the training run."""
    linear, logits = (record["variants"][name] for name in ("linear", "logits"))
    curves = zip(linear["curves"]["loss"], logits["curves"]["loss"], strict=True)
    apart = max(abs(one - other) / abs(other) for one, other in curves)
    memory = linear["memory_mb"]["extra"] / logits["memory_mb"]["extra"]
    return [
        Limit(
            f"loss of {record['settings']['steps']} steps, largest relative difference from the "
            "run with full logits",
            1e6 * apart,
            100,
            "ppm",
        ),
        Limit("peak memory over the loaded model, to that with full logits", memory, 1.0),
    ]


def tradeoff_limits(record: dict[str, Any]) -> list[Limit]:
    """The demands on the trade-off study's sampling and scoring."""
    ratio, agreement = record["stock_to_ours"], record["agreement"]
    return [
        Limit("transformers' time to ours, end to end", ratio["all"][1], 1.0, at_least=True),
        Limit(
            f"tokens outside the support they were drawn from, of {record['tokens']:,} a round",
            record["violations"]["fastadapt"],
            0,
            "tokens",
        ),
        Limit("largest difference of a string's scores", max(agreement.values()), 0.01, "nats"),
    ]


def tracker_limits(record: dict[str, Any]) -> list[Limit]:
    """The demand on the tracker's cost."""
    kinds = {"log_odds": "of log-odds alone", "rho": "with ρ of every pair"}
    return [
        Limit(f"steps with the tracker, {kinds[mode]}, to steps without", ratio[1], 1.05)
        for mode, ratio in record["to_none"].items()
    ]


def geometric_mean(values: list[float]) -> float | None:
    """None where there is no value."""
    return statistics.geometric_mean(values) if values else None


def print_limits(limits: Iterable[Limit]) -> None:
    """Print the demands as a table."""
    table = Table()
    for name in ("demand", "measured", "bound", "met"):
        table.add_column(name)
    for limit in limits:
        table.add_row(limit.label, limit.shown, limit.demanded, limit.met)
    Console().print(table)


def _beside(cell: dict[str, Any], peer: str) -> tuple[float, float]:
    """A peer's time to ours and our peak to its, of ours with logits kept if that is no larger."""
    peaks, times = cell["peak_mib"], cell["ms"]
    lean = peaks["fastadapt"] > peaks[peer] and "nothing kept" in peaks
    ours = "nothing kept" if lean else "fastadapt"
    return times[peer][1] / times[ours][1], peaks[ours] / max(peaks[peer], 1e-3)


def _cell_limit(label: str, cells: list[tuple[float, Any]], bound: float, pick: Any) -> Limit:
    """A demand on the worst of some cells."""
    figure, cell = pick(cells, key=lambda pair: pair[0]) if cells else (None, None)
    return Limit(label, figure, bound, at_least=pick is min, where=_place(cell) if cell else "")


def _place(cell: dict[str, Any]) -> str:
    """Names a cell."""
    names = [cell["rows"], *(cell[k] for k in ("adaptor", "dtype", "mode") if k in cell)]
    return f"V = {cell['vocabulary']:,}, N = {cell['batch']}, {', '.join(names)}"


def _loss_place(cell: dict[str, Any]) -> str:
    """Names a cell of the losses."""
    shape = f"N = {cell['n']:,}, H = {cell['h']:,}, V = {cell['v']:,}"
    return f"{shape}, {cell['dtype']}, {cell['head']} head"


def _ratio(cell: dict[str, Any], name: str) -> float:
    """Median ratio to softmax."""
    return float(cell["to_softmax"][name][1])


LIMITS: dict[str, Callable[[dict[str, Any]], list[Limit]]] = {
    "sampling": sampling_limits,
    "gpu_sampling": gpu_sampling_limits,
    "score": score_limits,
    "losses": losses_limits,
    "gpu_losses": gpu_losses_limits,
    "train_preferences": train_limits,
    "tradeoff": tradeoff_limits,
    "tracker": tracker_limits,
}
