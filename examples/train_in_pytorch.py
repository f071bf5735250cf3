"""A training loop of your own on preference pairs: DPO + ExMATE without the logits.

python examples/train_in_pytorch.py [MODEL]
"""

import sys

import torch

from fastadapt import RewardPenalizeLoss
from fastadapt.training import pair_loss, reference_logps
from fastadapt.training.pairs import Pair, encode_pairs
from fastadapt.training.pretrained import load_model

PAIRS = [
    Pair("What is two and two?", "Two and two make four.", "How should I know?"),
    Pair("Name a colour.", "Blue is a colour.", "Name it yourself."),
]

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None, fetch=True)
batch = encode_pairs(tokenizer, PAIRS, chat=tokenizer.chat_template is not None)
reference = reference_logps(model, batch)  # of the model before its first step
objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0}, beta=0.1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

model.train()
for step in range(3):
    optimizer.zero_grad()
    loss, metrics = pair_loss(model, batch, objective, reference)
    loss.backward()
    optimizer.step()
    print(
        f"step {step}: loss {loss:.4f}, chosen ahead in {metrics['pairs/accuracies']:.0%} of pairs"
    )
