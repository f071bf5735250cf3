"""What a request asks for: our knobs in its extra arguments, and the engine's own beside them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from numbers import Integral, Real
from operator import index
from typing import Any

from torch import Tensor

from fastadapt._ops.checks import instance, integer, nearest, shown
from fastadapt.adaptor import INTEGER_KNOBS, NAMED_ORDERS, RANGES, Adaptor
from fastadapt.sampling.numbers import real
from fastadapt.vllm._records import MOST_BYTES

KEY = "fastadapt"
KNOBS = tuple(f.name for f in fields(Adaptor) if f.init)
BESIDE = ("seed", "bias_ids", "bias_values", "support_id")
# The engine's own knobs, by the values at which they do nothing and count as not given.
ENGINE: Mapping[str, Any] = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "seed": None}
A_SERVER = "which a server may have from the model's generation_config"
PENALTIES = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}


@dataclass(frozen=True, kw_only=True)
class Request:
    """How the rows of one request are drawn.

    Attributes:
        adaptor: of numbers.
        seed: int64; None: it gets one when it is admitted.
        bias: by id, finite or -inf; added before temperature and filters.
        repetition: the engine's penalty of tokens in prompt or output.
        presence: that of tokens in the output.
        frequency: that of tokens in the output, times their count.
        support_id: under which it is recorded what its tokens were drawn from; None: it is not.
    """

    adaptor: Adaptor
    seed: int | None
    bias: Mapping[int, float]
    repetition: float
    presence: float
    frequency: float
    support_id: str | None

    @property
    def penalised(self) -> bool:
        """Whether the engine's penalties change anything."""
        return any(getattr(self, name) != none for name, none in PENALTIES.items())


def requested(params: Any) -> Request | None:
    """Returns what a request asks of us; None where the engine draws it as ever.

    That is so without a key of ours, and in a greedy request without a bias or a support's id whose
    filters keep the argmax: all do, but for XTC and typical before a temperature that comes last.

    Args:
        params: vLLM's `SamplingParams`, or what has the same attributes.

    Raises:
        ValueError: an unknown key, a wrong type or a number out of range, a knob that the engine's
            own contradicts, or a mixture that one of the engine's runners cannot have. vLLM answers
            with its message and the status 400.
    """
    given = _given(params.extra_args or {})
    if given is None:
        return None
    bias = _checked(_bias, given.pop("bias_ids", ()), given.pop("bias_values", ()))
    support_id = _support_id(given.pop("support_id"), params.n) if "support_id" in given else None
    if "seed" in given:
        given["seed"] = _checked(integer, "seed", given["seed"])
        if params.n > 1:
            raise ValueError(
                f"{KEY}_seed: expected the engine's seed with n > 1, which gives each of the n its "
                f"own, got {KEY}_seed={given['seed']} and n={params.n}"
            )
    ours = {name: value for name, value in given.items() if name != "seed"}
    for name, value in ours.items():
        _check_knob(f"{KEY}_{name}", name, value)
    _checked(Adaptor, **ours)  # before the engine's are compared with them
    for name, neutral in ENGINE.items():
        _adopt(given, name, getattr(params, name), neutral)
    seed = given.pop("seed", None)
    adaptor = _checked(Adaptor, **{"order": "vllm"} | given)
    penalties = {name: _penalty(params, name) for name in PENALTIES}
    if bias and penalties["repetition"] != 1:
        raise ValueError(
            f"{KEY}_bias_ids: expected no repetition_penalty beside it (one of vLLM's runners "
            "penalises before our bias, the other after it; logit_bias is added before it in both)"
            f", got repetition_penalty={penalties['repetition']}"
        )
    recorded = support_id is not None
    if params.temperature == 0 and not bias and not recorded and _keeps_argmax(adaptor):
        return None
    return Request(adaptor=adaptor, seed=seed, bias=bias, support_id=support_id, **penalties)


def _given(extra: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns our keys without their prefix, those of the JSON text among them; None for none.

    Raises:
        ValueError: an unknown key, one that is there twice, or a text that is no JSON object.
    """
    ours = {k: value for k, value in extra.items() if isinstance(k, str) and k.startswith(KEY)}
    if not ours:
        return None
    whole = ours.pop(KEY, {})
    if isinstance(whole, str):
        whole = _parsed(whole)
    if not isinstance(whole, Mapping):
        raise ValueError(f"{KEY}: expected a JSON object, got {shown(whole)}")
    keys = {f"{KEY}_{name}": value for name, value in whole.items()}
    for key, value in ours.items():
        if key in keys:
            raise ValueError(f"{key}: expected it once, got it in {KEY} too")
        keys[key] = value
    known = {f"{KEY}_{name}": name for name in (*KNOBS, *BESIDE)}
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if key not in known:
            near = nearest([key.removeprefix(KEY).strip("-_")], known.values())
            meant = near.replace("mean ", f"mean {KEY}_")
            raise ValueError(f"{key}: expected one of {', '.join(known)}, got {key}{meant}")
        if isinstance(value, Tensor):  # an adaptor takes one number for each row
            raise ValueError(f"{key}: expected a number or a text, got {shown(value)}")
        found[known[key]] = tuple(value) if isinstance(value, list) else value
    return found


def _parsed(text: str) -> Any:
    """Returns what a text of JSON says.

    Raises:
        ValueError: it is none, has a key twice, or is nested deeper or has more digits than Python
            reads.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise ValueError(f"{KEY}: expected a flat JSON object, got {shown(text)}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{KEY}: expected a JSON object, got {shown(text)}") from error
    except ValueError as error:
        expected = "a JSON object with each key once and numbers of at most 4300 digits"
        raise ValueError(f"{KEY}: expected {expected}, got {shown(text)}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check_knob(label: str, name: str, value: Any) -> None:
    """Checks a knob of a request by itself.

    Raises:
        ValueError: it is no number in its range, or no order.
    """
    if name == "order":
        flat = isinstance(value, tuple) and all(isinstance(one, str) for one in value)
        if not flat and value not in NAMED_ORDERS:
            expected = "'hf', 'vllm' or a flat list of names, such as [\"xtc\", \"temperature\"]"
            raise ValueError(f"{label}: expected {expected}, got {shown(value)}")
    elif name in RANGES:
        kind = Integral if name in INTEGER_KNOBS else Real
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not number or not RANGES[name].holds(value):
            raise ValueError(f"{label}: expected {RANGES[name].text}, got {shown(value)}")


def _adopt(given: dict[str, Any], name: str, value: Any, neutral: Any) -> None:
    """Takes a knob of the engine's over, unless it is neutral.

    Raises:
        ValueError: it is out of our range, ours is another, or an order of ours does not have it.
    """
    if value == neutral or (name == "top_k" and value == -1):  # which is off too
        return
    if name == "seed":
        taken = _int64(value)
    else:
        _check_knob(name, name, value)
        taken = value
    ours, order = given.setdefault(name, taken), given.get("order")
    if ours != taken:
        raise ValueError(
            f"{KEY}_{name}: expected it or {name} alone, or equal ones, got {KEY}_{name}={ours} "
            f"and {name}={shown(value)} ({A_SERVER})"
        )
    if isinstance(order, tuple) and name not in (*order, "temperature", "seed"):
        raise ValueError(
            f"{KEY}_order: expected {name!r} in it beside {name}={value} ({A_SERVER}; "
            f"{name}={neutral} in the request switches it off), got {order}"
        )


def _int64(seed: Any) -> int:
    """Returns a seed of the engine's, which takes those of 64 bits without a sign too, wrapped.

    Raises:
        ValueError: no integer.
    """
    try:
        whole = index(seed)
    except TypeError as error:
        raise ValueError(f"seed: expected an integer, got {shown(seed)}") from error
    return (whole + 2**63) % 2**64 - 2**63


def _keeps_argmax(adaptor: Adaptor) -> bool:
    """Whether the best survivor at temperature 0 is the argmax of all tokens."""
    before = adaptor.order[-1:] == ("temperature",)
    return not before or bool(adaptor.typical_p == 1 and adaptor.xtc_probability == 0)


def _bias(ids: Sequence[Any], values: Sequence[Any]) -> dict[int, float]:
    """Returns a bias by id.

    Raises:
        TypeError, ValueError: no lists, of unequal lengths, an id that is there twice or cannot be,
            a value that is neither finite nor -inf.
    """
    instance("bias_ids", ids, tuple, "a list of ids")
    instance("bias_values", values, tuple, "a list of numbers")
    if len(ids) != len(values):
        expected = f"as many as bias_ids, {len(ids)}"
        raise ValueError(f"bias_values: expected {expected}, got {len(values)}")
    found: dict[int, float] = {}
    for i, value in zip(ids, values, strict=True):
        one = integer("bias_ids", i, 0, 2**31 - 1)
        if one in found:
            raise ValueError(f"bias_ids: expected each id once, got {one} twice")
        found[one] = value if value == -inf else real("bias_values", value, signed=True)
    return found


def _support_id(value: Any, n: int) -> str:
    """Returns the id of a request's records.

    Raises:
        ValueError: no text, none or too long a one, or of several sequences, which vLLM does not
            tell apart.
    """
    if not isinstance(value, str) or not 1 <= len(value.encode("utf-8", "replace")) <= MOST_BYTES:
        expected = f"a text of 1 to {MOST_BYTES} bytes"
        raise ValueError(f"{KEY}_support_id: expected {expected}, got {shown(value)}")
    if n > 1:
        raise ValueError(
            f"{KEY}_support_id: expected n=1, since vLLM does not tell the sequences of a request "
            f"apart, got n={n}; send {n} requests, each with an id of its own"
        )
    return value


def _penalty(params: Any, name: str) -> float:
    """Returns a penalty of the engine's, in the range of `History.edits`.

    Raises:
        ValueError: out of it.
    """
    positive = name == "repetition"
    value = getattr(params, f"{name}_penalty")
    return real(f"{name}_penalty", value, positive=positive, signed=not positive)


def _checked(check: Callable[..., Any], *values: Any, **knobs: Any) -> Any:
    """Returns what a check of our values returns; its errors name the keys of requests.

    Raises:
        ValueError: what the check raises.
    """
    try:
        return check(*values, **knobs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{KEY}_{error}") from error
