"""Argument checks and reshaping shared by all public functions; each message names the argument."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import inf
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

INT64 = torch.iinfo(torch.int64)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fold_rows(name: str, x: Tensor, *, double: bool = True, empty: bool = False) -> Tensor:
    """Reshapes (..., V) to (N, V) with a contiguous last dimension; checks shape and dtype.

    Args:
        name (str): of the argument, for the message.
        x (Tensor): float32, bfloat16, float16, or float64 where that is allowed.
        double (bool): whether it is.
        empty (bool): whether V may be 0.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: no last dimension, or an empty one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS and not (double and x.dtype == torch.float64):
        expected = (
            "float32, bfloat16, float16 or float64" if double else "float32, bfloat16 or float16"
        )
        hint = "; fastadapt.reference takes it" if x.dtype == torch.float64 else ""
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}{hint}")
    if x.dim() == 0 or (x.shape[-1] == 0 and not empty):
        least = 0 if empty else 1
        raise ValueError(f"{name}: expected (..., V) with V >= {least}, got shape {tuple(x.shape)}")
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def per_row(
    name: str, value: Tensor, dtype: torch.dtype, shape: torch.Size, like: Tensor
) -> Tensor:
    """Flattens a tensor with one value per row; checks shape, dtype and device.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device than those of the rows.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
    flat = value.dim() == 1 and value.is_contiguous()
    return value if flat else value.reshape(-1).contiguous()


def listed_shape(index: Tensor, leading: torch.Size) -> torch.Size:
    """Returns the shape (*leading, K) of several ids a row, as `per_row` takes it.

    Raises:
        ValueError: an index without the dimension of K.
    """
    if index.dim() != len(leading) + 1:
        shape = ", ".join([*map(str, leading), "K"])
        raise ValueError(f"index: expected shape ({shape}), got {tuple(index.shape)}")
    return torch.Size((*leading, index.shape[-1]))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of a device; it knows no meta tensors."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_tangent(name: str, x: Tensor) -> None:
    """Raises for a tensor of forward-mode AD, whose tangent an operator of ours would drop."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"{name}: expected no tangent, got forward-mode AD, which is not there")


def alike(hidden: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Checks tensors by name against hidden states: floats of their dtype, on their device.

    Another dtype is allowed where autocast makes it equal.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    casts = autocasts(hidden.device) and hidden.dtype != torch.float64
    for name, x in others.items():
        if x is None:
            continue
        no_tangent(name, x)
        if not x.is_floating_point():  # codes of a quantised head: autocast would cast them
            raise TypeError(f"{name}: expected floating-point numbers, got {x.dtype}")
        if x.dtype != hidden.dtype and not casts:
            raise TypeError(f"{name}: expected {hidden.dtype} as hidden, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {x.device}")


def rows_of_head(name: str, hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns hidden states (..., H) as rows (N, H), in float32 for a float32 head.

    Those of half precision are, except under autocast, which makes other dtypes equal too.
    """
    rows = fold_rows(name, hidden)
    no_tangent(name, hidden)
    half = rows.dtype in (torch.bfloat16, torch.float16)
    wide = half and weight.dtype == torch.float32 and not autocasts(rows.device)
    return rows.float() if wide else rows


def head_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, empty: bool) -> Tensor:
    """Returns hidden states (..., H) as `rows_of_head`, after checks of a head against them.

    Args:
        hidden (Tensor): (..., H).
        weight (Tensor): (V, H).
        bias (Tensor | None): (V,).
        empty (bool): whether V may be 0.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    rows = rows_of_head("hidden", hidden, weight)
    h = rows.shape[1]
    none = weight.shape[:1] == (0,) and not empty
    if weight.dim() != 2 or weight.shape[1] != h or none:
        raise ValueError(f"weight: expected shape (V, {h}), V >= 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    alike(rows, {"weight": weight, "bias": bias})
    return rows


def lora_parts(name: str, lora: object) -> None:
    """Raises unless a LoRA adapter is (A, B, scale), two tensors and a number.

    Raises:
        TypeError: it is something else.
        ValueError: a scale that is not finite.
    """
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        got = f"{len(lora)} of them" if isinstance(lora, tuple | list) else type(lora).__name__
        raise TypeError(f"{name}: expected (A, B, scale) or None, got {got}")
    for i in range(2):
        instance(f"{name}[{i}]", lora[i], Tensor, "a Tensor")
    number(f"{name}[2]", lora[2], signed=True)


def lora_fits(name: str, rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> None:
    """Checks a LoRA adapter against hidden states (N, H) and a head (V, H).

    Its dtype is one of its own: float64 beside float64, else any other.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    (v, h), r = weight.shape, a.shape[0] if a.dim() == 2 else 0
    if r == 0 or a.shape[1] != h:
        raise ValueError(f"{name}[0]: expected shape (r, {h}), r >= 1, got {tuple(a.shape)}")
    if b.shape != (v, r):
        raise ValueError(f"{name}[1]: expected shape ({v}, {r}), got {tuple(b.shape)}")
    allowed = (torch.float64,) if rows.dtype == torch.float64 else FLOATS
    for i, x in enumerate((a, b)):
        no_tangent(f"{name}[{i}]", x)
        if x.dtype not in allowed:
            expected = " or ".join(map(str, allowed))
            raise TypeError(f"{name}[{i}]: expected {expected} beside {rows.dtype}, got {x.dtype}")
        if x.device != rows.device:
            raise ValueError(f"{name}[{i}]: expected device {rows.device}, got {x.device}")


def instance(name: str, value: object, kind: Any, expected: str) -> None:
    """Raises unless a value is of a class or of one of several.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def integer(name: str, value: object, low: int = INT64.min, high: int = INT64.max) -> int:
    """Returns an integer in [low, high], NumPy's included; raises for anything else.

    Raises:
        TypeError: not an integer; a bool is none.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {shown(value)}")
    found = int(value)
    if not low <= found <= high:
        expected = f"at least {low}" if found < low and high == INT64.max else f"{low} to {high}"
        raise ValueError(f"{name}: expected {expected}, got {shown(found)}")
    return found


def integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """Converts integers to an int64 tensor of the same shape, on their device.

    Args:
        name (str): of the argument, for the message.
        values (Tensor or sequence of int): of any integer type, each in [-2**63, 2**63).

    Raises:
        TypeError: something else than integers.
        ValueError: an integer that int64 does not hold, or sequences of unequal lengths.
    """
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        numbers = isinstance(values, Sequence) and all(isinstance(v, int) for v in values)
        kind = ValueError if numbers else TypeError
        raise kind(f"{name}: expected integers in [-2**63, 2**63), got {values!r}") from error
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    whole = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and bool((whole < 0).any()):
        raise ValueError(f"{name}: expected integers in [-2**63, 2**63), got {values!r}")
    return whole


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises unless an option is one of the choices.

    Raises:
        TypeError: not a string.
        ValueError: another string; the message has the nearest one.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")
    if value not in choices:
        meant = nearest([value], choices)
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{meant}")


def number(name: str, value: object, *, positive: bool = False, signed: bool = False) -> float:
    """Returns a finite number as an int or a float; NumPy's are accepted.

    It is >= 0, > 0 if it has to be positive, and may be negative if it is signed.

    Raises:
        TypeError: not a number: text, None, a bool, a tensor.
        ValueError: negative, 0 where it has to be positive, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    found = cast(float, value)
    if not signed and not (found > 0 if positive else found >= 0):
        least = ">" if positive else ">="
        raise ValueError(f"{name}: expected a value {least} 0, got {shown(found)}")
    if not -inf < found < inf:
        raise ValueError(f"{name}: expected a finite value, got {found}")
    # numpy's multiply tensors in their own way
    return found if type(found) is int or type(found) is float else float(found)


def process_group(group: object) -> None:
    """Raises unless this process is a member of a group.

    Raises:
        RuntimeError: torch.distributed is not there or not initialised.
        TypeError: something else than a process group.
        ValueError: one that this rank is not in.
    """
    import torch.distributed as dist

    missing = RuntimeError("group: expected torch.distributed to be initialised, it is not")
    if not dist.is_available():
        raise missing
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup or None, got {type(group).__name__}")
    if not dist.is_initialized():
        raise missing
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected one that this rank is a member of")


def flag(name: str, value: object) -> None:
    """Raises unless an option is True or False; NumPy's are accepted.

    Raises:
        TypeError: anything else, such as the text "false", which is true.
    """
    of_numpy = getattr(value, "dtype", None) == "bool" and getattr(value, "ndim", 1) == 0
    if not isinstance(value, bool) and not of_numpy:
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def nearest(names: Iterable[object], choices: Iterable[str]) -> str:
    """Returns "; did you mean X?" with choices spelt similarly, or an empty string.

    A name that begins with a choice means that one, such as "mle_loss" the loss "mle".
    """
    known: dict[str, str] = {}
    for choice in choices:  # a flag has two spellings, the usual one first
        known.setdefault(choice.replace("-", "_"), choice)
    close: list[str] = []
    for word in (str(name).lower().replace("-", "_") for name in names):
        begun = [c for c in known if word.startswith(f"{c}_") and word not in known]
        close += [max(begun, key=len)] if begun else get_close_matches(word, known, 1)
    return f"; did you mean {', '.join(dict.fromkeys(known[x] for x in close))}?" if close else ""


def shown(value: object) -> str:
    """Returns a value as messages show it, cut if it is long."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits, or lists in lists
        text = f"a value of type {type(value).__name__}, too long to show"
    return text if len(text) <= 60 else f"{text[:57]}..."
