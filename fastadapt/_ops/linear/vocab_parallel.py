"""A head split over ranks by vocabulary: its slices, and the sums that the ranks exchange.

Torch's functional collectives, by the group's name. What decides log-odds is gathered and folded
in the order of the ranks, so that every rank has the same bits whatever the backend.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fastadapt._C import OTHERS_MAX, OTHERS_REST, OTHERS_SQUARED, OTHERS_SUM, OTHERS_WEIGHTED
from fastadapt._ops.checks import head_rows, instance, lora_fits, lora_parts, process_group
from fastadapt._ops.linear.tiles import Lora

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class Slice(NamedTuple):
    """This rank's part of a head."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    group: str | None  # its name; None: the head is whole
    span: Tensor | None  # (2,) int64: the first id of the slice, and the size of the whole
    lora: Lora | None  # B is the slice's


def rows_of_slice(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: "ProcessGroup | None",
    lora: Lora | None,
) -> tuple[Slice, Tensor]:
    """Checks the head; returns the local parts, and the hidden states (N, H)."""
    for name, given in (("hidden", hidden), ("weight", weight)):
        instance(name, given, Tensor, "a Tensor")
    if bias is not None:
        instance("bias", bias, Tensor, "a Tensor or None")
    if lora is not None:
        lora_parts("lora", lora)
    part = split_head(hidden, weight, labels, bias, group, lora)
    empty = part.group is not None  # a slice may be
    rows = head_rows(part.hidden, part.weight, part.bias, empty=empty)
    if part.lora is not None:
        lora_fits("lora", rows, part.weight, *part.lora[:2])
    return part, rows


def split_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: "ProcessGroup | None",
    lora: Lora | None = None,
) -> Slice:
    """Returns the local parts of the inputs and, for a split head, the position of its slice.

    Raises:
        RuntimeError: a group without torch.distributed.
        TypeError: something else than a process group.
        ValueError: a DTensor of another placement or mesh, a group that this rank is not in.
    """
    mesh = None
    if is_distributed(weight):
        mesh = weight.device_mesh
    hidden, labels = (
        _local(name, x, mesh, "Replicate") for name, x in (("hidden", hidden), ("labels", labels))
    )
    weight = _local("weight", weight, mesh, "Shard(0)")
    bias = None if bias is None else _local("bias", bias, mesh, "Shard(0)")
    if lora is not None:
        a, b, scale = lora
        a, b = _local("lora[0]", a, mesh, "Replicate"), _local("lora[1]", b, mesh, "Shard(0)")
        lora = a, b, scale
    if group is not None:
        process_group(group)
    if mesh is not None:
        of_mesh = mesh.get_group()
        if group is not None and group.group_name != of_mesh.group_name:
            raise ValueError(
                f"group: expected that of the weight's mesh, {of_mesh.group_name!r}, or None, "
                f"got {group.group_name!r}"
            )
        group = of_mesh
    if group is None:
        return Slice(hidden, weight, labels, bias, None, None, lora)
    sizes = _gather(labels.new_full((1,), weight.shape[0]), group.group_name)[:, 0]
    first = sizes[: group.rank()].sum()
    span = torch.stack([first, sizes.sum()])
    return Slice(hidden, weight, labels, bias, group.group_name, span, lora)


def merge_stats(
    stats: Tensor, own: Tensor, has: Tensor, labels: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the ranks' statistics and logits of labels, and says whether a rank has the label.

    A label that the ranks do not agree on counts as nobody's; on the CPU it is an error.

    Args:
        stats: (N, NUM_TILE_STATS) float64, of this rank's slice.
        own: (N, K) float64, 0 where the label is elsewhere.
        has: (N, K) bool, the label is in this slice.
        labels: (N, K) int64.
        group: its name.
    """
    k = own.shape[1]
    mine = torch.cat([stats, own, has.double(), labels.double()], 1)
    of_stats, all_own, all_has, ids = _gather(mine, group).split([stats.shape[1], k, k, k], -1)
    agreed = (ids == ids[0]).all(0)
    if labels.device.type == "cpu" and not bool(agreed.all()):
        row, column = agreed.logical_not().nonzero()[0].tolist()
        got = [int(label) for label in ids[:, row, column]]
        raise ValueError(
            f"labels: expected the same on all ranks of the group, got {got} in {row=}"
        )
    tops, mass = of_stats[..., OTHERS_MAX], of_stats[..., OTHERS_SUM]  # (ranks, N)
    top = tops.amax(0)
    some = tops != float("-inf")
    shift = torch.where(some, tops - top, 0.0)
    factor = torch.where(some, shift.exp(), 0.0)
    weighted = torch.where(some, of_stats[..., OTHERS_WEIGHTED] + mass * shift, 0.0)
    squared = factor.square() * of_stats[..., OTHERS_SQUARED]
    rest = torch.where(tops == top, of_stats[..., OTHERS_REST], factor * mass)
    merged = torch.empty_like(stats)
    merged[:, OTHERS_MAX] = top
    merged[:, OTHERS_SUM] = (factor * mass).sum(0)
    merged[:, OTHERS_WEIGHTED] = (factor * weighted).sum(0)
    merged[:, OTHERS_SQUARED] = squared.sum(0)
    merged[:, OTHERS_REST] = rest.sum(0)
    return merged, all_own.sum(0), agreed & (all_has.sum(0) == 1)


def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """Returns the sum over ranks, equal on every rank."""
    collectives = torch.ops._c10d_functional
    out: Tensor = collectives.wait_tensor(collectives.all_reduce(x, "sum", group))
    return out


def _gather(x: Tensor, group: str) -> Tensor:
    """Gathers a tensor from all ranks, (ranks, *x.shape)."""
    from torch.distributed.distributed_c10d import _get_group_size_by_name

    name: Any = group
    ranks = _get_group_size_by_name(name)
    collectives = torch.ops._c10d_functional
    parts = collectives.all_gather_into_tensor(x.contiguous(), ranks, group)
    out: Tensor = collectives.wait_tensor(parts)
    return out.view(ranks, *x.shape)


def is_distributed(x: object) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, without importing that class needlessly."""
    if not isinstance(x, Tensor) or type(x) in (Tensor, torch.nn.Parameter):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _local(name: str, x: Tensor, mesh: "DeviceMesh | None", placement: str) -> Tensor:
    """Returns this rank's part of a DTensor; its gradient is a DTensor placed alike."""
    if not is_distributed(x):
        return x
    from torch.distributed.tensor import Replicate, Shard

    expected = Replicate() if placement == "Replicate" else Shard(0)
    got = x.placements
    if got != (expected,):
        raise ValueError(f"{name}: expected a DTensor placed as ({placement},), got {got}")
    if x.device_mesh != mesh:
        raise ValueError(f"{name}: expected a DTensor on the mesh of weight, {mesh}")
    local: Tensor = x.to_local(grad_placements=got)
    return local
