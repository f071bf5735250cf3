"""trl's data, reference and checkpoints with any mixture of the losses in place of DPO.

python examples/train_with_trl.py [MODEL]
"""

import sys
import tempfile

from fastadapt.trl import RewardPenalizeTrainer
from fastadapt.training.pretrained import load_model
from datasets import Dataset
from trl import DPOConfig

PAIRS = Dataset.from_list(
    [
        {
            "prompt": "What is two and two?",
            "chosen": " Two and two make four.",
            "rejected": " Guess.",
        },
        {"prompt": "Name a colour.", "chosen": " Blue is a colour.", "rejected": " Name it."},
    ]
)

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None, fetch=True)
with tempfile.TemporaryDirectory() as folder:
    trainer = RewardPenalizeTrainer(
        model,
        args=DPOConfig(
            folder,
            beta=0.1,
            max_steps=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            bf16=False,
            report_to="none",
        ),
        train_dataset=PAIRS,
        processing_class=tokenizer,
        loss={"dpo": 1.0, "exmate": 0.5},
    )
    trainer.train()
for line in trainer.state.log_history:
    if "loss" in line:
        print(f"step {line['step']}: loss {line['loss']:.4f}")
