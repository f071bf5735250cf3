"""The losses of the gradient study, by their names in tables and pictures."""

LOSSES: dict[str, dict[str, float]] = {
    "MLE": {"mle": 1.0},
    "MLE + unlikelihood": {"unlikelihood": 1.0},
    "ExMATE": {"exmate": 1.0},
    "DPO": {"dpo": 1.0},
    "DPO + MLE": {"dpo": 1.0, "mle": 1.0},
    "DPO + ExMATE": {"dpo": 1.0, "exmate": 1.0},
}
