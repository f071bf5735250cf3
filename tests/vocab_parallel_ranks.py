"""One rank of tests/test_vocab_parallel.py: every case beside the same in a single process.

    python -P tests/vocab_parallel_ranks.py RANK RANKS STORE [DEVICE]

STORE is a file by which the ranks find each other; DEVICE is cpu, with gloo, or cuda, a GPU a rank,
with NCCL. Says which cases held.
"""

import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastadapt
from fastadapt import linear_log_odds, reference

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out
from gloo_means import times_too_large  # noqa: E402

V, H, N = 4603, 24, 11
SPLITS = {2: [[1200, 3403], [4602, 1]], 4: [[1, 2301, 0, 2301], [1200, 1103, 200, 2100]]}
PLANS = {
    "recompute": {"memory_budget": 0},
    "kept": {"memory_budget": 1 << 30},
    "half_kept": {"memory_budget": N * 2100 * 2},
    "frozen": {},
    "no_grad": {},
    "candidates": {"memory_budget": 0},
    "frozen candidates": {},
}
SHAPES = {"plain": {}, "capped": {"softcap": 5.0, "logit_scale": 1.5}}
OUTPUTS = {  # of each plan
    "frozen": ("logsumexp", "hit"),
    "candidates": ("set_log_odds", "entropy"),
    "frozen candidates": ("set_log_odds", "logsumexp"),
}
ALL_OUTPUTS = ("entropy", "logsumexp", "sum_of_squares", "hit")
# Of float32: sums over other tiles, in another order; log-odds are a few nats.
CLOSE = {torch.float64: (1e-11, 1e-12), torch.float32: (1e-5, 3e-6), torch.bfloat16: (1e-5, 3e-6)}

Head = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Results = dict[str, Tensor]


def head(dtype: torch.dtype) -> Head:
    """hidden, weight, labels, bias and upstream gradients, the same on every rank."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H) * 2 / H**0.5, torch.randn(V)
    labels = torch.randint(V, (N,))
    labels[[2, 7]], labels[3], labels[4] = -100, 0, V - 1
    upstream = torch.randn(N)
    upstream[5] = 0.0
    return hidden.to(dtype), weight.to(dtype), labels, bias.to(dtype), upstream


def results(package: Any, inputs: Head, plan: str, **options: object) -> Results:
    """Log-odds, extra outputs and the gradients that the plan has, of all of them together."""
    hidden, weight, labels, bias, upstream = (x.clone() for x in inputs)
    leaves = {"dhidden": hidden, "dweight": weight, "dbias": bias}
    if plan == "no_grad":
        leaves = {}
    elif plan.startswith("frozen"):
        leaves = {"dhidden": hidden}
    for leaf in leaves.values():
        leaf.requires_grad_()
    names = OUTPUTS.get(plan, ALL_OUTPUTS)
    if plan.endswith("candidates"):
        index = torch.stack([labels, labels.roll(1), labels, labels.roll(3)], 1)
        rows = hidden, weight, index, index >= 0, bias
        found = package.linear_candidate_log_odds(*rows, outputs=names, **options)
    else:
        found = package.linear_log_odds(hidden, weight, labels, bias, outputs=names, **options)
    out = dict(zip(("log_odds", *names), found, strict=True))
    if leaves:
        gradients = torch.autograd.grad(total(found, upstream), list(leaves.values()))
        out |= dict(zip(leaves, gradients, strict=True))
    return {name: x.detach() for name, x in out.items()}


def total(found: Iterable[Tensor], upstream: Tensor) -> Tensor:
    """A loss of all results that are numbers."""
    numbers = [x.reshape(N, -1).sum(1).double() for x in found if x.is_floating_point()]
    return torch.stack(numbers).sum(0) @ upstream.double()


def own(inputs: Head, split: list[int]) -> tuple[Head, slice]:
    """The inputs with this rank's slice of the head."""
    hidden, weight, labels, bias, upstream = inputs
    first = sum(split[: dist.get_rank()])
    part = slice(first, first + split[dist.get_rank()])
    return (hidden, weight[part].clone(), labels, bias[part].clone(), upstream), part


def assert_same_everywhere(x: Tensor) -> None:
    """To the last bit."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    assert all(torch.equal(part, x) for part in parts)


def error(x: Tensor, truth: Tensor) -> float:
    """Relative, of all entries."""
    return float((x.double() - truth).norm() / truth.norm())


@functools.cache
def of_one_process(plan: str, shape: str, dtype: torch.dtype) -> tuple[Results, Results]:
    """Results of the whole head, and their reference in float64."""
    inputs, options = head(dtype), {**PLANS[plan], **SHAPES[shape]}
    double = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return (
        results(fastadapt, inputs, plan, **options),
        results(reference, double, plan, **options),
    )


def assert_whole(split: list[int], plan: str, shape: str, dtype: torch.dtype) -> None:
    """The slices' results are those of the whole head."""
    local, part = own(head(dtype), split)
    options = {**PLANS[plan], **SHAPES[shape]}
    group = dist.group.WORLD
    ours = results(fastadapt, local, plan, group=group, **options)
    again = results(fastadapt, local, plan, group=group, **options)
    whole, truth = of_one_process(plan, shape, dtype)
    assert ours.keys() == whole.keys()
    for name, got in ours.items():
        expected, exact = whole[name], truth[name]
        if name in ("dweight", "dbias"):
            expected, exact = expected[part], exact[part]
        else:
            assert_same_everywhere(got)
        assert torch.equal(got, again[name])
        assert got.dtype == expected.dtype
        if got.dtype == torch.bfloat16:  # tiles begin elsewhere, and each is rounded once
            assert error(got, exact) <= 1.1 * error(expected, exact) + 1e-6 or got.numel() < 99
            torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-7)
        else:
            rtol, atol = CLOSE[dtype]
            torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    if "dhidden" in ours:
        nothing = [5] if plan.endswith("candidates") else [2, 5, 7]
        assert not ours["dhidden"][nothing].any()


def adapter(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of rank 3, the same on every rank."""
    torch.manual_seed(1)
    a, b = torch.randn(3, H) / H**0.5, torch.randn(V, 3)
    return a.to(dtype), b.to(dtype)


def adapters(split: list[int]) -> None:
    """B is split like the weight; the gradients of A and of the hidden states are whole ones."""
    frozen, trained, whole = ("hidden",), ("hidden", "a", "b"), ("hidden", "weight", "a", "b")
    for dtype, outputs, wanted in (
        (torch.float64, ("logsumexp", "hit"), frozen),
        (torch.float64, ALL_OUTPUTS, trained),
        (torch.float64, ALL_OUTPUTS, whole),
        (torch.float64, (), ("hidden", "a")),
        (torch.float32, (), trained),
        (torch.bfloat16, (), trained),  # beside a float32 adapter
    ):
        hidden, weight, labels, bias, upstream = head(dtype)
        a, b = adapter(torch.promote_types(dtype, torch.float32))
        (_, mine, _, my_bias, _), part = own((hidden, weight, labels, bias, upstream), split)
        found = []
        for slices in ((weight, bias, b, None), (mine, my_bias, b[part], dist.group.WORLD)):
            tensors = {"hidden": hidden, "weight": slices[0], "a": a, "b": slices[2]}
            leaves = {k: x.clone().requires_grad_(k in wanted) for k, x in tensors.items()}
            given = leaves["hidden"], leaves["weight"], labels, slices[1]
            options = {"lora": (leaves["a"], leaves["b"], 0.7), "softcap": 5.0, "outputs": outputs}
            made = linear_log_odds(*given, **options, group=slices[3])
            made = made if isinstance(made, tuple) else (made,)
            gradients = torch.autograd.grad(total(made, upstream), [leaves[k] for k in wanted])
            found.append(
                ({str(i): x for i, x in enumerate(made)}, dict(zip(wanted, gradients, strict=True)))
            )
        rtol, atol = CLOSE[dtype] if dtype != torch.bfloat16 else (2**-6, 2**-7)
        (outs, expected), (our_outs, ours) = found
        for name, got in {**our_outs, **ours}.items():
            whole_one = {**outs, **expected}[name]
            if name in ("weight", "b"):
                whole_one = whole_one[part]
            else:
                assert_same_everywhere(got.detach())
            torch.testing.assert_close(got, whole_one, rtol=rtol, atol=atol)
    a, b = adapter(torch.float32)
    hidden, mine, labels, *_ = own(head(torch.float32), split)[0]
    import pytest

    with pytest.raises(ValueError, match=rf"lora.1.: expected shape .{len(mine)}, 3., got"):
        linear_log_odds(hidden, mine, labels, group=dist.group.WORLD, lora=(a, b, 1.0))


def reference_has_the_same_results(split: list[int]) -> None:
    """The reference with a group."""
    inputs = head(torch.float64)
    local, _ = own(inputs, split)
    for plan in ("recompute", "frozen", "candidates"):
        ours, expected = (
            results(f, local, plan, group=dist.group.WORLD) for f in (fastadapt, reference)
        )
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-11, atol=1e-12)


def dtensor_heads() -> None:
    """Shard(0) over a mesh, also with replicated hidden states; their gradients are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),))
    hidden, weight, labels, bias, upstream = head(torch.float32)
    whole = results(fastadapt, (hidden, weight, labels, bias, upstream), "recompute")
    for replicated in (False, True):
        leaves = [
            distribute_tensor(hidden, mesh, [Replicate()]) if replicated else hidden.clone(),
            torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])),
            torch.nn.Parameter(distribute_tensor(bias, mesh, [Shard(0)])),
        ]
        leaves[0].requires_grad_()
        ids = distribute_tensor(labels, mesh, [Replicate()]) if replicated else labels
        found = linear_log_odds(leaves[0], leaves[1], ids, leaves[2], outputs=ALL_OUTPUTS)
        total(found, upstream).backward()
        log_odds = found[0]
        assert type(log_odds) is Tensor
        torch.testing.assert_close(log_odds.detach(), whole["log_odds"], rtol=1e-5, atol=3e-6)
        for leaf, name in zip(leaves, ("dhidden", "dweight", "dbias"), strict=True):
            got = leaf.grad
            if isinstance(leaf, DTensor):
                assert isinstance(got, DTensor)
                assert got.placements == leaf.placements
                got = got.full_tensor()
            torch.testing.assert_close(got, whole[name], rtol=1e-5, atol=3e-6)
    wrong = distribute_tensor(weight, mesh, [Replicate()])
    assert_raises(ValueError, "weight: expected a DTensor placed as .Shard.0.,.", hidden, wrong)
    sharded = distribute_tensor(hidden, mesh, [Shard(1)])
    right = distribute_tensor(weight, mesh, [Shard(0)])
    assert_raises(ValueError, "hidden: expected a DTensor placed as .Replicate", sharded, right)
    ranks = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert_raises(ValueError, "group: expected that of the weight's mesh", hidden, right, ranks)


def dtensor_adapters() -> None:
    """A is replicated, B placed like the weight; their gradients too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),))
    hidden, weight, labels, _, upstream = head(torch.float64)
    plain = [x.requires_grad_() for x in adapter(torch.float64)]
    split = [
        torch.nn.Parameter(distribute_tensor(x.detach(), mesh, [placement]))
        for x, placement in zip(plain, (Replicate(), Shard(0)), strict=True)
    ]
    found = []
    for matrix, (a, b) in ((weight, plain), (distribute_tensor(weight, mesh, [Shard(0)]), split)):
        log_odds = linear_log_odds(hidden, matrix, labels, lora=(a, b, 0.7))
        (log_odds @ upstream.double()).backward()
        found.append(log_odds.detach())
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)
    for leaf, x in zip(split, plain, strict=True):
        torch.testing.assert_close(leaf.grad.full_tensor(), x.grad, rtol=1e-11, atol=1e-12)


def assert_raises(
    kind: type[Exception],
    message: str,
    hidden: Tensor,
    weight: Tensor,
    group: object = None,
    labels: Tensor | None = None,
) -> None:
    """On every rank."""
    import pytest

    if labels is None:
        labels = torch.zeros(len(hidden), dtype=torch.int64)
    with pytest.raises(kind, match=message):
        linear_log_odds(hidden, weight, labels, group=group)


class Model(torch.nn.Module):
    """A body, and a head that its forward meets through its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(H, H)
        self.head = torch.nn.Linear(H, V)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The mean of the labels' log-probabilities, negated."""
        hidden = self.body(x).tanh()
        log_odds = linear_log_odds(hidden, self.head.weight, labels, self.head.bias)
        return torch.nn.functional.softplus(-log_odds).mean()


def fsdp_sharded_heads() -> None:
    """Inside the forward of a module that fully_shard holds, the head is whole; data differ."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    mesh = init_device_mesh(torch.get_default_device().type, (ranks,))
    factor = times_too_large(mesh)
    torch.manual_seed(1)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    x, labels = torch.randn(ranks, 6, H), torch.randint(V, (ranks, 6))
    for frozen in (False, True):
        for each in (model, plain):
            each.zero_grad()
            each.head.requires_grad_(not frozen)
        if not frozen:
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
        loss = model(x[dist.get_rank()], labels[dist.get_rank()])
        loss.backward()
        sum(plain(a, b) for a, b in zip(x, labels, strict=True)).div(ranks).backward()
        for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
            if frozen and expected.grad is None:
                assert got.grad is None
                continue
            mean = got.grad.full_tensor() / factor
            torch.testing.assert_close(mean, expected.grad, rtol=1e-5, atol=1e-6)
    if mesh.device_type != "cpu":
        return  # labels are not compared there: that would wait for the device
    # outside of that forward it is a DTensor, and these ranks do not have the same labels
    weight = model.head.weight
    mine = labels[dist.get_rank()]
    assert_raises(ValueError, "labels: .* the same on all ranks", x[0], weight, None, mine)


def arguments_are_checked(split: list[int]) -> None:
    """The same error on every rank, and the collectives still work after it."""
    inputs, _ = own(head(torch.float32), split)
    hidden, weight, labels, *_ = inputs
    for bad in (V, -1):
        labels = labels.clone()
        labels[6] = bad
        expected = rf"labels: expected ids in \[0, {V}\) or -100, got {bad} in row=6"
        assert_raises(ValueError, expected, hidden, weight, dist.group.WORLD, labels)
    assert_raises(TypeError, "group: expected a ProcessGroup or None, got str", hidden, weight, "0")
    assert_raises(ValueError, r"weight: expected shape \(V, 24\)", hidden, weight[:, 1:],
                  dist.group.WORLD)  # fmt: skip


def compiled_without_graph_breaks(split: list[int]) -> None:
    """The exchange of the slices' sizes is in the graph."""
    inputs, _ = own(head(torch.float32), split)
    hidden, weight, labels, bias, upstream = inputs
    hidden.requires_grad_()
    weight.requires_grad_()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_log_odds(h * 2, w, labels, bias, group=dist.group.WORLD) @ upstream

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = (
        torch.autograd.grad(f(hidden, weight), [hidden, weight]) for f in (compiled, loss)
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def say(*what: object) -> None:
    """A line for the test."""
    sys.stdout.write(f"held: {' '.join(map(str, what))}\n")


def main(rank: int, ranks: int, store: str, device: str = "cpu") -> None:
    """All cases."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=ranks)
    for number, split in enumerate(SPLITS[ranks]):
        for dtype in CLOSE:
            for plan in PLANS:
                # how logits are capped and how they are split know nothing of each other
                for shape in SHAPES if number == 0 and ranks == 2 else ("capped",):
                    assert_whole(split, plan, shape, dtype)
                    say("whole", split, dtype, plan, shape)
    split = SPLITS[ranks][0]
    reference_has_the_same_results(split)
    say("reference_has_the_same_results")
    adapters(split)
    say("adapters")
    if device == "cpu":  # a GPU does not check labels
        arguments_are_checked(split)
        say("arguments_are_checked")
    if ranks == 2:  # for the time it takes
        compiled_without_graph_breaks(split)
        say("compiled_without_graph_breaks")
    for alone in (dtensor_heads, dtensor_adapters, fsdp_sharded_heads):
        alone()
        say(alone.__name__)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
