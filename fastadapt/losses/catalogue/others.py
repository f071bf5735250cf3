"""Entries of the losses of pairs without a reference and of single responses."""

from fastadapt.losses.catalogue.entry import Entry, Gradient

_MEANS = "S⁺/T⁺ - S⁻/T⁻"
_SINGLE = frozenset({"unpaired", "reference"})

ENTRIES = {
    "cpo": Entry(
        "CPO",
        "Xu et al. 2024, arXiv 2401.08417, eq. 5",
        frozenset({"pairs"}),
        (
            Gradient(
                "ν/N + β/B*(σ(-u) - ε)",
                "-β/B*(σ(-u) - ε)",
                "C",
                "β*(S⁺ - S⁻)",
                given={"loss_type": "sigmoid"},
                title="sigmoid",
            ),
            Gradient(
                "ν/N + β/B*(u < 1)",
                "-β/B*(u < 1)",
                "C",
                "β*(S⁺ - S⁻)",
                given={"loss_type": "hinge"},
                title="hinge",
            ),
            Gradient(
                "ν/N + 2/(B*T)*(1/(2*β) - u)",
                "-2/(B*T)*(1/(2*β) - u)",
                "C",
                _MEANS,
                given={"loss_type": "ipo"},
                title="ipo",
            ),
        ),
        ("β*ε/B", "-β/B*(σ(-u) - ε)"),
        "DPO at the cost of one model: no reference, held by the chosen responses' likelihood.",
    ),
    "simpo": Entry(
        "SimPO",
        "Meng et al. 2024, arXiv 2405.14734, eq. 6",
        frozenset({"pairs", "lengths"}),
        (Gradient("β/(B*T)*(σ(-u) - ε)", "-β/(B*T)*(σ(-u) - ε)", "C", f"β*({_MEANS}) - γ"),),
        ("β*ε/(B*T)", "-β/(B*T)*(σ(-u) - ε)"),
        "No reference, and no reward for length; few steps, since nothing holds the policy.",
    ),
    "alphapo": Entry(
        "AlphaPO",
        "Gupta et al. 2025, arXiv 2501.03884, eq. 7",
        frozenset({"pairs", "lengths"}),
        (
            Gradient(
                "β/(B*T)*(σ(-u) - ε)",
                "-β/(B*T)*(σ(-u) - ε)",
                "C",
                f"β*({_MEANS}) - γ",
                given={"alphapo_alpha": 0.0},
                title="α = 0, SimPO",
            ),
            Gradient(
                "β/(B*T)*(σ(-u) - ε)*exp(-α*S/T)",
                "-β/(B*T)*(σ(-u) - ε)*exp(-α*S/T)",
                "C",
                "β*(exp(-α*S⁻/T⁻) - exp(-α*S⁺/T⁺))/α - γ",
            ),
        ),
        None,
        "SimPO whose reward bends: α > 0 pulls most where a response is unlikely.",
    ),
    "orpo": Entry(
        "ORPO",
        "Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7",
        frozenset({"pairs", "lengths"}),
        (
            Gradient(
                "1/N - β/(B*T)*σ(-u)/expm1(S/T)",
                "β/(B*T)*σ(-u)/expm1(S/T)",
                "C",
                "log(expm1(-S⁻/T⁻)) - log(expm1(-S⁺/T⁺))",
            ),
        ),
        ("0", "-inf"),
        "One stage and one model: fine-tuning and preference at once, from a base model.",
    ),
    "slic": Entry(
        "SLiC-HF",
        "Zhao et al. 2023, arXiv 2305.10425, eq. 1",
        frozenset({"pairs"}),
        (Gradient("ν/Q + 1/B*(u < δ)", "-1/B*(u < δ)", "C", "S⁺ - S⁻"),),
        ("0", "-1/B*(u < δ)"),
        "A plain margin of log-probabilities with a likelihood beside, in the place of RLHF.",
    ),
    "tpo": Entry(
        "TPO",
        "Saeidi et al. 2024, arXiv 2405.16681, eq. 6",
        frozenset({"pairs", "gold"}),
        (
            Gradient(
                "β/B*(σ(-u) - ε)",
                "-β/B*(σ(-u) - ε)",
                "C",
                "β*(S⁺ - S⁻)",
                given={"loss_type": "sigmoid"},
                title="sigmoid",
            ),
            Gradient(
                "β/B*(u < 1)",
                "-β/B*(u < 1)",
                "C",
                "β*(S⁺ - S⁻)",
                given={"loss_type": "hinge"},
                title="hinge",
            ),
            Gradient(
                "2/(B*T)*(1/(2*β) - u)",
                "-2/(B*T)*(1/(2*β) - u)",
                "C",
                _MEANS,
                given={"loss_type": "ipo"},
                title="ipo",
            ),
            Gradient(
                "β/(B*T)*(σ(-u) - ε)",
                "-β/(B*T)*(σ(-u) - ε)",
                "C",
                f"β*({_MEANS}) - γ",
                given={"loss_type": "tpo-l"},
                title="TPO-L",
            ),
        ),
        ("β*ε/B", "-β/B*(σ(-u) - ε)"),
        "Where there are three responses: imitate the best, and prefer the second to the third.",
    ),
    "kto": Entry(
        "KTO",
        "Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7",
        _SINGLE,
        (Gradient("λ⁺*β/M*σ(u)*σ(-u)", "-λ⁻*β/M*σ(u)*σ(-u)", "D", "β*(r - z)"),),
        ("0", "-λ⁻*β/M*σ(u)*σ(-u)"),
        "For responses with a thumb up or down and no pairs; costs a forward more for z.",
    ),
    "apo_zero_unpaired": Entry(
        "APO-zero, unpaired",
        "D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7",
        _SINGLE,
        (Gradient("λ⁺*β/M*σ(u)*σ(-u)", "-λ⁻*β/M*σ(u)*σ(-u)", "C", "β*r"),),
        ("0", "-λ⁻*β/M*σ(u)*σ(-u)"),
        "KTO without the forward more.",
    ),
    "bco": Entry(
        "BCO",
        "Jung et al. 2024, arXiv 2404.04656, eq. 12",
        _SINGLE,
        (Gradient("β/M*σ(δ - β*r)", "-β/M*σ(β*r - δ)", "D"),),
        ("0", "-β/M*σ(β*r - δ)"),
        "As KTO, for a classifier of good against bad responses whose threshold follows the run.",
    ),
}
