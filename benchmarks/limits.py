"""What the benchmarks must show: each figure is computed from a result and set beside its bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from limit import Figures, Limit, Record, mean, medians, worst

# N, H, V of the demands on time: of heads as small models have them; trl's and errors at the second
LOSS_SHAPES = ((1024, 576, 49_152), (1024, 896, 32_768))
GPU_CELL = {"vocabulary": 128_256, "rows": "normal3", "adaptor": "T+k+p", "dtype": "float32"}
GPU_ROWS = (4096, 16_384)  # N of the demands on losses on a GPU, bfloat16
GPU_HEAD = (4096, 128_256)  # H, V of them
GPU_LOSS_PEERS = {
    **{"plain": "plain PyTorch", "trl": "trl", "liger": "Liger", "scaled": "Liger, scaled"},
    **{"quack": "QuACK", "cce": "CCE"},
}
FAST_US = 60  # a call as short as this may cost any multiple of a softmax


def sampling_limits(record: Record) -> list[Limit]:
    """The demands on `sample`."""
    cells = record["cells"]
    ours = medians(cells, "to_softmax", "fastadapt")
    slow = [(ratio, c) for ratio, c in ours if c["us"]["fastadapt"][1] >= FAST_US]
    fields = medians(cells, "to_softmax", "with_fields")
    narrow = medians(cells, "to_float32")
    chain = "transformers' chain, softmax and multinomial to `sample`, V >= 128,000, least"
    return [
        mean(f"time to that of torch.softmax, geometric mean of {len(cells)} cells", ours, 1.2),
        worst(f"the same, worst cell of {FAST_US} µs or more", slow, 2.5),
        mean("the same with `base_logprobs` and `log_mass`, geometric mean", fields, 1.8),
        mean("bfloat16 rows to float32 rows, geometric mean", narrow, 1.0),
        worst("the same, worst cell (5 % for noise)", narrow, 1.05),
        worst(chain, chain_times(record), 100, at_least=True),
        Limit("a call on one row of 8 logits: Python's share", record["call_us"][1], 12, "µs"),
    ]


def chain_times(record: Record) -> Figures:
    """The time of transformers' chain to ours, of each cell with V >= 128,000."""
    large = [p for p in record["peers"] if p["vocabulary"] >= 128_000]
    return medians(large, "to_fastadapt", "stock")


def gpu_sampling_limits(record: Record) -> list[Limit]:
    """The demands on `sample` on a GPU: each on the worst way of timing, cold or hot, graph or not.

    Only those of N = 1 are on a graph's replay alone: outside of one the host is slower.
    """
    cells, peers = record["cells"], record["peers"]
    here = [c for c in cells if all(c[key] == value for key, value in GPU_CELL.items())]
    at = {n: [c for c in here if c["batch"] == n] for n in (1, 64, 512)}
    at[1] = [c for c in at[1] if "graph" in c["mode"]]

    def slowest(label: str, n: int, bound: float) -> Limit:
        return worst(label, medians(at[n], "us", "fastadapt"), bound)._replace(unit="µs")

    def apart(c: Record) -> tuple[Any, ...]:
        return (c["vocabulary"], c["batch"], c["adaptor"], c["dtype"], c["mode"])

    times = medians(cells, "us", "fastadapt")
    normal = {apart(c): us for us, c in times if c["rows"] == "normal3"}
    uneven = [
        (us / normal[apart(c)], c)
        for us, c in times
        if c["rows"] != "normal3" and apart(c) in normal
    ]

    def faster(peer: str, name: str, bound: float) -> Limit:
        found = medians(peers, "to_fastadapt", peer)
        label = f"{name}'s time to ours, geometric mean of {len(found)} cells"
        return mean(label, found, bound, at_least=True)

    reads = medians(at[512], "to_bound", "fastadapt")
    fields = medians(sum(at.values(), []), "to_fastadapt", "with_fields")
    return [
        slowest("T+k+p and the draw, V = 128,256, N = 64, float32", 64, 30),
        worst("the same, N = 512, to one read of the rows", reads, 3),
        slowest("the same, N = 1, in a CUDA graph", 1, 12),
        worst("these three with `base_logprobs` and `log_mass`, to without", fields, 1.6),
        worst("flat and tied rows to normal ones, worst cell", uneven, 2),
        faster("flashinfer", "FlashInfer", 4),
        faster("vllm", "vLLM", 5),
    ]


def generation_limits(record: Record) -> list[Limit]:
    """The demand on a step with processors."""
    ratio = record["modes"].get("fused_edits", {}).get("ratio_to_greedy", {}).get("median")
    return [Limit("a step with filters and processors to a greedy one", ratio, 1.03)]


def score_limits(record: Record) -> list[Limit]:
    """The demands on `score`."""
    cells, count = record["cells"], record["settings"]["adaptors"]
    label, chains = "adaptors in one call to one adaptor, worst cell", "chains to one call, least"
    return [
        worst(f"{count} {label}", medians(cells, "to_one", "all"), 8),
        worst(f"transformers' {count} {chains}", medians(cells, "stock_to_all"), 50, at_least=True),
    ]


def edits_limits(record: Record) -> list[Limit]:
    """The demands on `sample` with edits and masks."""
    cells, count = record["cells"], record["settings"]["ids"]

    def changed(kind: str) -> Figures:
        return [
            (quartiles[1], {**cell, "adaptor": name.removesuffix(f", {kind}")})
            for cell in cells
            for name, quartiles in cell["to_plain"].items()
            if name.endswith(kind)
        ]

    whole = medians(cells, "to_softmax", "everything")
    stock = medians(cells, "stock_to_everything")
    return [
        worst(f"edits of {count:,} ids to `sample` without, worst cell", changed("edits"), 1.25),
        worst("a mask of allowed tokens to `sample` without, worst", changed("allowed"), 1.2),
        worst("all filters with both to torch.softmax, worst cell", whole, 2.2),
        worst("transformers' way to that, least", stock, 100, at_least=True),
    ]


def filters_limits(record: Record) -> list[Limit]:
    """The demands on each filter by shape, alone, and on a chain with the temperature last."""
    cells = record["cells"]
    return [
        worst(f"{name} to torch.softmax, worst cell", medians(cells, "to_softmax", name), 1.6)
        for name in record["settings"]["adaptors"]
    ]


def verify_limits(record: Record) -> list[Limit]:
    """The demands on `verify`."""
    cells, settings = record["cells"], record["settings"]
    p_values = [p for law in record["laws"] for p in law["p_values"]]
    rows = "to `sample` of the rows it reads, worst"
    laws = f"least p-value of {len(p_values)} G-tests, {settings['draws']:,} draws for each law"
    return [
        worst(f"drafts of known law {rows}", medians(cells, "to_sample", "by its law"), 1.3),
        worst(f"drafts without one {rows}", medians(cells, "to_sample", "as sampled"), 1.3),
        Limit(laws, min(p_values), 1e-5, "", at_least=True),
        Limit(f"of {settings['sequences']:,} sequences, other than `sample`",
              record["differences"], 0, ""),
    ]  # fmt: skip


def vllm_limits(record: Record) -> list[Limit]:
    """The demands on the processor of vLLM, of the parts that were run."""
    found = []
    if tokens := record.get("tokens"):
        label = f"of {tokens['tokens']:,} tokens in a batch, other than the row's own"
        found.append(Limit(label, tokens["differ"], 0, ""))
    if batches := record.get("batches"):
        label = f"of {batches['requests']:,} requests, other tokens than alone from equal logits"
        found.append(Limit(label, batches["equal_logits_differ"], 0, ""))
    for kind in ("top-p", "min-p and penalties") if "speed" in record else ():
        ratio = record["speed"][f"ours, {kind}"]["time_to_vllm"][1]
        found.append(Limit(f"time with our {kind} to time with vLLM's", ratio, 1))
    return found


def sharded_limits(record: Record) -> list[Limit]:
    """The demands on a split vocabulary."""
    cells, fuzz = record["cells"], record["fuzz"]
    most = max(cells, key=lambda cell: cell["of_gathering"])
    where = f"{most['rows']}, V = {most['vocabulary']:,}, {most['ranks']} ranks, {most['adaptor']}"
    rows = f"of {fuzz['rows']:,} rows, other than in one process"
    return [
        Limit(f"{rows}, draws", fuzz["draws"], 0, ""),
        Limit(f"{rows}, scores", fuzz["scores"], 0, ""),
        Limit("bytes of a batch to gathering bfloat16 logits, worst",
              100 * most["of_gathering"], 25, "%", where=where),
    ]  # fmt: skip


def history_limits(record: Record) -> list[Limit]:
    """The demands on the lists of a history, of each row of the largest batch."""
    largest = max(cell["batch"] for cell in record["cells"])
    us = {c["rule"]: c["us"] for c in record["cells"] if c["batch"] == largest}
    counted = [(us[rule]["from nothing"][1] / 1e3, rule) for rule in us if rule != "DRY"]
    made = "history and its first list, a row of"
    slowest, step = max(counted), max((us[rule]["step"][1], rule) for rule in us)
    tokens = f"{record['settings']['tokens']:,} tokens"
    return [
        Limit(f"{made} {tokens}, worst", slowest[0], 0.5, "ms", where=slowest[1]),
        Limit(f"{made} {tokens}, DRY", us["DRY"]["from nothing"][1] / 1e3, 1, "ms"),
        Limit(f"a step after that, a row of {largest}, worst", step[0], 5, "µs", where=step[1]),
    ]


def memory_shares(record: Record) -> Figures:
    """Our least peak memory in percent of the float32 logits, of each cell with V >= 128,256."""
    return [
        (100e6 * c["memory_mb"]["nothing kept"] / (4 * c["n"] * c["v"]), c)
        for c in record["cells"]
        if c["v"] >= 128_256 and "memory_mb" in c
    ]


def losses_limits(record: Record) -> list[Limit]:
    """The demands on `linear_log_odds`."""
    cells = record["cells"]
    halves = [c for c in cells if _shape(c) in LOSS_SHAPES and c["dtype"] == "bfloat16"]
    others = [c for c in cells if c not in halves]
    here = [c for c in halves if _shape(c) == LOSS_SHAPES[1]]
    both = "forward and backward"

    def of(head: str, cells: list[Record]) -> list[Record]:
        return [c for c in cells if c["head"] == head]

    def slower(label: str, cells: list[Record], peer: str, bound: float) -> Limit:
        return worst(label, medians(cells, "to_fastadapt", peer), bound, at_least=True)

    def peaks(of: Callable[[Record], float]) -> Figures:
        return [(c["memory_mb"]["fastadapt"] / of(c), c) for c in cells if "memory_mb" in c]

    to_plain = peaks(lambda c: c["memory_mb"]["plain"])
    many = [(x, c) for x, c in to_plain if c["head"] == "trainable" and c["n"] >= 4 * c["h"]]
    errors = [(c["rms_error"]["fastadapt"] / c["rms_error"]["plain"], c) for c in here]
    small = f"bfloat16, N, H, V = {' or '.join('{:,}, {:,}, {:,}'.format(*s) for s in LOSS_SHAPES)}"
    return [
        *(
            slower(f"plain PyTorch's time to ours, {both}, {head} head, {small}", found, "plain", x)
            for head, x in (("trainable", 1.5), ("frozen", 1.6))
            for found in [of(head, halves)]
        ),
        slower(f"trl's time to ours, {both}, trainable head", of("trainable", here), "trl", 2.5),
        slower("plain PyTorch's time to ours in all other cells, least", others, "plain", 1.0),
        *(
            worst(
                f"time to that of the {number} products of a {head} head in these cells, most",
                medians(of(head, others), "to_products"),
                1.08,
            )
            for head, number in (("trainable", "three"), ("frozen", "two"))
        ),
        worst(
            "peak memory over inputs and gradients to that of the plan, most",
            peaks(lambda c: c["plan_mb"]),
            1.05,
        ),
        worst("the same to plain PyTorch's, most", to_plain, 1.0),
        worst("the same, trainable head, N >= 4 H", many, 0.35),
        *(
            worst(f"{name} to one label's time, most", medians(cells, "to_fastadapt", key), 1.05)
            for key, name in (("candidates", "8 candidates' a row"), ("set", "their set's"))
        ),
        worst(
            "peak memory with memory_budget=0, of float32 logits, V >= 128,256, worst cell",
            memory_shares(record),
            5,
        )._replace(unit="%"),
        worst("rms error of bfloat16 log-odds to that of full bfloat16 logits", errors, 0.2),
    ]


def _shape(cell: Record) -> tuple[int, int, int]:
    """Returns N, H, V of a cell."""
    return cell["n"], cell["h"], cell["v"]


def divergence_limits(record: Record) -> list[Limit]:
    """The demands on `linear_divergence`."""
    label = "time to that of its products, forward and backward, {} head, worst cell"
    found = []
    for head in ("trainable", "frozen"):
        cells = [c for c in record["cells"] if c["head"] == head]
        found.append(worst(label.format(head), medians(cells, "to_products"), 1.15))
    return found


def gpu_losses_limits(record: Record) -> list[Limit]:
    """The demands on `linear_log_odds` on a GPU: times of calls in turns, peaks over inputs."""
    here = [c for c in record["cells"] if (c["h"], c["v"]) == GPU_HEAD]
    few, many = ({c["task"]: c for c in here if c["n"] == n} for n in GPU_ROWS)

    def to_products(task: str, label: str, bound: float) -> Limit:
        times = few.get(task, {}).get("to_products", [None, None])
        return Limit(f"{label}, forward and backward", times[1], bound)

    def peak(task: str, label: str) -> Limit:
        own = few.get(task, {}).get("peak_mib", {}).get("fastadapt")
        return Limit(f"{label}, peak memory", own and own / 1024, 0.3, "GiB")

    def growth(kind: str) -> list[float]:
        pairs = [(few[task][kind], many[task][kind]) for task in few if task in many]
        both = [(a["fastadapt"], b["fastadapt"]) for a, b in pairs if "fastadapt" in a.keys() & b]
        return [b[1] / a[1] if kind == "ms" else b / a for a, b in both]

    slower = [times * GPU_ROWS[0] / GPU_ROWS[1] for times in growth("ms")]
    rows = "N = 16,384 to N = 4,096, worst task"
    limits = [
        to_products("ce", "cross entropy, 1.25 GiB of logits kept, to three products", 1.15),
        to_products("tokens", "random upstream, nothing kept, to four products", 1.12),
        peak("tokens", "the same"),
        to_products("frozen", "frozen head, to two products", 1.15),
        peak("frozen", "the same"),
        Limit(f"time a row, {rows}", max(slower, default=None), 1.1),
        # float32 sums of the hidden states' gradient grow with the rows, tiles do not
        Limit(f"peak memory, {rows} (rows: 4 x)", max(growth("peak_mib"), default=None), 3),
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


def _beside(cell: Record, peer: str) -> tuple[float, float]:
    """A peer's time to ours and our peak to its, of ours with logits kept if that is no larger."""
    peaks, times = cell["peak_mib"], cell["ms"]
    lean = peaks["fastadapt"] > peaks[peer] and "nothing kept" in peaks
    ours = "nothing kept" if lean else "fastadapt"
    return times[peer][1] / times[ours][1], peaks[ours] / max(peaks[peer], 1e-3)


def gpu_loss_static_limits(record: Record) -> list[Limit]:
    """The demands on times that a model predicts of a GPU, beside the bare products."""
    kinds = (
        ("trained, all logits kept", ("3M",), 4096, 1.08),
        ("frozen", ("frozen",), 4096, 1.15),
        ("trained or frozen", ("3M", "frozen"), 2048, 1.3),
    )
    found = []
    for words, few in (("from 4,096 rows on", False), ("of 512 rows", True)):
        for label, plans, h, bound in kinds:
            figures = [
                (c["to_bare"], f"N = {c['n']:,}, {c['plan']}")
                for c in record["cells"]
                if c["plan"] in plans and c["h"] == h and (c["n"] == 512) == few
            ]
            figure, where = max(figures, default=(None, ""))
            text = f"predicted time to the bare products, {label}, H = {h}, {words}"
            found.append(Limit(text, figure, bound, where=where))
    return found


def train_limits(record: Record) -> list[Limit]:
    """The demands on the training run."""
    linear, logits = (record["variants"][name] for name in ("linear", "logits"))
    curves = zip(linear["curves"]["loss"], logits["curves"]["loss"], strict=True)
    apart = max(abs(one - other) / abs(other) for one, other in curves)
    memory = linear["memory_mb"]["extra"] / logits["memory_mb"]["extra"]
    steps = f"loss of {record['settings']['steps']} steps"
    label = f"{steps}, largest relative difference from the run with full logits"
    return [
        Limit(label, 1e6 * apart, 100, "ppm"),
        Limit("peak memory over the loaded model, to that with full logits", memory, 1.0),
    ]


def tradeoff_limits(record: Record) -> list[Limit]:
    """The demands on the trade-off study's sampling and scoring."""
    ratio, agreement = record["stock_to_ours"]["all"][1], max(record["agreement"].values())
    outside = f"tokens outside the support they were drawn from, of {record['tokens']:,} a round"
    return [
        Limit("transformers' time to ours, end to end", ratio, 1.0, at_least=True),
        Limit(outside, record["violations"]["fastadapt"], 0, "tokens"),
        Limit("largest difference of a string's scores", agreement, 0.01, "nats"),
    ]


def tracker_limits(record: Record) -> list[Limit]:
    """The demand on the tracker's cost."""
    kinds = {"log_odds": "of log-odds alone", "rho": "with ρ of every pair"}
    return [
        Limit(f"steps with the tracker, {kinds[mode]}, to steps without", ratio[1], 1.05)
        for mode, ratio in record["to_none"].items()
    ]


LIMITS: dict[str, Callable[[Record], list[Limit]]] = {
    "generation": generation_limits,
    "sampling": sampling_limits,
    "gpu_sampling": gpu_sampling_limits,
    "score": score_limits,
    "edits": edits_limits,
    "filters": filters_limits,
    "verify": verify_limits,
    "sharded": sharded_limits,
    "history": history_limits,
    "vllm": vllm_limits,
    "losses": losses_limits,
    "divergence": divergence_limits,
    "gpu_losses": gpu_losses_limits,
    "gpu_loss_static": gpu_loss_static_limits,
    "train_preferences": train_limits,
    "tradeoff": tradeoff_limits,
    "tracker": tracker_limits,
}
