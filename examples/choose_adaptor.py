"""Chooses top-p for a model: the least that still allows 95 % of the tokens of texts like yours.

python examples/choose_adaptor.py [MODEL]
"""

import sys

import torch

from fastadapt import Adaptor, score
from fastadapt.training.pretrained import load_model

TEXTS = [
    "Plants turn light, water and air into sugar, and give off oxygen.",
    "She closed the book, looked out of the window and began to laugh.",
    "To make tea, boil water, pour it over the leaves and wait.",
]
GRID = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None, fetch=True)
allowed, kept = torch.zeros(len(GRID)), torch.zeros(len(GRID))
number = 0
with torch.inference_mode():
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        scores = score(
            model(tokens).logits[:, :-1], tokens[:, 1:], [Adaptor(top_p=p) for p in GRID]
        )
        allowed += scores.logprobs.isfinite().sum((0, 1))
        kept += scores.kept.sum((0, 1))
        number += tokens.shape[1] - 1

for p, share, tokens_kept in zip(GRID, allowed / number, kept / number, strict=True):
    print(f"top_p={p:<5} allows {share:4.0%} of the tokens, keeps {tokens_kept:,.0f} on average")
chosen = next(p for p, share in zip(GRID, allowed / number, strict=True) if share >= 0.95)
print(f"chosen: Adaptor(top_p={chosen})")
