"""REINFORCE on exactly what top-p sampled: rollouts, supports, log-odds on them, one update.

python examples/train_on_supports.py [MODEL]
"""

import sys

import torch

import fastadapt.hf
from fastadapt import Responses, Support, linear_support_log_odds, reinforce_loss
from fastadapt.training.pretrained import load_model

PROMPTS = ["A list of colours:", "A list of animals:"]
GENERATIONS, TOKENS, TEMPERATURE = 4, 12, 0.8

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None, fetch=True)
tokenizer.padding_side = "left"
prompts = tokenizer(PROMPTS, return_tensors="pt", padding=True)
first = prompts["input_ids"].shape[1]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

for step in range(2):
    model.eval()
    rollout = model.generate(
        **prompts,
        custom_generate=fastadapt.hf.generate,
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=0.9,
        top_k=0,
        max_new_tokens=TOKENS,
        num_return_sequences=GENERATIONS,
        return_dict_in_generate=True,
        output_logprobs=True,
        output_supports=True,
    )
    texts = tokenizer.batch_decode(rollout.sequences[:, first:], skip_special_tokens=True)
    rewards = torch.tensor([float(text.count(",")) for text in texts])  # a list has commas
    of_prompts = rewards.view(-1, GENERATIONS)
    advantages = (of_prompts - of_prompts.mean(1, keepdim=True)).flatten()

    model.train()
    mask = prompts["attention_mask"].repeat_interleave(GENERATIONS, 0)
    mask = torch.cat([mask, torch.ones_like(rollout.sequences[:, first:])], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    states = model.base_model(rollout.sequences, attention_mask=mask, position_ids=places)
    hidden = states.last_hidden_state[:, first - 1 : -1]
    # a row for each token until its sequence ends
    lengths = torch.tensor([len(support) for support in rollout.supports])
    used = torch.arange(hidden.shape[1]) < lengths[:, None]
    labels = rollout.sequences[:, first:].masked_fill(~used, -100)
    log_odds = torch.zeros(labels.shape)
    log_odds[used] = linear_support_log_odds(
        hidden[used],
        model.get_output_embeddings().weight,
        labels[used],
        Support.cat(rollout.supports),
        logit_scale=1 / TEMPERATURE,
    )
    loss, metrics = reinforce_loss(
        Responses.from_labels(log_odds, labels), advantages, rollout.logprobs
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: reward {rewards.mean():.2f}, loss {loss:.4f}, {len(labels[used])} tokens")
