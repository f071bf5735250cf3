"""A decoding loop of your own: one forward a token with a KV cache, one `sample` for all rows.

A repetition penalty and a ban of repeated trigrams come from a `History`.

python examples/plain_loop.py [MODEL]
"""

import sys

import torch

from fastadapt import Adaptor, History, sample
from fastadapt.training.pretrained import load_model

PROMPTS = ["The three primary colours are", "Once upon a time there was"]
ADAPTOR = Adaptor(temperature=torch.tensor([0.7, 1.0]), top_p=0.9)  # a temperature a row
LENGTH = 20

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None, fetch=True)
batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)  # on the left
tokens, mask, cache = batch.input_ids, batch.attention_mask, None
seeds = torch.tensor([1, 2])  # a stream for each sequence, whatever else is in the batch
history = History(tokens, start=(mask == 0).sum(1))

with torch.inference_mode():
    for step in range(LENGTH):
        new = tokens if cache is None else tokens[:, -1:]
        out = model(new, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        drawn = sample(
            out.logits[:, -1],
            ADAPTOR,
            seeds=seeds,
            positions=torch.full_like(seeds, step),
            edits=history.edits(repetition=1.1) + history.ban_ngrams(3),
        )
        history.append(drawn.tokens)
        tokens = torch.cat([tokens, drawn.tokens[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(drawn.tokens)[:, None]], dim=1)

for text in tokenizer.batch_decode(tokens, skip_special_tokens=True):
    print(text)
