"""What `test_distributed.py` runs on one process and, through torchrun, on two.

    torchrun --nproc-per-node 2 tests/train_in_parallel.py FOLDER MODEL

writes FOLDER/parallel.json: the curves of all ways of training, from the first process.
"""

import json
import os
import random
import sys
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaForCausalLM, TrainingArguments
from trl import DPOConfig, KTOConfig

from fastadapt.hf.trainer import LogitsFreeTrainer
from fastadapt.losses import Responses, RewardPenalizeLoss, mle_loss
from fastadapt.tracking import RewardPenalizeTracker
from fastadapt.training import forward_log_odds
from fastadapt.training.pairs import IGNORED
from fastadapt.trl import RewardPenalizeTrainer, UnpairedRewardPenalizeTrainer

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out
from gloo_means import times_too_large  # noqa: E402

VOCABULARY = 19  # of the model
BATCH = 4  # of all processes together
STEPS = 4


def make_pairs(count: int) -> list[dict[str, str]]:
    """Pairs of different lengths."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 9)))

    keys = ("prompt", "chosen", "rejected")
    return [{key: text() for key in keys} for _ in range(count)]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A padded batch of sequences."""
    ids = [row["ids"] for row in rows]
    tokens = pad_sequence(ids, batch_first=True)
    labels = pad_sequence(ids, batch_first=True, padding_value=IGNORED)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": labels}


def settings(folder: Path, size: int) -> dict[str, object]:
    """Arguments of both trainers."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if dist.is_torchelastic_launched() else None,
        "bf16": False,
        "remove_unused_columns": False,
    }


def curve(trainer, names: tuple[str, ...]) -> list[dict[str, float]]:
    """What a trainer logs of each step."""
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [{name: entry[name] for name in names} for entry in log]


def adapted(model: LlamaForCausalLM) -> torch.nn.Module:
    """The model with LoRA on its head and in its body."""
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))


def train_pairs(
    folder: Path, model: str, size: int, adapters: bool = False
) -> list[dict[str, float]]:
    """DPO with ExMATE by `RewardPenalizeTrainer`, two micro-batches a step."""
    arguments = settings(folder, size // 2) | {"gradient_accumulation_steps": 2}
    policy = LlamaForCausalLM.from_pretrained(model)
    trainer = RewardPenalizeTrainer(
        adapted(policy) if adapters else policy,
        None if adapters else LlamaForCausalLM.from_pretrained(model),
        DPOConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(make_pairs(STEPS * BATCH)),
        processing_class=AutoTokenizer.from_pretrained(model),
        loss={"dpo": 1.0, "exmate": 0.5},
    )
    return curve(trainer, ("loss", "grad_norm", "logps/chosen", "entropy", "num_tokens"))


def train_negatives(folder: Path, model: str, size: int) -> list[dict[str, float]]:
    """Mistakes of the chosen rows as negatives, with a tracker, two micro-batches a step."""
    tracker = RewardPenalizeTracker(interval=1)
    trainer = RewardPenalizeTrainer(
        LlamaForCausalLM.from_pretrained(model),
        args=DPOConfig(**settings(folder, size // 2), gradient_accumulation_steps=2),
        train_dataset=datasets.Dataset.from_list(make_pairs(STEPS * BATCH)),
        processing_class=AutoTokenizer.from_pretrained(model),
        loss={"mle": 1.0, "candidate_unlikelihood_penalty": 0.5, "exmate_penalty": 0.5},
        negatives="top_k",
        negative_options={"k": 2},
        tracker=tracker,
    )
    found = curve(trainer, ("loss", "grad_norm", "negatives/per_token"))
    steps = [row["step"] for row in tracker.records]
    assert steps == list(range(STEPS)) and tracker.records[0]["rho/pairs"] == size // 2
    return found


def train_pairs_otherwise(folder: Path, model: str, size: int) -> list[dict[str, float]]:
    """ORPO with the likelihood of prompts, BCO and smoothed labels, packed, two micro-batches."""
    arguments = settings(folder, size // 2) | {"gradient_accumulation_steps": 2}
    trainer = RewardPenalizeTrainer(
        LlamaForCausalLM.from_pretrained(model),
        LlamaForCausalLM.from_pretrained(model),
        DPOConfig(**arguments, padding_free=True),
        train_dataset=datasets.Dataset.from_list(make_pairs(STEPS * BATCH)),
        processing_class=AutoTokenizer.from_pretrained(model),
        loss={"orpo": 1.0, "bco": 1.0, "smoothed_mle": 0.5},
        nll_on_prompt=True,
    )
    return curve(trainer, ("loss", "grad_norm", "rewards/shift", "logps/chosen", "num_tokens"))


def train_singles(folder: Path, model: str, size: int) -> list[dict[str, float]]:
    """Single responses, of which a process may have those of one side alone in a micro-batch."""
    arguments = settings(folder, size // 2) | {"gradient_accumulation_steps": 2}
    labels = random.Random(1)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": labels.random() < 2 / 3}
        for row in make_pairs(STEPS * BATCH)
    ]
    trainer = UnpairedRewardPenalizeTrainer(
        LlamaForCausalLM.from_pretrained(model),
        LlamaForCausalLM.from_pretrained(model),
        KTOConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        loss={"apo_zero_unpaired": 1.0, "bco": 1.0, "mle": 0.5, "exmate_penalty": 0.5},
    )
    return curve(trainer, ("loss", "grad_norm", "rewards/shift", "logps/chosen", "num_tokens"))


def train_texts(folder: Path, model: str, size: int) -> list[dict[str, float]]:
    """MLE by `LogitsFreeTrainer`."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 12, (STEPS * BATCH,), generator=generator).tolist()
    rows = [{"ids": torch.randint(3, VOCABULARY, (n,), generator=generator)} for n in lengths]
    trainer = LogitsFreeTrainer(
        LlamaForCausalLM.from_pretrained(model),
        TrainingArguments(**settings(folder, size)),
        train_dataset=rows,
        data_collator=collate,
    )
    return curve(trainer, ("loss", "grad_norm"))


def train_sharded(folder: str, rank: int, world: int, head: str = "") -> list[float]:
    """ExMATE on log-odds out of the forward, parameters sharded (FSDP2) where there are ranks.

    A head that is "trained" or "frozen" has a group of its own and is resharded after its forward;
    one that is "adapted" has LoRA and belongs to the model's group.
    """
    causal, factor = LlamaForCausalLM.from_pretrained(folder), 1.0
    model, head = (adapted(causal), "") if head == "adapted" else (causal, head)
    if head:
        weight = model.lm_head.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=head == "trained")
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        factor = times_too_large(mesh)
        for layer in causal.model.layers:
            fully_shard(layer, mesh=mesh)
        if head:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1 / factor)
    objective = RewardPenalizeLoss({"exmate": 1.0})
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(3, VOCABULARY, (2, BATCH, 10), generator=generator)
        own = tokens[:, rank::world].flatten(0, 1)
        labels = torch.nn.functional.pad(own[:, 1:], (0, 1), value=IGNORED)
        log_odds = forward_log_odds(model, {"input_ids": own}, labels)[:, :-1]
        assert not head or world == 1 or isinstance(model.lm_head.weight, DTensor), "not resharded"
        mask = torch.ones_like(log_odds, dtype=torch.bool)
        chosen, rejected = (
            Responses(m, k) for m, k in zip(log_odds.chunk(2), mask.chunk(2), strict=True)
        )
        loss, _ = objective(chosen, rejected)
        optimizer.zero_grad()
        loss.backward()  # sharded: gradients are means over the ranks, as is the loss
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    layer = causal.lm_head
    weight = (layer.lora_B["default"] if hasattr(layer, "lora_B") else layer).weight.detach()
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return [*losses, float(weight.norm())]


def refuse_split_adapters(folder: str, world: int) -> None:
    """LoRA on a head with a group of its own, or split by vocabulary, is named."""
    if world == 1:
        return
    mesh = init_device_mesh("cpu", (world,))
    models = [adapted(LlamaForCausalLM.from_pretrained(folder)) for _ in range(2)]
    fully_shard(models[0].get_base_model().lm_head, mesh=mesh)
    base = models[1].get_base_model().lm_head.base_layer
    part = distribute_tensor(base.weight.detach(), mesh, [Shard(0)])
    base.weight = torch.nn.Parameter(part, requires_grad=False)
    tokens = torch.ones(1, 3, dtype=torch.long)
    expected = ("that is not gathered for its own forward alone", "that is whole, got one split")
    for model, message in zip(models, expected, strict=True):
        with pytest.raises(ValueError, match=f"a head with LoRA {message}"):
            forward_log_odds(model, {"input_ids": tokens}, tokens)


def train_split_head(folder: str, world: int) -> list[float]:
    """The same on log-odds of a head that is split by vocabulary where there are ranks."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        part = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(part)
    body = torch.optim.SGD(model.model.parameters(), lr=0.1)
    head = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(3, VOCABULARY, (BATCH, 10), generator=generator)
        labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        log_odds = forward_log_odds(model, {"input_ids": tokens}, labels)[:, :-1]
        loss = mle_loss(Responses(log_odds, torch.ones_like(log_odds, dtype=torch.bool)))
        for optimizer in (body, head):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (body, head):
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def everything(folder: Path, model: str, rank: int = 0, world: int = 1) -> dict[str, object]:
    """The curves of all ways of training."""
    size = BATCH // world
    refuse_split_adapters(model, world)
    return {
        "pairs": train_pairs(folder, model, size),
        "pairs with LoRA on the head": train_pairs(folder, model, size, adapters=True),
        "negatives": train_negatives(folder, model, size),
        "pairs, other losses": train_pairs_otherwise(folder, model, size),
        "single responses": train_singles(folder, model, size),
        "texts": train_texts(folder, model, size),
        "sharded": train_sharded(model, rank, world),
        "trained head alone": train_sharded(model, rank, world, "trained"),
        "frozen head alone": train_sharded(model, rank, world, "frozen"),
        "LoRA on the head": train_sharded(model, rank, world, "adapted"),
        "split head": train_split_head(model, world),
    }


if __name__ == "__main__":
    place, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    target = Path(sys.argv[1])
    seen = everything(target, sys.argv[2], place, count)
    if place == 0:
        (target / "parallel.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
