"""A loss of pairs or of single responses, by its name, on the package's own pairs.

python examples/train_any_loss.py [MODEL] [--loss LOSS]

Prints what the loss is, and how likely chosen and rejected responses become, on the pairs that are
trained on and on pairs that are not. A minute on a laptop with SmolLM2-135M, for any loss.
"""

import argparse
import tempfile

import torch

from fastadapt.trl import RewardPenalizeTrainer, UnpairedRewardPenalizeTrainer
from fastadapt.losses import CATALOGUE, describe, name_of, sequence_logps
from fastadapt.training import response_log_odds, sides
from fastadapt.training.pairs import PAIRS, encode_pairs
from fastadapt.training.pretrained import load_model
from datasets import Dataset
from trl import DPOConfig, KTOConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", help="folder, .gguf or hub (default: the demo's)")
choices = [name for name, entry in CATALOGUE.items() if "gold" not in entry.needs]
parser.add_argument("--loss", default="simpo", type=name_of, choices=choices, metavar="LOSS")
given = parser.parse_args()
loss = given.loss
print(describe(loss), "\n")
model, tokenizer = load_model(given.model, fetch=True)
trained, others = list(PAIRS[:24]), list(PAIRS[24:])
single = {"unpaired", "reference"} <= CATALOGUE[loss].needs  # a thumb up or down for each response


@torch.no_grad()
def cells():
    """Mean log-probability of a token: chosen and rejected, trained and other pairs."""
    found = []
    for pairs in (trained, others):
        batch = encode_pairs(tokenizer, pairs, chat=tokenizer.chat_template is not None)
        for side in sides(batch, response_log_odds(model, batch)):
            found.append(float((sequence_logps(side) / side.mask.sum(-1)).mean()))
    return found


def prompt_of(pair):
    """In the form that trl puts into the model's chat template, if there is one."""
    return [{"role": "user", "content": pair.prompt}] if tokenizer.chat_template else pair.prompt


def answer(text):
    """The same of a response."""
    return [{"role": "assistant", "content": text}] if tokenizer.chat_template else f" {text}"


if single:
    rows = [
        {"prompt": prompt_of(pair), "completion": answer(text), "label": good}
        for pair in trained
        for text, good in ((pair.chosen, True), (pair.rejected, False))
    ]
else:
    rows = [
        {
            "prompt": prompt_of(pair),
            "chosen": answer(pair.chosen),
            "rejected": answer(pair.rejected),
        }
        for pair in trained
    ]
before = cells()
config, trainer_of = (
    (KTOConfig, UnpairedRewardPenalizeTrainer) if single else (DPOConfig, RewardPenalizeTrainer)
)
with tempfile.TemporaryDirectory() as folder:
    trainer = trainer_of(
        model,
        args=config(
            folder,
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        loss={loss: 1.0},
        negatives="previous" if "candidates" in CATALOGUE[loss].needs else None,
    )
    trainer.train()
after = cells()
for name, x, y in zip(
    ("chosen, trained on", "rejected, trained on", "chosen, others", "rejected, others"),
    before,
    after,
    strict=True,
):
    print(f"{name:>20}: {x:.3f} -> {y:.3f} nats a token")
