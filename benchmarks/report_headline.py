"""The documents' figure and its four lines of numbers."""

from __future__ import annotations

from typing import Any

from limits import geometric_mean

BUILT_FROM = ("sampling", "generation", "losses", "trainer")


def headline(records: dict[str, dict[str, Any]], figure: str) -> str:
    """What a newcomer should know of speed and memory, from the results of `BUILT_FROM`."""
    sampling, generation, losses, trainer = (records[name] for name in BUILT_FROM)
    ratios = [cell["to_softmax"]["fastadapt"][1] for cell in sampling["cells"]]
    stock = [
        peer["to_fastadapt"]["stock"][1]
        for peer in sampling["peers"]
        if peer["vocabulary"] >= 128_000 and "stock" in peer["to_fastadapt"]
    ]
    modes = generation["modes"]
    fused, chain = (modes[name]["ratio_to_greedy"]["median"] for name in ("fused", "stock"))
    shares = [
        100e6 * cell["memory_mb"]["fastadapt"] / (4 * cell["n"] * cell["v"])
        for cell in losses["cells"]
        if cell["v"] >= 128_256 and "memory_mb" in cell
    ]
    steps = [cell["trl_to_fastadapt"][1] for cell in trainer["cells"]]
    lines = [
        f"![Time per row against the vocabulary](benchmarks/results/{figure})",
        "",
        f"- Filters and draw take {geometric_mean(ratios):.2f} x a `torch.softmax` of the same "
        f"rows (geometric mean of {len(ratios)} cells); transformers' chain takes at least "
        f"{min(stock):,.0f} x our time where the vocabulary has 128,000 entries or more.",
        f"- A step of generation with top-p costs {fused:.2f} x a greedy one; with transformers' "
        f"own warpers {chain:.2f} x.",
        f"- Losses from hidden states need at most {max(shares):.1f} % of the memory of the "
        "float32 logits where the vocabulary has 128,256 entries or more.",
        f"- A DPO step is {min(steps):.2f} to {max(steps):.2f} x faster than trl's, with all "
        "parameters or LoRA, in float32 or bfloat16.",
        "",
        f"On a CPU, {sampling['host']['cpu']}; how each was measured: "
        "[benchmarks](docs/benchmarks.md).",
    ]
    return "\n".join(lines) + "\n"
