"""trl: its trainers without logits, on what was sampled, and two for any mixture of losses."""

from fastadapt._ops.config import needs_extra

with needs_extra("fastadapt.trl", "train"):
    from fastadapt.trl.support_trainers import SupportGRPOTrainer, SupportRLOOTrainer
    from fastadapt.trl.trainer import RewardPenalizeTrainer, fused_log_probs
    from fastadapt.trl.unpaired import UnpairedRewardPenalizeTrainer

__all__ = [
    "RewardPenalizeTrainer",
    "SupportGRPOTrainer",
    "SupportRLOOTrainer",
    "UnpairedRewardPenalizeTrainer",
    "fused_log_probs",
]
__dir__ = __all__.copy  # what is not public is not listed
