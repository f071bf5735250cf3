"""Entries of the losses of pairs with a reference."""

from fastadapt.losses.catalogue.entry import Entry, Gradient

_PAIRS = frozenset({"pairs", "reference"})
_MARGIN = "β*(r⁺ - r⁻)"


def _opposite(pull: str, *, u: str = _MARGIN, **more: object) -> Gradient:
    """Returns a row whose two sides are pulled apart by the same coefficient."""
    return Gradient(pull, f"-{pull}", "C", u, **more)  # type: ignore[arg-type]


ENTRIES = {
    "dpo": Entry(
        "DPO",
        "Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
        _PAIRS,
        (_opposite("β/B*σ(-u)"),),
        ("0", "-β/B*σ(-u)"),
        "The usual choice for pairs; both responses may become less likely.",
    ),
    "cdpo": Entry(
        "conservative DPO",
        "the code of arXiv 2305.18290",
        _PAIRS,
        (_opposite("β/B*(σ(-u) - ε)"),),
        ("β*ε/B", "-β/B*(σ(-u) - ε)"),
        "Where a share ε of the pairs is swapped: the margin stops at log (1-ε)/ε.",
    ),
    "robust": Entry(
        "robust DPO",
        "Chowdhury et al. 2024, arXiv 2403.00409, eq. 6",
        _PAIRS,
        (_opposite("β/B*((1-ε)*σ(-u) + ε*σ(u))/(1-2*ε)"),),
        ("-β*ε/(B*(1-2*ε))", "-β/B*((1-ε)*σ(-u) + ε*σ(u))/(1-2*ε)"),
        "Where a known share ε of the pairs is swapped and its bias shall go; its pull never ends.",
    ),
    "hinge": Entry(
        "hinge (RSO)",
        "Liu et al. 2023, arXiv 2309.06657, eq. 11",
        _PAIRS,
        (_opposite("β/B*(u < 1)"),),
        ("0", "-β/B*(u < 1)"),
        "Where pairs that are won by a margin shall be left alone.",
    ),
    "ipo": Entry(
        "IPO",
        "Azar et al. 2023, arXiv 2310.12036, eq. 17",
        _PAIRS | {"lengths"},
        (
            _opposite(
                "2/(B*T)*(1/(2*β) - u)",
                u="r⁺/T⁺ - r⁻/T⁻",
                given={"length_normalized": True},
                title="token averages",
            ),
            _opposite(
                "2/B*(1/(2*β) - u)",
                u="r⁺ - r⁻",
                given={"length_normalized": False},
                title="sums",
            ),
        ),
        ("inf", "-2/(B*T)*(1/(2*β) - u)"),
        "Where labels are certain and DPO would drive the margin without end: it is pulled to "
        "1/(2β) from both sides.",
    ),
    "sigmoid_norm": Entry(
        "length-normalised DPO",
        "Lambert et al. 2024, arXiv 2411.15124, eq. 6",
        _PAIRS | {"lengths"},
        (_opposite("β/(B*T)*σ(-u)", u="β*(r⁺/T⁺ - r⁻/T⁻)"),),
        ("0", "-β/(B*T)*σ(-u)"),
        "Where longer responses win by their length alone.",
    ),
    "exo_pair": Entry(
        "EXO",
        "Ji et al. 2024, arXiv 2402.00856, eq. 16",
        _PAIRS,
        (_opposite("β/B*σ(u)*σ(-u)*(log((1-ε)/ε) - u)"),),
        ("0", "-β/B*σ(u)*σ(-u)*(log((1-ε)/ε) - u)"),
        "For the reverse KL divergence, which seeks one mode; pairs that are far lost are let go.",
    ),
    "discopop": Entry(
        "DiscoPOP",
        "Lu et al. 2024, arXiv 2406.08414, eq. 5",
        _PAIRS,
        (
            _opposite(
                "β/B*(σ(-u/τ)*σ(-u) + σ(u/τ)*exp(-u) - σ(u/τ)*σ(-u/τ)/τ*(exp(-u) + log(σ(u))))"
            ),
        ),
        (
            "0",
            "-β/B*(σ(-u/τ)*σ(-u) + σ(u/τ)*exp(-u) - σ(u/τ)*σ(-u/τ)/τ*(exp(-u) + log(σ(u))))",
        ),
        "A loss that was searched for by a program; not monotonic around u = 0.",
    ),
    "nca_pair": Entry(
        "NCA",
        "Chen et al. 2024, arXiv 2402.05369, table 2",
        _PAIRS,
        (Gradient("β/B*(σ(-β*r⁺) - σ(β*r⁺)/2)", "-β/(2*B)*σ(β*r⁻)", "C"),),
        ("0", "-β/(2*B)*σ(β*r⁻)"),
        "To hold the chosen response's probability up: its reward is pulled to log 2.",
    ),
    "bco_pair": Entry(
        "BCO of pairs, no shift",
        "Jung et al. 2024, arXiv 2404.04656, eq. 12",
        _PAIRS,
        (Gradient("β/B*σ(-β*r⁺)", "-β/B*σ(β*r⁻)", "C"),),
        ("0", "-β/B*σ(β*r⁻)"),
        "To classify the two responses apart instead of comparing them; what trl calls bco_pair.",
    ),
    "sppo_hard": Entry(
        "SPPO",
        "Wu et al. 2024, arXiv 2405.00675, eq. 4.7",
        _PAIRS,
        (Gradient("2/B*(1/(2*β) - r⁺)", "-2/B*(1/(2*β) + r⁻)", "C"),),
        ("inf", "-2/B*(1/(2*β) + r⁻)"),
        "For rounds of self-play: each reward has a goal, ±1/2.",
    ),
    "apo_zero": Entry(
        "APO-zero",
        "D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7",
        _PAIRS,
        (Gradient("β/B*σ(β*r⁺)*σ(-β*r⁺)", "-β/B*σ(β*r⁻)*σ(-β*r⁻)", "C"),),
        ("0", "-β/B*σ(β*r⁻)*σ(-β*r⁻)"),
        "Where chosen responses are better than the model's own: up with them, down with others.",
    ),
    "apo_down": Entry(
        "APO-down",
        "D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8",
        _PAIRS,
        (Gradient("β/B*(σ(u)*σ(-u) - σ(β*r⁺)*σ(-β*r⁺))", "-β/B*σ(u)*σ(-u)", "C", "β*(r⁺ - r⁻)"),),
        ("0", "-β/B*σ(u)*σ(-u)"),
        "Where chosen responses are worse than the model's own: down with both.",
    ),
    "cal_dpo": Entry(
        "Cal-DPO",
        "Xiao et al. 2024, arXiv 2412.14516",
        _PAIRS,
        (Gradient("(σ(-u) + 1/β - 2*r⁺)/B", "-(σ(-u) + 1/β + 2*r⁻)/B", "C", "r⁺ - r⁻"),),
        ("inf", "-(σ(-u) + 1/β + 2*r⁻)/B"),
        "Where the chosen response's reward must not fall below 0, as DPO lets it.",
    ),
    "dpop": Entry(
        "DPO-positive",
        "Pal et al. 2024, arXiv 2402.13228, eq. 3",
        _PAIRS,
        (
            Gradient(
                "β/B*σ(-u)*(1 + λ*(r⁺ < 0))",
                "-β/B*σ(-u)",
                "C",
                "β*(r⁺ - r⁻ - λ*relu(-r⁺))",
            ),
        ),
        ("0", "-β/B*σ(-u)"),
        "For pairs that differ in a few tokens, where DPO lowers the chosen response too.",
    ),
    "tdpo": Entry(
        "TDPO",
        "Zeng et al. 2024, arXiv 2404.11999, eq. 15 and 17",
        _PAIRS | {"divergences"},
        (
            _opposite(
                "β/B*σ(-u)",
                u="β*(r⁺ - r⁻ - α*(D⁻ - D⁺))",
                given={"variant": "tdpo2"},
                title="TDPO2",
            ),
            _opposite(
                "β/B*σ(-u)",
                u="β*(r⁺ - r⁻ - (D⁻ - D⁺))",
                given={"variant": "tdpo1"},
                title="TDPO1",
            ),
        ),
        ("0", "-β/B*σ(-u)"),
        "Where the divergence from the reference shall stay alike on both responses; the gradient "
        "through it is not in c.",
    ),
    "aot": Entry(
        "AOT",
        "Melnyk et al. 2024, arXiv 2406.05882, eq. 8",
        _PAIRS | {"batch"},
        (
            Gradient(
                "β/B*(σ(-u) - ε)",
                "-β/B*(σ(-u) - ε)",
                "D",
                "β*matched(S⁺ - S⁻, R⁺ - R⁻)",
            ),
        ),
        ("β*ε/B", "-β/B*(σ(-u) - ε)"),
        "To raise the whole distribution of margins and not each; it sorts the micro-batch, so "
        "that this must be large.",
    ),
    "aot_unpaired": Entry(
        "AOT, unpaired",
        "Melnyk et al. 2024, arXiv 2406.05882, eq. 9",
        _PAIRS | {"batch"},
        (Gradient("β/B*(σ(-β*matched(r⁺, r⁻)) - ε)", "-β/B*(σ(β*matched(r⁻, r⁺)) - ε)", "D"),),
        ("β*ε/B", "-β/B*(σ(β*matched(r⁻, r⁺)) - ε)"),
        "As aot where good and bad responses are of different prompts, as many of each.",
    ),
}
