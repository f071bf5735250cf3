"""`sample` and `score` of logits whose vocabulary is split over the ranks of a process group."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadapt._ops.checks import flag, fold_rows, integer, per_row, process_group
from fastadapt._ops.common import RowEdits
from fastadapt._ops.filter_code import filters_of, temperature_last
from fastadapt._ops.outputs import sample_fields
from fastadapt._ops.sharded.exchange import Program, over_group
from fastadapt._ops.sharded.lists import Law
from fastadapt._ops.sharded.opening import Given, refused
from fastadapt._ops.sharded.programs import Draw, Marks, draw, score
from fastadapt._ops.sharded.support import NEUTRAL
from fastadapt.adaptor import KNOBS, Adaptor
from fastadapt.results import Sample, Score, Support
from fastadapt.sampling.edits import Edits
from fastadapt.sampling.rows import check_edits, ids_below, knobs_for, scored, seeds_of, words_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KNOWN = {"temperature", "min_tokens_to_keep", *NEUTRAL}


def sample_split(logits: Tensor, adaptor: Adaptor, group: "ProcessGroup", **options: Any) -> Sample:
    """`fastadapt.sample` of this rank's slice; options are its keyword arguments."""
    asked = (options["base_logprobs"], options["log_mass"])
    out = _run(logits, group, lambda: draw_of(logits, adaptor, group.rank(), **options))
    shape, survived = logits.shape[:-1], None
    if options["support"]:
        *out, ids, offsets, full = out
        survived = Support.unchecked(ids, offsets, full)
    out = [t.view(shape + t.shape[1:]) for t in out]
    fields = sample_fields(out, *asked, options["top_logprobs"])
    return Sample(*fields, support=survived)


def score_split(
    logits: Tensor,
    tokens: Tensor,
    adaptors: Sequence[Adaptor],
    group: "ProcessGroup",
    **options: Any,
) -> Score:
    """`fastadapt.score` of this rank's slice; options are its keyword arguments."""
    out = _run(logits, group, lambda: score_of(logits, tokens, adaptors, group.rank(), **options))
    supports = None
    if options["support"]:
        *out, ids, offsets, full = out
        supports = (*Support.unchecked(ids, offsets, full).split([tokens.numel()] * len(adaptors)),)
    fields = (t.view(tokens.shape + t.shape[1:]) for t in out)
    return Score(*fields)._replace(supports=supports)


def _run(logits: object, group: object, program: Callable[[], Program[Any]]) -> Any:
    """Runs this rank's program; one that cannot be made ends all ranks' with an error."""
    process_group(group)
    try:
        made = program()
    except (TypeError, ValueError, NotImplementedError) as error:
        device = logits.device if isinstance(logits, Tensor) else torch.device("cpu")
        made = refused(error, device)
    return over_group(made, group)  # type: ignore[arg-type]


def draw_of(
    logits: Tensor,
    adaptor: Adaptor,
    rank: int,
    *,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    generator: torch.Generator | None = None,
    base_logprobs: bool = False,
    log_mass: bool = False,
    top_logprobs: int = 0,
    support: bool = False,
    **edits: Any,
) -> Program[list[Tensor]]:
    """A rank's part in a draw, checked.

    Args:
        logits (Tensor): (..., V_r), this rank's slice.
        adaptor (Adaptor): as for `sample`, and so are the others.
        rank (int): which slice it is.
        seeds (Tensor | None): None: this rank draws them, and those of the first rank hold.
        positions (Tensor | None): the same on all ranks.
        generator (torch.Generator | None): of seeds.
        base_logprobs (bool): the same on all ranks, as are the flags that follow.
        log_mass (bool): as above.
        top_logprobs (int): as above.
        support (bool): as above.
        edits: `edits`, `allowed` and `num_tokens`, of the whole vocabulary.

    Raises:
        TypeError, ValueError: as `sample`.
        NotImplementedError: logits on a GPU, filters that a split vocabulary does not know.
    """
    rows = _slice(logits)
    law = law_of(rows, adaptor)
    shape = logits.shape[:-1]
    top_n = integer("top_logprobs", top_logprobs, 0, 1024)
    flag("base_logprobs", base_logprobs)
    flag("log_mass", log_mass)
    flag("support", support)
    if positions is None:
        positions = torch.zeros(shape, dtype=torch.int64, device=rows.device)
    positions = per_row("positions", positions, torch.int64, shape, rows)
    own = seeds is None
    seeds = seeds_of(seeds, generator, shape, rows)
    wanted = (bool(base_logprobs), bool(log_mass), top_n, support)
    asked = Draw(law, seeds, positions, own, *wanted)
    alike = [positions] if own else [positions, seeds]
    words = (*law.filters, own, *wanted)
    return draw(_given(rank, rows, shape, edits, words, [law], alike), asked)


def score_of(
    logits: Tensor,
    tokens: Tensor,
    adaptors: Sequence[Adaptor],
    rank: int,
    *,
    ignore_index: int = -100,
    support: bool = False,
    **edits: Any,
) -> Program[list[Tensor]]:
    """A rank's part in a score, checked; see `draw_of`.

    Args:
        logits (Tensor): (..., V_r), this rank's slice.
        tokens (Tensor): as for `score`, and so are the others.
        adaptors (Sequence[Adaptor]): their temperatures are above 0.
        rank (int): which slice it is.
        ignore_index (int): the same on all ranks.
        support (bool): the same on all ranks.
        edits: as in `draw_of`.

    Raises:
        TypeError, ValueError: as `score`.
        NotImplementedError: as `draw_of`.
    """
    rows = _slice(logits)
    shape = logits.shape[:-1]
    scored(adaptors)
    flat = per_row("tokens", tokens, torch.int64, shape, rows)
    ignore_index = integer("ignore_index", ignore_index)
    flag("support", support)
    laws = [law_of(rows, a, f"adaptors[{i}]") for i, a in enumerate(adaptors)]
    words = (ignore_index, support, *(name for law in laws for name in law.filters))
    given = _given(rank, rows, shape, edits, words, laws, [flat])
    return score(given, Marks(laws, flat, ignore_index, support))


def law_of(rows: Tensor, adaptor: Adaptor, name: str = "adaptor") -> Law:
    """An adaptor as programs take it.

    Raises:
        NotImplementedError: a filter or an order that is not known here.
    """
    packed = knobs_for(rows, adaptor, name)
    names = tuple(KNOBS[knob] for knob in filters_of(adaptor.filter_code))
    if unknown := [knob for knob in names if knob not in NEUTRAL]:
        raise NotImplementedError(
            f"{name}.{unknown[0]}: expected it off with a group, got a vocabulary split over ranks,"
            f" which knows {', '.join(NEUTRAL)}"
        )
    # while the mass of the most probable token is asked for it has to be there
    after = names.index("typical_p") if "typical_p" in names else len(names)
    if temperature_last(adaptor.filter_code) or "min_p" in names[after:]:
        raise NotImplementedError(
            f"{name}.order: expected the temperature first, and min_p before typical_p, with a "
            f"group, got {adaptor.order!r}"
        )
    columns = zip(KNOBS, packed.expand(-1, len(rows)), strict=True)
    return Law.of({knob: x.contiguous() for knob, x in columns if knob in KNOWN}, names)


def _slice(logits: Tensor) -> Tensor:
    """Returns this rank's logits as (N, V_r)."""
    rows = fold_rows("logits", logits, double=False, empty=True)
    if rows.device.type != "cpu":
        raise NotImplementedError(
            f"logits: expected a CPU tensor with a group, got one on {rows.device}"
        )
    return rows.detach()


def _given(
    rank: int,
    rows: Tensor,
    leading: torch.Size,
    edits: dict[str, Any],
    words: tuple[object, ...],
    laws: list[Law],
    alike: list[Tensor],
) -> Given:
    """A rank's arguments, and the digest of those that have to be the same on all ranks."""
    changes, allowed, real = (edits[k] for k in ("edits", "allowed", "num_tokens"))
    if real is not None:
        real = integer("num_tokens", real, 1)
    if changes is not None:
        check_edits(changes, rows)
    knobs = [x.view(torch.int64) for law in laws for x in law.knobs.values()]
    told = (*words, str(rows.dtype), real, _told(changes), _told(allowed))
    digest = _digest(repr(told), [*knobs, *alike])
    edited = None
    if changes is not None or allowed is not None or real is not None:

        def edited(first: int, v: int) -> Tensor:
            return _edited(rows, first, v, leading, changes, allowed, real)

    return Given(rank, rows, digest, edited, real)


def _told(changes: Edits | Tensor | None) -> object:
    """What decides whether edits or masks are refused, which has to be by all ranks or none."""
    if isinstance(changes, Edits):
        return changes.largest
    return (changes.shape, changes.dtype) if isinstance(changes, Tensor) else type(changes)


def _digest(text: str, numbers: list[Tensor]) -> int:
    """A number in [0, 2^31) of a text and int64 tensors."""
    x = torch.cat([torch.tensor(list(text.encode())), *numbers])
    place = torch.arange(len(x)) * 0x3C6EF372FE94F82A + 1  # odd
    mixed = (x ^ x >> 29) * place
    return int((mixed ^ mixed >> 32).sum() & 0x7FFFFFFF)


def _edited(
    rows: Tensor,
    first: int,
    v: int,
    leading: torch.Size,
    edits: Edits | None,
    allowed: Tensor | None,
    num_tokens: int | None,
) -> Tensor:
    """This rank's logits of real tokens, edited, by edits of the whole vocabulary."""
    real = v if num_tokens is None else num_tokens
    rows = rows[:, : max(min(rows.shape[1], real - first), 0)]
    if edits is not None:
        ids_below(edits, v)
    words = None if allowed is None else words_of(allowed, leading, v, real, rows.device)
    if (edits is None and words is None) or rows.numel() == 0:
        return rows
    changes = RowEdits() if edits is None else edits_of_slice(edits, first, rows.shape[1])
    if words is not None:
        changes = changes._replace(allowed=words_of_slice(words, first, rows.shape[1]))
    neutral = Adaptor()
    out: Tensor = torch.ops.fastadapt.filter_logits(
        rows.float(), neutral.packed_on(rows.device), neutral.filter_code, *changes
    )
    return out


def edits_of_slice(edits: Edits, first: int, size: int) -> RowEdits:
    """The edits of ids [first, first + size), which they count from 0."""
    here = (edits.ids >= first) & (edits.ids < first + size)
    before = torch.cat([here.new_zeros(1, dtype=torch.int64), here.cumsum(0)])
    ids = edits.ids[here] - first
    return RowEdits(ids, before[edits.offsets], edits.columns[:, here].contiguous())


def words_of_slice(words: Tensor, first: int, size: int) -> Tensor:
    """The words (N, ceil(size / 32)) of ids [first, first + size); what has no word is left out."""
    begin, shift, count = first // 32, first % 32, -(-size // 32)
    some = words[:, begin : begin + count + 1].long() & 0xFFFFFFFF
    some = torch.nn.functional.pad(some, (0, count + 1 - some.shape[1]))
    return (some[:, :-1] >> shift | some[:, 1:] << 32 - shift).to(torch.int32)
