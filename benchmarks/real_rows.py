"""Rows of logits of the demo's model."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fastadapt._cli.demo import PROMPTS
from fastadapt._cli.measure import encode_prompts
from fastadapt.training.pretrained import ModelNotFoundError, load_model, no_progress


def find_real_rows(options: argparse.Namespace, notes: list[str]) -> Tensor | None:
    """Logits of the demo's model while it answers the demo's prompts, if they are asked for.

    Returns:
        (M, W), float32: the rows that M tokens were sampled from. Where the model is not installed
        a note says so, and the kind "real" is taken out of the options.
    """
    if "real" not in options.rows:
        return None
    try:
        model, tokenizer = load_model(None, fetch=True, progress=no_progress)
    except ModelNotFoundError as error:
        notes.append(f"no rows 'real': {error}")
        options.rows.remove("real")
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        answers = model.generate(
            **encode_prompts(tokenizer, PROMPTS),
            do_sample=True,
            top_k=0,
            max_new_tokens=32,
            pad_token_id=0,
            eos_token_id=model.get_output_embeddings().weight.shape[0],  # never: nothing stops
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.cat(answers.logits).float()
