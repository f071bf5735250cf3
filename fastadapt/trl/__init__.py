"""trl: its trainers without logits, and a trainer for any mixture of losses."""

try:
    from fastadapt.trl.trainer import RewardPenalizeTrainer, fused_log_probs
except (ImportError, RuntimeError) as error:  # transformers raises both
    why = str(error).partition("\n")[0]
    raise ImportError(
        f"fastadapt.trl cannot be imported ({why}): what it needs comes with "
        'pip install "fastadapt[train]"'
    ) from error

__all__ = ["RewardPenalizeTrainer", "fused_log_probs"]
__dir__ = __all__.copy  # what is not public is not listed
