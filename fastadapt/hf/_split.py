"""What a generation takes where each rank has a slice of the logits."""

from transformers import GenerationConfig

from fastadapt.hf._chain import Chain


def refuse_whole_rows(chain: Chain, config: GenerationConfig, **asked: bool) -> None:
    """Raises for what needs a whole row of logits in one place.

    Args:
        chain: of processors.
        config: of the call.
        **asked: by the names of arguments, whether there is more that needs whole rows.

    Raises:
        NotImplementedError: it is asked for.
    """
    processors = [type(p).__name__ for p in (*chain.before, *chain.edits)]
    if processors:
        raise NotImplementedError(
            f"logits_processor: expected warpers alone with a group, got {', '.join(processors)}"
        )
    for name, value in {"output_scores": config.output_scores, **asked}.items():
        if value:
            raise NotImplementedError(f"{name}: expected none with a group, whose rows are split")
