"""What a generation takes where each rank has a slice of the logits."""

from typing import Any

from transformers import GenerationConfig

from fastadapt.hf._chain import Chain


def refuse_whole_rows(chain: Chain, config: GenerationConfig, *, tells: bool, drafts: bool) -> None:
    """Raises for what needs a whole row of logits in one place.

    Args:
        chain: of processors.
        config: of the call.
        tells: whether log-probabilities are asked for.
        drafts: whether tokens are drafted.

    Raises:
        NotImplementedError: it is asked for.
    """
    processors = [type(p).__name__ for p in (*chain.before, *chain.edits)]
    if processors:
        raise NotImplementedError(
            f"logits_processor: expected warpers alone with a group, got {', '.join(processors)}"
        )
    asked: dict[str, Any] = {
        "output_scores": config.output_scores,
        "output_logprobs": tells,
        "assistant_model or prompt_lookup_num_tokens": drafts,
    }
    for name, value in asked.items():
        if value:
            raise NotImplementedError(f"{name}: expected none with a group, whose rows are split")
