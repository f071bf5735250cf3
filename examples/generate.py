"""transformers' `generate` with filters and draw fused; seeds make each sequence repeatable.

python examples/generate.py [MODEL]
"""

import sys

import fastadapt.hf
from fastadapt.training.pretrained import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None, fetch=True)
inputs = tokenizer(["The capital of France is"] * 3, return_tensors="pt")
tokens = model.generate(
    **inputs,
    do_sample=True,
    temperature=0.8,
    top_p=0.9,
    max_new_tokens=16,
    custom_generate=fastadapt.hf.generate,
    seeds=[1, 2, 3],
)
for text in tokenizer.batch_decode(tokens, skip_special_tokens=True):
    print(text)
