"""A corpus under many sampling adaptors in one pass: which tokens each would have allowed.

python examples/score_corpus.py [MODEL]
"""

import sys

import torch

from fastadapt import Adaptor, score
from fastadapt.training.pretrained import load_model

TEXTS = [
    "Water boils at one hundred degrees at sea level.",
    "The old clock on the wall had stopped long before anyone noticed.",
]
ADAPTORS = {
    "as it is": Adaptor(),
    "top_k=50": Adaptor(top_k=50),
    "top_p=0.9": Adaptor(top_p=0.9),
    "min_p=0.05": Adaptor(min_p=0.05),
    "typical_p=0.9": Adaptor(typical_p=0.9),
    "T=0.7": Adaptor(temperature=0.7),
}

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None, fetch=True)
tokenizer.padding_side = "right"
batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:]
with torch.inference_mode():
    logits = model(**batch).logits[:, :-1]
scores = score(logits, labels, list(ADAPTORS.values()))  # logprobs: (B, T, 6)

counted = labels != -100
print(f"{'adaptor':15} allowed  log-probability a token of what is allowed")
for name, logprobs in zip(ADAPTORS, scores.logprobs.unbind(-1), strict=True):
    allowed = counted & logprobs.isfinite()
    share = allowed.sum() / counted.sum()
    print(f"{name:15} {share:7.0%}  {logprobs[allowed].mean():.2f} nats")
