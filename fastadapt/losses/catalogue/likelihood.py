"""Entries of the likelihood losses and of the penalties on rejected responses."""

from typing import Any

from fastadapt.losses.catalogue.entry import Entry, Gradient
from fastadapt.losses.catalogue.symbols import times

WELLECK = "Welleck et al. 2020, arXiv 1908.04319"
PARLAI = "ParlAI, projects/dialogue_unlikelihood"
CAUSAL = "Tuan et al. 2023, arXiv 2212.10515, with its code, Pascalson/CausalDialogue"

_UNLIKELIHOOD = (
    Gradient("0", "-exp(m)/N", "B", log_odds="σ(m)/N", given={"level": "token"}, title="token"),
    Gradient("0", "-1/(B*expm1(-S))", "C", given={"level": "sequence"}, title="sequence"),
    Gradient(
        "0",
        "-1/(B*T*expm1(-S/T))",
        "C",
        given={"level": "sequence_mean"},
        title="sequence mean",
    ),
)
_EXMATE = (
    Gradient("0", "-exp(S/T)/(B*T)", "C", given={"norm": "sequence_mean"}, title="sequence mean"),
    Gradient("0", "-exp(L)/N", "D", given={"norm": "batch_token_mean"}, title="published code"),
    Gradient("0", "-P/B", "C", given={"norm": "sequence_sum"}, title="sequence sum"),
    Gradient("0", "-p/N", "B", given={"norm": "token"}, title="token"),
)
_MATE = (Gradient("0", "-1/N", "A"),)


def _with_mle(penalty: tuple[Gradient, ...]) -> tuple[Gradient, ...]:
    """Returns the coefficients of MLE and λ times a penalty."""
    return tuple(
        row._replace(
            chosen="1/N",
            rejected=times("λ", row.rejected),
            log_odds=None if row.log_odds is None else times("λ", row.log_odds),
        )
        for row in penalty
    )


def _penalising(
    title: str,
    source: str,
    gradients: tuple[Gradient, ...],
    limits: tuple[str, str],
    when: str,
    *needs: str,
) -> dict[str, Any]:
    """Returns the fields of a loss of rejected responses, whichever the chosen ones are."""
    return {
        "title": title,
        "source": source,
        "needs": frozenset({"unpaired", *needs}),
        "gradients": gradients,
        "limits": limits,
        "when": when,
    }


ENTRIES = {
    "mle": Entry(
        "MLE",
        "the cross-entropy of language models",
        frozenset(),
        (
            Gradient("1/N", "0", "A", given={"reduction": "token_mean"}, title="token mean"),
            Gradient("1/B", "0", "A", given={"reduction": "sequence_sum"}, title="sum"),
        ),
        None,
        "Beside any loss of pairs that lets the chosen response's probability fall.",
    ),
    "smoothed_mle": Entry(
        "label-smoothed MLE",
        "Szegedy et al. 2016, arXiv 1512.00567, section 7",
        frozenset({"mean_logits"}),
        (
            Gradient("(1 - ε)/N", "0", "A", given={"reduction": "token_mean"}, title="token mean"),
            Gradient("(1 - ε)/B", "0", "A", given={"reduction": "sequence_sum"}, title="sum"),
        ),
        None,
        "Where over-confident next-token distributions hurt; what is not the label's own share "
        "goes through the log-sum-exp and the mean logit.",
    ),
    "focal_mle": Entry(
        "focal MLE",
        "Lin et al. 2017, arXiv 1708.02002, eq. 4",
        frozenset(),
        tuple(
            Gradient(
                f"((1-p)**γ - γ*p*(1-p)**(γ-1)*l)/{n}",
                "0",
                "B",
                log_odds=f"(γ*p*(1-p)**γ*l - (1-p)**(γ+1))/{n}",
                given={"reduction": reduction},
                title=title,
            )
            for n, reduction, title in (
                ("N", "token_mean", "token mean"),
                ("B", "sequence_sum", "sum"),
            )
        ),
        None,
        "Where most tokens are easy and the rare hard ones shall get the gradient.",
    ),
    "dft": Entry(
        "DFT",
        "Wu et al. 2025, arXiv 2508.05629, eq. 9",
        frozenset(),
        tuple(
            Gradient(
                f"p/{n}",
                "0",
                "B",
                log_odds=f"-p*σ(-m)/{n}",
                given={"reduction": reduction},
                title=title,
            )
            for n, reduction, title in (
                ("N", "token_mean", "token mean"),
                ("B", "sequence_sum", "sum"),
            )
        ),
        None,
        "Fine-tuning on text that the model nearly writes already: what it finds unlikely is not "
        "learnt.",
    ),
    "unlikelihood": Entry(
        **_penalising(
            "MLE + unlikelihood",
            f"{PARLAI}; {WELLECK}",
            _with_mle(_UNLIKELIHOOD),
            ("0", "-inf"),
            "To push single tokens down however certain they are; a token that both sides share is "
            "pushed down too from p = 1/(1+λ) on.",
        )
    ),
    "exmate": Entry(
        **_penalising(
            "ExMATE",
            CAUSAL,
            _with_mle(_EXMATE),
            ("0", "-λ/(B*T)"),
            "To push bad responses down while they are likely and leave MLE alone once they are "
            "not.",
            "lengths",
        )
    ),
    "mate": Entry(
        **_penalising(
            "MATE",
            CAUSAL,
            _with_mle(_MATE),
            ("-λ/N", "-λ/N"),
            "As the baseline of ExMATE: its push never ends and runs can diverge.",
        )
    ),
    "unlikelihood_penalty": Entry(
        **_penalising(
            "unlikelihood, penalty alone",
            f"{PARLAI}; {WELLECK}",
            _UNLIKELIHOOD,
            ("0", "-inf"),
            "Beside another loss of the chosen side.",
        )
    ),
    "exmate_penalty": Entry(
        **_penalising(
            "ExMATE, penalty alone",
            CAUSAL,
            _EXMATE,
            ("0", "-1/(B*T)"),
            "Beside another loss of the chosen side.",
            "lengths",
        )
    ),
    "mate_penalty": Entry(
        **_penalising(
            "MATE, penalty alone",
            CAUSAL,
            _MATE,
            ("-1/N", "-1/N"),
            "Beside another loss of the chosen side.",
        )
    ),
    "candidate_unlikelihood_penalty": Entry(
        "unlikelihood of candidates",
        f"{WELLECK}, eq. 5",
        frozenset({"candidates"}),
        (Gradient("0", "-exp(m)/N", "B", log_odds="σ(m)/N"),),
        ("0", "-inf"),
        "Against repetition and other mistakes in the rows of good text: the candidates are other "
        "ids of the same rows.",
    ),
}
