"""trl: its trainers without logits, and a trainer for every mixture of losses."""

from fastadapt.trl.trainer import RewardPenalizeTrainer, fused_log_probs

__all__ = ["RewardPenalizeTrainer", "fused_log_probs"]


def __dir__() -> list[str]:
    """Lists the public names."""
    return __all__
