"""Rows of logits of the demo's model."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt._cli.demo import PROMPTS
from fastadapt._cli.measure import encode_prompts
from fastadapt.training.pretrained import ModelNotFoundError, load_model


def real_logits(*, seed: int, length: int = 32) -> Tensor | str:
    """Logits of the demo's model while it answers the demo's prompts.

    Returns:
        (M, W), float32: the rows that M tokens were sampled from; or, where the model is not
        installed, the reason in words.
    """
    try:
        model, tokenizer = load_model(None, fetch=True, progress=lambda phase, done, total: None)
    except ModelNotFoundError as error:
        return str(error)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        answers = model.generate(
            **encode_prompts(tokenizer, PROMPTS),
            do_sample=True,
            top_k=0,
            max_new_tokens=length,
            pad_token_id=0,
            eos_token_id=model.get_output_embeddings().weight.shape[0],  # never: nothing stops
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.cat(answers.logits).float()
