"""transformers' Trainer without logits: the loss of next tokens from hidden states and the head.

python examples/train_with_transformers.py [MODEL]
"""

import sys
import tempfile

from fastadapt.hf import LogitsFreeTrainer
from fastadapt.training.pretrained import load_model
from transformers import DataCollatorForLanguageModeling, TrainingArguments

TEXTS = ["Blue is a colour.", "Two and two make four.", "Water boils at one hundred degrees."]

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None, fetch=True)
with tempfile.TemporaryDirectory() as folder:
    trainer = LogitsFreeTrainer(
        model,
        TrainingArguments(
            folder,
            max_steps=2,
            per_device_train_batch_size=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": tokenizer(text).input_ids} for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
for line in trainer.state.log_history:
    if "loss" in line:
        print(f"step {line['step']}: loss {line['loss']:.4f}")
