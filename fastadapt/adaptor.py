"""The sampling adaptor: temperature, truncation knobs and their order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.checks import shown
from fastadapt._ops.filter_code import ORDERS, XTC, filter_code
from fastadapt._ops.philox import philox

INTEGER_KNOBS = frozenset({"top_k", "min_tokens_to_keep"})


class _Range(NamedTuple):
    """The interval of a knob's values: which ends are open, and whether 0 has a meaning."""

    text: str
    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    or_zero: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value is in the interval; NaN never is."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return (above and below) or (self.or_zero and value == 0)


_UNIT = _Range("a value in [0, 1]", 0, 1)
_CUTOFF = _Range("a value in [0, 1)", 0, 1, open_high=True)
_MULTIPLE = _Range("a value in [0, 1e6]", 0, 1e6)
# In the order of the packed knobs, which csrc/kernels.h repeats.
RANGES = {
    # the upper end is float32's largest number
    "temperature": _Range(
        "0 or a value in [1e-6, 3.4e38]", 1e-6, 3.4028234663852886e38, or_zero=True
    ),
    "top_k": _Range("an integer in [0, 2**31)", 0, 2**31 - 1),
    "top_p": _UNIT,
    "min_p": _UNIT,
    "typical_p": _Range("a value in (0, 1]", 0, 1, open_low=True),
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "min_tokens_to_keep": _Range("an integer in [1, 2**31)", 1, 2**31 - 1),
    "top_n_sigma": _MULTIPLE,
    "min_k": _MULTIPLE,
    "top_a": _UNIT,
    "top_h": _UNIT,
    "xtc_probability": _UNIT,
    "xtc_threshold": _UNIT,
}
KNOBS = tuple(RANGES)
# Values at which a filter keeps all, where it is not 0.
_NEUTRAL = {"top_p": 1, "typical_p": 1, "min_tokens_to_keep": 1}
# The names of orders and of filters: a filter is named after its knob, but for XTC, which has two.
NAMED_ORDERS = ("hf", "vllm")
FILTERS = {"xtc" if knob == XTC else KNOBS[knob]: knob for knob in ORDERS[0]}

Knob = float | int | Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Adaptor:
    """Temperature, truncation filters and the order in which they run.

    The neutral value of every knob is its default, so `Adaptor()` changes nothing. Each knob is a
    number, NumPy's included, or a 1-d tensor with one value per row. Filters run one after the
    other, each on the renormalised survivors of the one before. A mass or a probability that
    reaches its threshold but for rounding reaches it. The exact integer rule, the same on every
    device, is docs/sampling-rule.md. A tensor is copied: changing it later changes no adaptor.

    Examples:
        >>> Adaptor(temperature=0.8, top_p=0.9).top_p
        0.9
        >>> Adaptor(temperature=torch.tensor([0.0, 1.0]), top_k=50).rows
        2
        >>> Adaptor(temperature=1.5, min_p=0.1, order=("min_p", "temperature")).order
        ('min_p', 'temperature')

    Args:
        temperature: divides the logits; finite, 0 (the argmax; of the survivors where it comes
            last) or >= 1e-6.
        top_k: integer >= 0, 0 is off. Keeps logits >= the k-th largest; ties all stay.
        top_p: in [0, 1], 1 is off. Keeps the most probable tokens until their mass reaches top_p
            (where it is exactly top_p, no more than these); among equal values the lowest ids stay.
        min_p: in [0, 1], 0 is off. Keeps p >= min_p * max p.
        typical_p: in (0, 1], 1 is off. Keeps the tokens whose -log p is nearest the entropy, up to
            this mass (Meister et al. 2022, arXiv 2202.00666).
        epsilon_cutoff: in [0, 1), 0 is off. Keeps p >= epsilon (Hewitt et al. 2022, arXiv
            2210.15191).
        eta_cutoff: in [0, 1), 0 is off. Keeps p >= min(eta, sqrt(eta) * exp(-H)) (the same paper).
        min_tokens_to_keep: integer >= 1; every filter leaves at least so many tokens.
        top_n_sigma: in [0, 1e6], 0 is off. Keeps logits within so many standard deviations of the
            largest (Tang et al. 2024, arXiv 2411.07641).
        min_k: the paper's tau, in [0, 1e6], 0 is off (3 there). Keeps the tokens above the place
            where sorted logits fall most, each fall divided by its rank, and at least
            tau / (largest - smallest logit) of them (Ding et al. 2026, arXiv 2604.11012). These
            are survivors of the filters before it; a temperature that comes first divides the
            logits too, so that only with the last place for it the paper's invariance holds.
        top_a: in [0, 1], 0 is off. Keeps p >= top_a * (max p)^2.
        top_h: in [0, 1], 0 is off. Keeps the most probable tokens, of 100, up to this share of the
            entropy of the 100 (arXiv 2509.02510).
        xtc_probability: in [0, 1], 0 is off: how often XTC acts. It excludes all but the least
            probable of the tokens with p >= xtc_threshold, where they are several. Its coin is
            thrown with the row's seed and position, so that `sample` and `verify` know it; for
            other functions, `tossed` throws it.
        xtc_threshold: in [0, 1]; above 0.5 no two tokens reach it.
        order: the order of the filters: "hf" (top-n-sigma, min-k, top-h, top-k, top-p, min-p,
            top-a, typical, epsilon, eta, XTC), "vllm" (min-p before top-k), or a sequence of their
            names: those of the knobs, and "xtc". A last name "temperature" makes them look at the
            undivided logits, as llama.cpp does; else the temperature divides first.

    Raises:
        TypeError: a knob is neither a number nor a 1-d tensor, an integer knob is not integral, or
            `order` is no name or sequence of names. A bool is no number, and neither is a 0-d
            tensor, whose value may be on a GPU.
        ValueError: a number or a CPU tensor is out of range, per-row tensors differ in length or
            device, or `order` is unknown, has a name twice, lacks a filter whose knob is set, or
            has the temperature among filters. Values of CUDA tensors are not read (that would
            synchronise): a bad one gives its row status 4.
    """

    temperature: Knob = 1.0
    top_k: Knob = 0
    top_p: Knob = 1.0
    min_p: Knob = 0.0
    typical_p: Knob = 1.0
    epsilon_cutoff: Knob = 0.0
    eta_cutoff: Knob = 0.0
    min_tokens_to_keep: Knob = 1
    top_n_sigma: Knob = 0.0
    min_k: Knob = 0.0
    top_a: Knob = 0.0
    top_h: Knob = 0.0
    xtc_probability: Knob = 0.0
    xtc_threshold: Knob = 0.1
    order: str | tuple[str, ...] = "hf"
    packed: Tensor = field(init=False, repr=False)  # (14, R) float64, R = 1 or the number of rows
    rows: int | None = field(init=False, repr=False)  # None: every knob is a number
    filter_code: int = field(init=False, repr=False)  # order and knobs that may act
    greedy: bool = field(init=False, repr=False)  # some temperature is known to be 0
    has_coin: bool = field(init=False, repr=False)  # some row is known to need XTC's
    _copies: dict[torch.device, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Checks every knob and packs them once, so that calls need no preparation."""
        knobs = {name: _checked(name, getattr(self, name)) for name in KNOBS}
        for name, value in knobs.items():
            object.__setattr__(self, name, value)
        tensors = {name: value for name, value in knobs.items() if isinstance(value, Tensor)}
        with torch.inference_mode(False):  # else they could not be saved for a backward
            packed = _pack(knobs, tensors)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "rows", packed.shape[1] if tensors else None)
        object.__setattr__(self, "greedy", _is_known(self.temperature, lambda t: t == 0))
        coin = _is_known(self.xtc_probability, lambda p: (p > 0) & (p < 1))
        object.__setattr__(self, "has_coin", coin)
        acting = {name: _may_act(name, knobs[name]) for name in KNOBS}
        object.__setattr__(self, "order", _checked_order(self.order, acting))
        object.__setattr__(self, "filter_code", _code_of(self.order, acting))

    def tossed(self, seeds: Tensor, positions: Tensor | None = None) -> "Adaptor":
        """Returns this adaptor with the coins of XTC thrown as a draw by these seeds throws them.

        Its `xtc_probability` is 0 or 1 for each row, so that `filter_logits`, `score` and
        `adapted_logps`, which draw nothing, see the support that `sample` drew from.

        Examples:
            >>> logits, seeds = torch.zeros(2, 4), torch.arange(2)
            >>> xtc = Adaptor(xtc_probability=0.5)
            >>> drawn, tossed = sample(logits, xtc, seeds=seeds), xtc.tossed(seeds)
            >>> torch.equal(drawn.kept, (filter_logits(logits, tossed) > -torch.inf).sum(-1))
            True

        Args:
            seeds (Tensor): int64, as `sample` takes them: one for each row, in any shape.
            positions (Tensor | None): the same. None: 0.

        Returns:
            Adaptor: itself where it has no coin to throw, else one with a value for each row. It
            is made in Python, so that `torch.compile` has to break its graph here.

        Raises:
            TypeError: seeds or positions are no int64 tensors.
            ValueError: they are not one for each row of per-row knobs, or of two shapes.
        """
        for name, value in (("seeds", seeds), ("positions", positions)):
            if value is None and name == "positions":
                continue
            if not isinstance(value, Tensor) or value.dtype != torch.int64:
                raise TypeError(f"{name}: expected an int64 tensor, got {value!r}")
            if value.shape != seeds.shape:
                shape = tuple(seeds.shape)
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        if self.rows is not None and seeds.numel() != self.rows:
            raise ValueError(
                f"seeds: expected one for each of {self.rows} rows, got {seeds.numel()}"
            )
        known = torch.zeros_like(seeds) if positions is None else positions
        p = self.xtc_probability
        if not isinstance(p, Tensor) and not self.has_coin:
            return self
        coin = philox(seeds.flatten(), known.flatten())[2].double()
        excludes = (coin < (p.double() if isinstance(p, Tensor) else float(p)) * 2.0**32).double()
        return replace(self, xtc_probability=excludes)

    def packed_on(self, device: torch.device) -> Tensor:
        """Returns the packed knobs on a device; a copy of number knobs is made once and kept.

        The copy is one from the host, which a CUDA graph cannot capture: call once before a
        capture, or before a compilation that is to hold no copy.
        """
        if self.packed.device == device:
            return self.packed
        copy = self._copies.get(device)
        if copy is None:
            with torch.inference_mode(False):  # else it could not be saved for a backward
                copy = self.packed.to(device)
            if not torch.compiler.is_compiling() and type(copy) is Tensor:  # a fake one is not kept
                self._copies[device] = copy
        return copy

    def __getstate__(self) -> dict[str, object]:
        """Returns the state without copies on devices, which another machine may lack."""
        return self.__dict__ | {"_copies": {}}

    def __eq__(self, other: object) -> bool:
        """Compares order and knobs row by row; a number never equals a tensor."""
        if not isinstance(other, Adaptor):
            return NotImplemented
        same_shape = self.order == other.order and self.rows == other.rows
        return (
            same_shape
            and self.packed.device == other.packed.device
            and bool(torch.equal(self.packed, other.packed))
        )

    def __hash__(self) -> int:
        """Hashes the order and, if every knob is a number, the knobs."""
        if self.rows is not None:
            return hash((self.order, self.rows))
        return hash((self.order, *(float(getattr(self, name)) for name in KNOBS)))

    def __repr__(self) -> str:
        """Shows the knobs that are not neutral."""
        shown = (f for f in fields(self) if f.init)
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in shown
            if isinstance(getattr(self, f.name), Tensor) or getattr(self, f.name) != f.default
        ]
        return f"Adaptor({', '.join(changed)})"


def _checked(name: str, value: object) -> Knob:
    """Returns a knob as a Python number or a tensor; raises on a wrong type or range."""
    if isinstance(value, Tensor):
        _check_tensor(name, value)
        return value.detach().clone()  # whoever made it may write into it
    kind = Integral if name in INTEGER_KNOBS else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}: expected {RANGES[name].text} or a tensor, got {shown(value)}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if not RANGES[name].holds(number):
        raise ValueError(f"{name}: expected {RANGES[name].text}, got {shown(number)}")
    return number


def _check_tensor(name: str, value: Tensor) -> None:
    """Checks a knob with one value per row; values on another device are not read."""
    if value.dim() != 1:
        shape = tuple(value.shape)
        raise TypeError(f"{name}: expected a number or a 1-d tensor, got shape {shape}")
    wrong = value.dtype.is_complex or value.dtype == torch.bool
    if wrong or (name in INTEGER_KNOBS and value.dtype.is_floating_point):
        kind = "an integer" if name in INTEGER_KNOBS else "a real"
        raise TypeError(f"{name}: expected {kind} tensor, got {value.dtype}")
    if value.device.type != "cpu":
        return
    for row, number in enumerate(value.tolist()):
        if not RANGES[name].holds(number):
            text = RANGES[name].text
            raise ValueError(f"{name}: expected {text}, got {float(number)} in row {row}")


def _checked_order(order: object, acting: dict[str, bool]) -> str | tuple[str, ...]:
    """Returns an order's name, or the names in it; raises on what is none."""
    if isinstance(order, str):
        if order not in NAMED_ORDERS:
            expected = "'hf', 'vllm' or a sequence of names of filters"
            raise ValueError(f"order: expected {expected}, got {order!r}")
        return order
    if not isinstance(order, Sequence) or not all(isinstance(name, str) for name in order):
        raise TypeError(f"order: expected a name or a sequence of names, got {order!r}")
    names = tuple(order)
    if len(set(names)) < len(names):
        raise ValueError(f"order: expected each name once, got {names}")
    if names[:1] == ("temperature",):  # which divides first anyway
        names = names[1:]
    filters = names[:-1] if names[-1:] == ("temperature",) else names
    for name in filters:
        if name == "temperature":
            raise ValueError(f"order: expected temperature first or last, got {names}")
        if name not in FILTERS:
            raise ValueError(f"order: expected names among {tuple(FILTERS)}, got {name!r}")
    for name, knob in FILTERS.items():
        if acting[KNOBS[knob]] and name not in filters:
            raise ValueError(f"order: expected {name!r} in it, whose knob is set, got {names}")
    return names


def _code_of(order: str | tuple[str, ...], acting: dict[str, bool]) -> int:
    """Encodes an order and which knobs may act."""
    if isinstance(order, str):
        return filter_code(NAMED_ORDERS.index(order), acting.values())
    filters = [FILTERS[name] for name in order if name != "temperature"]
    acts = [knob for knob in filters if acting[KNOBS[knob]]]
    if "temperature" not in order:
        for code, named in enumerate(ORDERS):  # the same by a name
            if acts == [knob for knob in named if acting[KNOBS[knob]]]:
                return filter_code(code, acting.values())
    return filter_code(filters, acting.values(), "temperature" in order)


def _is_known(knob: Knob, condition: Callable[[Knob], Tensor | bool]) -> bool:
    """Whether a condition holds in some row, as far as known without synchronising."""
    if not isinstance(knob, Tensor):
        return bool(condition(knob))
    holds = condition(knob) if knob.device.type == "cpu" else False
    return bool(holds.any()) if isinstance(holds, Tensor) else holds


def _may_act(name: str, knob: Knob) -> bool:
    """Whether a filter may drop tokens in some row, as far as known without synchronising."""
    if isinstance(knob, Tensor) and knob.device.type != "cpu":
        return True
    if name == "xtc_threshold":  # its filter acts where the probability does
        return False
    acts = knob == 0 if name == "temperature" else knob != _NEUTRAL.get(name, 0)
    return bool(acts.any()) if isinstance(acts, Tensor) else bool(acts)


def _pack(knobs: dict[str, Knob], tensors: dict[str, Tensor]) -> Tensor:
    """Packs knobs as float64 (14, R) in the order of `KNOBS`; R = 1 if every knob is a number."""
    if not tensors:
        # on the CPU, whatever the default device is
        numbers = [[float(v)] for v in knobs.values()]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    lengths = {name: t.shape[0] for name, t in tensors.items()}
    devices = {name: str(t.device) for name, t in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"per-row knobs: expected tensors of one length, got {lengths}")
    if len(set(devices.values())) > 1:
        raise ValueError(f"per-row knobs: expected tensors on one device, got {devices}")
    rows, device = next(iter(lengths.values())), next(iter(tensors.values())).device
    packed = torch.empty(len(knobs), rows, dtype=torch.float64, device=device)
    for row, value in zip(packed, knobs.values(), strict=True):
        row.copy_(value.detach()) if isinstance(value, Tensor) else row.fill_(value)
    return packed
