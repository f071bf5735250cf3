"""A vLLM engine on a tiny model, whose requests are recorded; what a test compares is in a folder.

    python tests/vllm_engine.py FOLDER

Run by tests/test_vllm_engine.py in a process of its own. vLLM's engine and its worker are two more
processes, as in use.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

from fastadapt.vllm import FusedSampler

V = 512
# enough for a few of the requests: others of the batch are preempted
BLOCKS, BLOCK = 10, 32
KNOBS: list[dict[str, Any]] = [
    {"top_p": 0.8}, {"top_k": 7, "temperature": 0.7}, {"min_p": 0.1, "order": "hf"},
    {"typical_p": 0.6}, {}, {"top_p": 0.95, "order": ["top_p", "temperature"], "temperature": 1.3},
    {"temperature": 0}, {"top_p": 0.9, "bias_ids": [3, 9], "bias_values": [2.5, -3.0]},
]  # fmt: skip


class Seen(FusedSampler):  # type: ignore[misc]  # Any without vLLM
    """Keeps the logits of each row that is recorded, as the engine gave them."""

    def __init__(self, config: Any, where: Any, is_pin_memory: bool | None = None) -> None:
        super().__init__(config, where, is_pin_memory)
        self.folder = Path(config.additional_config["seen"])
        self.steps = 0

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        rows = {
            (row.request.support_id, len(row.output)): logits[at].clone()
            for at, row in self._runner.rows.items()
            if row.sheet is not None
        }
        if rows:
            self.steps += 1
            torch.save(rows, self.folder / f"{self.steps:06}.pt")
        return super().apply(logits, ctx)


def tiny(folder: Path) -> None:
    """Saves a model of random numbers, whose logits are not flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)


def main(folder: Path) -> None:
    """Generates for requests that name themselves, among others, and writes what came."""
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    tiny(folder / "model")
    (folder / "seen").mkdir()
    llm = LLM(
        str(folder / "model"),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=32,  # so that prompts are read in parts
        num_gpu_blocks_override=BLOCKS,
        block_size=BLOCK,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        logits_processors=["vllm_engine:Seen"],
        additional_config={
            "fastadapt_support_folder": str(folder / "records"),
            "seen": str(folder / "seen"),
        },
    )
    rng = random.Random(0)
    asked: list[tuple[list[int], dict[str, Any]]] = []
    for number in range(40):
        knobs = {f"fastadapt_{name}": x for name, x in KNOBS[number % len(KNOBS)].items()}
        knobs["fastadapt_seed"] = number
        if number % 5:  # others are drawn in the same batch
            knobs["fastadapt_support_id"] = f"request {number}"
        params: dict[str, Any] = {
            "max_tokens": rng.randint(1, 70), "detokenize": False, "extra_args": knobs,
            "stop_token_ids": [5, 6, 7],
        }  # fmt: skip
        if number % 3 == 0:
            params["repetition_penalty"] = 1.0 if "fastadapt_bias_ids" in knobs else 1.3
        if number % 4 == 0:
            params |= {
                "ignore_eos": True,
                "min_tokens": min(4, params["max_tokens"]),
            }  # bans the stop tokens until then
        asked.append(([rng.randrange(V) for _ in range(rng.randint(1, 50))], params))
    refused = ""
    try:
        several = {"fastadapt_support_id": "several"}
        params = SamplingParams(n=2, extra_args=several, detokenize=False)
        llm.generate([{"prompt_token_ids": [1]}], params, use_tqdm=False)
    except VLLMValidationError as error:
        refused = str(error)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    given = [SamplingParams(**params) for _, params in asked]
    outputs = llm.generate(prompts, given, use_tqdm=False)
    told = [
        {"prompt": prompt, "params": params, "tokens": list(output.outputs[0].token_ids)}
        for (prompt, params), output in zip(asked, outputs, strict=True)
    ]
    # a batch of one set of parameters: all of one id, which is a mistake
    same = SamplingParams(
        max_tokens=8, detokenize=False, extra_args={"fastadapt_support_id": "same"}
    )
    twice = llm.generate(prompts[:3], same, use_tqdm=False)
    found = {
        "requests": told,
        "refused": refused,
        "same": [list(output.outputs[0].token_ids) for output in twice],
        "process": os.getpid(),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
