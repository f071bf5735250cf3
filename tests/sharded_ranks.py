"""One rank of tests/test_sharded.py: every case beside the same in a single process.

    python -P tests/sharded_ranks.py RANK RANKS STORE CASES

STORE is a file by which the ranks find each other. Says how many rows held.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastadapt import Adaptor, reference, sample, score

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from sharded_cases import made, unlike  # noqa: E402


def main(rank: int, ranks: int, store: str, cases: int) -> None:
    """Runs the cases; asserts."""
    wait = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=wait
    )
    group: Any = dist.group.WORLD
    rows = 0
    for seed in range(cases):
        case = made(10**6 * ranks + seed, ranks)
        drawn = case.sampled(case.logits)
        assert unlike(drawn, case.sampled(case.slice(rank), group=group)) == [], case.name
        tokens = case.tokens(drawn)
        scored = case.scored(case.logits, tokens)
        assert unlike(scored, case.scored(case.slice(rank), tokens, group=group)) == [], case.name
        rows += len(case.logits)
    reference_gathers(rank, ranks, group)
    if ranks == 2:
        a_model_draws_from_its_slices(rank, group)
    shapes_and_seeds(rank, ranks, group)
    errors_are_everyones(rank, group)
    dist.destroy_process_group()
    sys.stdout.write(f"held: {rows}\n")


def reference_gathers(rank: int, ranks: int, group: Any) -> None:
    """The reference takes slices too."""
    case = made(5, ranks)
    mine = case.slice(rank)
    options = {**case.options, **case.edits, "group": group}
    got = reference.sample(mine, case.adaptor, **options)
    assert unlike(case.sampled(case.logits), got) == []
    tokens = case.tokens(got)
    wanted = {"support": case.options["support"], **case.edits}
    got = reference.score(mine, tokens, case.adaptors, **wanted, group=group)
    assert unlike(case.scored(case.logits, tokens), got) == []


def shapes_and_seeds(rank: int, ranks: int, group: Any) -> None:
    """Rows of any shape; without seeds those of the first rank; a group of its own."""
    torch.manual_seed(7)
    logits = torch.randn(2, 3, 40 * ranks)
    mine = logits.chunk(ranks, -1)[rank]
    torch.manual_seed(100 + rank)
    drawn = sample(mine, Adaptor(top_p=0.9), group=group)
    torch.manual_seed(100)
    assert unlike(sample(logits, Adaptor(top_p=0.9)), drawn) == []
    assert drawn.tokens.shape == (2, 3)
    assert score(mine, drawn.tokens, [Adaptor()], group=group).logprobs.shape == (2, 3, 1)
    mesh = DeviceMesh("cpu", list(range(ranks)))
    split = distribute_tensor(torch.arange(2.0 * 11).view(2, 11).sin(), mesh, [Shard(1)])
    whole = split.full_tensor()
    seeds = torch.arange(2)
    drawn = sample(split.to_local(), Adaptor(), seeds=seeds, group=mesh.get_group())
    assert unlike(sample(whole, Adaptor(), seeds=seeds), drawn) == []
    pairs = [dist.new_group([i, i + 1]) for i in range(0, ranks, 2)]
    pair = rank // 2
    ours = logits.chunk(2, -1)[rank % 2]
    seeds = torch.full((2, 3), pair)
    drawn = sample(ours, Adaptor(top_k=5), seeds=seeds, group=pairs[pair])
    assert unlike(sample(logits, Adaptor(top_k=5), seeds=seeds), drawn) == []
    if ranks == 4:  # of a group that this rank is not in torch makes a number
        other = pairs[1 - pair]
        raises(TypeError, "a ProcessGroup", lambda: sample(ours, Adaptor(), group=other))


def a_model_draws_from_its_slices(rank: int, group: Any) -> None:
    """`generate` of a model whose head is split: the tokens of the whole one."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        from fastadapt.hf import FusedLogitsWarper, generate
    except ImportError:
        return
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=301, **sizes)).eval()
    model.lm_head.weight.data *= 60
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 7, "do_sample": True}
    draws: list[dict[str, Any]] = [
        {"top_p": 0.9, "seeds": [3, 4]},
        {"top_k": 0, "typical_p": 0.9, "temperature": 1.5, "seeds": [5, 6]},
        FusedLogitsWarper(Adaptor(temperature=0.0)).generate_kwargs(),
    ]
    calls = [{**options, **draw} for draw in draws]
    telling = {"return_dict_in_generate": True, "output_supports": True}
    expected = [model.generate(prompt, custom_generate=generate, **c, **telling) for c in calls]
    ends = [0, 120, 301]
    weight = model.lm_head.weight.data[ends[rank] : ends[rank + 1]]
    model.lm_head = torch.nn.Linear(32, len(weight), bias=False)
    model.lm_head.weight.data = weight
    split = generate.using(group=group)
    for call, wanted in zip(calls, expected, strict=True):
        made = model.generate(prompt, custom_generate=split, **call, **telling)
        assert torch.equal(made.sequences, wanted.sequences) and made.supports == wanted.supports
    refused: dict[str, dict[str, Any]] = {
        "logits_processor: .* got RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.2},
        "output_scores": {"output_scores": True, "return_dict_in_generate": True},
        "output_logprobs": {"output_logprobs": True, "return_dict_in_generate": True},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
        "do_sample": {"do_sample": False},
    }
    for message, more in refused.items():
        rows = prompt[:1] if "prompt_lookup_num_tokens" in more else prompt
        call = {**options, **more, "custom_generate": split}
        raises(NotImplementedError, message, lambda r=rows, c=call: model.generate(r, **c))


def errors_are_everyones(rank: int, group: Any) -> None:
    """What one rank does wrong all ranks hear of, and none waits for ever."""
    rows, seeds = torch.randn(3, 8), torch.arange(3)

    def drawn(x: Any, adaptor: Any, **options: Any) -> None:
        sample(x, adaptor, **{"seeds": seeds[: len(x)], "group": group, **options})

    first = rank == 0
    raises(
        ValueError,
        "as many rows on all ranks",
        lambda: drawn(rows[: 3 - first], Adaptor(), seeds=seeds[: 3 - first]),
    )
    raises(
        TypeError if first else RuntimeError,
        "expected an Adaptor" if first else r"an error on \[0\]",
        lambda: drawn(rows, "greedy" if first else Adaptor()),
    )
    raises(ValueError, "same adaptor, seeds", lambda: drawn(rows, Adaptor(top_p=0.5 + first / 8)))
    raises(ValueError, "same adaptor, seeds", lambda: drawn(rows, Adaptor(), seeds=seeds + rank))
    raises(ValueError, "same adaptor, seeds", lambda: drawn(rows, Adaptor(), log_mass=first))
    raises(ValueError, "num_tokens: expected 1 to", lambda: drawn(rows, Adaptor(), num_tokens=1000))
    raises(
        ValueError, "top_logprobs: expected 0 to", lambda: drawn(rows, Adaptor(), top_logprobs=999)
    )
    raises(ValueError, "tokens of all ranks, got 0", lambda: drawn(rows[:, :0], Adaptor()))
    wrong = torch.tensor([0, 1, 10**6])
    raises(ValueError, "tokens: expected", lambda: score(rows, wrong, [Adaptor()], group=group))
    assert sample(rows[:0], Adaptor(), seeds=seeds[:0], group=group).tokens.shape == (0,)


def raises(kind: type[Exception], message: str, call: Any) -> None:
    """Asserts that a call raises."""
    import re

    try:
        call()
    except kind as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"expected {kind.__name__}: {message}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
