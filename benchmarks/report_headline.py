"""The documents' figure and its four lines of numbers."""

from __future__ import annotations

from typing import Any

from limits import geometric_mean, memory_shares

FIGURE = "sampling.png"
BUILT_FROM = ("sampling", "generation", "losses", "trainer")  # the arguments of `headline`


def headline(
    sampling: dict[str, Any],
    generation: dict[str, Any],
    losses: dict[str, Any],
    trainer: dict[str, Any],
) -> str:
    """What a newcomer should know of speed and memory."""
    ratios = [cell["to_softmax"]["fastadapt"][1] for cell in sampling["cells"]]
    stock = [
        peer["to_fastadapt"]["stock"][1]
        for peer in sampling["peers"]
        if peer["vocabulary"] >= 128_000 and "stock" in peer["to_fastadapt"]
    ]
    modes = generation["modes"]
    fused, chain = (modes[name]["ratio_to_greedy"]["median"] for name in ("fused", "stock"))
    shares = [share for share, _ in memory_shares(losses)]
    steps = [cell["trl_to_fastadapt"][1] for cell in trainer["cells"]]
    lines = [
        f"![Time per row against the vocabulary](benchmarks/results/{FIGURE})",
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
