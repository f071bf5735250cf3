"""The sampling functions: filter, draw, score and the differentiable score."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastadapt._ops.checks import flag, fold_rows, integer, no_tangent, per_row
from fastadapt._ops.outputs import sample_fields
from fastadapt.adaptor import Adaptor
from fastadapt.results import Sample, Score, Support
from fastadapt.sampling.edits import Edits
from fastadapt.sampling.rows import (
    edited_rows,
    knobs_for,
    refuse_coin,
    refuse_greedy,
    scored,
    seeds_of,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_TOP_LOGPROBS = 1024


def filter_logits(
    logits: Tensor,
    adaptor: Adaptor,
    *,
    edits: Edits | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Returns the logits an adaptor leaves: survivors divided by T, all others -inf.

    Equivalent to transformers' warpers in the adaptor's order (`fastadapt.reference.filter_logits`
    is the rule in PyTorch). Reads the logits about twice, the second time from cache.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> filter_logits(logits, Adaptor(top_k=2))
        tensor([[2., 1., -inf, -inf]])

    Args:
        logits (Tensor): (..., V), float32, bfloat16 or float16, finite or -inf. The rows may have
            any stride; a last stride other than 1 costs one copy.
        adaptor (Adaptor): its per-row knobs, if any, have as many values as there are rows.
        edits (Edits | None): what is done to listed logits first, in float32; as many rows.
        allowed (Tensor | None): `(*logits.shape[:-1], ceil(V / 32))`, int32: the tokens that are
            left, bit j % 32 of word j // 32 for token j, as xgrammar and llguidance make them. All
            others are -inf, whatever edits say. V of the logits, or `num_tokens`.
        num_tokens (int | None): the real vocabulary of a padded head; tokens from there on are
            -inf. None: all.

    Returns:
        Tensor: shape and dtype of `logits`, contiguous. Survivors hold x / T, computed in float32
        as `x * fl(1 / T)` and rounded once; where temperature is 0 only the lowest id of the
        largest logit stays, undivided. A bad row (NaN, +inf, nothing finite; x / T counts) comes
        back as it is, edited.

        No survivor is infinite, so what stays is `out > -inf`. Where T < 1 takes a row of float16
        or bfloat16 beyond the range of its dtype (its largest x / T above the dtype's largest
        number, or below minus half of it), that row holds x / T less its largest, whose softmax is
        the same; survivors that are still too low hold the dtype's lowest number. x / T below
        float32's range is -inf: removed, here as in `sample`.

    Raises:
        TypeError: the dtype is not one of the three (`fastadapt.reference` takes float64), or of
            edits another.
        ValueError: no vocabulary dimension, a device other than the adaptor's, per-row knobs of
            another length; edits or words of allowed tokens that do not fit the logits.
    """
    rows = fold_rows("logits", logits, double=False)
    knobs = knobs_for(rows, adaptor)
    refuse_coin(adaptor)
    real, changes = edited_rows(rows, logits.shape[:-1], edits, allowed, num_tokens)
    out: Tensor = torch.ops.fastadapt.filter_logits(real, knobs, adaptor.filter_code, *changes)
    if padding := rows.shape[1] - real.shape[1]:
        out = torch.nn.functional.pad(out, (0, padding), value=float("-inf"))
    return out.view(logits.shape)


def sample(
    logits: Tensor,
    adaptor: Adaptor,
    *,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    generator: torch.Generator | None = None,
    base_logprobs: bool = False,
    log_mass: bool = False,
    top_logprobs: int = 0,
    support: bool = False,
    edits: Edits | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
    group: "ProcessGroup | None" = None,
) -> Sample:
    """Draws one token per row from the adapted distribution.

    Equivalent to `softmax(filter_logits(logits, adaptor)).multinomial(1)`, by an exact inverse CDF
    on 64-bit integer masses with one Philox number per row. A row's result depends on its own
    logits, knobs, seed and position and on nothing else: batch, threads, instruction set and device
    change no bit of it.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(5, 4)
        >>> drawn = sample(logits, Adaptor(top_p=0.9), seeds=torch.arange(5))
        >>> drawn.tokens, drawn.kept
        (tensor([1, 1, 0, 0, 1]), tensor([3, 3, 3, 3, 3], dtype=torch.int32))

    Args:
        logits (Tensor): (..., V), as in `filter_logits`.
        adaptor (Adaptor): as in `filter_logits`.
        seeds (Tensor | None): `logits.shape[:-1]`, int64, the Philox key of each row. None: drawn
            from `generator`, or from torch's default one, so that `torch.manual_seed` works.
        positions (Tensor | None): `logits.shape[:-1]`, int64, the Philox counter of each row (the
            number of tokens generated so far, say). None: 0.
        generator (torch.Generator | None): where seeds come from; none beside seeds.
        base_logprobs (bool): also return log-probabilities at temperature 1, unfiltered.
        log_mass (bool): also return the log of the kept mass at the adaptor's temperature.
        top_logprobs (int): n > 0: also return the n most probable ids with their base
            log-probabilities, and the rank of the drawn token. At most 1024 and at most V.
        support (bool): also return the ids that survived, however many, to train on exactly what
            was drawn from (`linear_support_log_odds`); not what edits did to their logits. On a GPU
            this waits for the device.
        edits (Edits | None): as in `filter_logits`. The base distribution is of edited logits too.
        allowed (Tensor | None): as in `filter_logits`.
        num_tokens (int | None): as in `filter_logits`; V is then this.
        group (ProcessGroup | None): a group over whose ranks the vocabulary is split: `logits` are
            this rank's, slices stand in the order of ranks and may be empty, and everything else is
            of the whole vocabulary and the same on all ranks, as is what comes back: the bits of
            one process. Without seeds those that the first rank draws hold. On the CPU.

    Returns:
        Sample: see there for shapes, dtypes and bad rows. Log-probabilities are exact to 2e-5.

    Raises:
        TypeError, ValueError: as `filter_logits`, and for seeds or positions that are no tensor or
            of the wrong dtype, shape or device, a generator of another device or beside seeds,
            `top_logprobs` out of range, a flag that is not a bool.
    """
    if group is not None:
        from fastadapt.sampling.sharded import sample_split

        return sample_split(
            logits, adaptor, group, seeds=seeds, positions=positions, generator=generator,
            base_logprobs=base_logprobs, log_mass=log_mass, top_logprobs=top_logprobs,
            support=support, edits=edits, allowed=allowed, num_tokens=num_tokens,
        )  # fmt: skip
    rows = fold_rows("logits", logits, double=False)
    knobs = knobs_for(rows, adaptor)
    shape = logits.shape[:-1]
    rows, changes = edited_rows(rows, shape, edits, allowed, num_tokens)
    most = min(MAX_TOP_LOGPROBS, rows.shape[1])
    top_logprobs = integer("top_logprobs", top_logprobs, 0, most)
    flag("base_logprobs", base_logprobs)
    flag("log_mass", log_mass)
    flag("support", support)
    if positions is not None:
        positions = per_row("positions", positions, torch.int64, shape, rows)
    seeds = seeds_of(seeds, generator, shape, rows)
    out = torch.ops.fastadapt.sample(
        rows, knobs, adaptor.filter_code, seeds, positions, base_logprobs, log_mass, top_logprobs,
        logits.shape[-1] if support else 0, *changes,
    )  # fmt: skip
    survived = None
    if support:
        *out, ids, offsets = out
        survived = Support.unchecked(ids, offsets, out[2] == logits.shape[-1])
    if logits.dim() != 2:
        out = [t.view(shape + t.shape[1:]) for t in out]
    fields = sample_fields(out, base_logprobs, log_mass, top_logprobs)
    return Sample(*fields, support=survived)


def score(
    logits: Tensor,
    tokens: Tensor,
    adaptors: Sequence[Adaptor],
    *,
    ignore_index: int = -100,
    support: bool = False,
    edits: Edits | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
    group: "ProcessGroup | None" = None,
) -> Score:
    """Returns the log-probabilities of given tokens under many adaptors at once.

    The support is decided by the rule that `sample` draws by, so a sampled token is always inside
    the support it is scored under. Each row is visited once for all adaptors; adaptors of equal
    temperature share one exponential pass.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> adaptors = [Adaptor(), Adaptor(top_k=2), Adaptor(top_k=1)]
        >>> scores = score(logits, torch.tensor([1]), adaptors)
        >>> scores.logprobs, scores.kept
        (tensor([[-1.4402, -1.3133,    -inf]]), tensor([[4, 2, 1]], dtype=torch.int32))

    Args:
        logits (Tensor): (..., V), as in `filter_logits`.
        tokens (Tensor): `logits.shape[:-1]`, int64, ids in [0, V) or `ignore_index`.
        adaptors (Sequence[Adaptor]): A of them, 1 to 256.
        ignore_index (int): rows with this token give zeros.
        support (bool): also return the ids of each support, one `Support` for each adaptor.
        edits (Edits | None): as in `sample`.
        allowed (Tensor | None): as in `sample`.
        num_tokens (int | None): as in `sample`.
        group (ProcessGroup | None): as in `sample`.

    Returns:
        Score: see there for shapes, dtypes and bad rows. Not differentiable: `adapted_logps` is.

    Raises:
        TypeError, ValueError: as `filter_logits`; a token out of range; temperature 0, whose
            distribution has no normaliser; no adaptor or more than 256.
    """
    if group is not None:
        from fastadapt.sampling.sharded import score_split

        return score_split(
            logits, tokens, adaptors, group, ignore_index=ignore_index, support=support,
            edits=edits, allowed=allowed, num_tokens=num_tokens,
        )  # fmt: skip
    rows = fold_rows("logits", logits, double=False)
    rows, changes = edited_rows(rows, logits.shape[:-1], edits, allowed, num_tokens)
    flat = per_row("tokens", tokens, torch.int64, logits.shape[:-1], rows)
    ignore_index = integer("ignore_index", ignore_index)
    flag("support", support)
    scored(adaptors)
    knobs = [knobs_for(rows, a, f"adaptors[{i}]") for i, a in enumerate(adaptors)]
    orders = [adaptor.filter_code for adaptor in adaptors]
    whole = logits.shape[-1] if support else 0
    out = torch.ops.fastadapt.score(rows, flat, knobs, orders, ignore_index, whole, *changes)
    supports = None
    if support:
        *out, ids, offsets = out
        full = (out[2] == whole).t().reshape(-1)
        supports = (*Support.unchecked(ids, offsets, full).split([flat.shape[0]] * len(knobs)),)
    fields = (t.view(tokens.shape + t.shape[1:]) for t in out)
    return Score(*fields)._replace(supports=supports)


def adapted_log_odds(
    logits: Tensor,
    tokens: Tensor,
    adaptor: Adaptor,
    *,
    ignore_index: int = -100,
    edits: Edits | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Returns each token's log-odds against the other survivors of the adaptor, differentiably.

    `m = s_y - logsumexp(s_j, j surviving, j != y)` with s = z / T: what every loss of this package
    takes, so that one trains on the support one samples from. The support is held constant and is
    decided on the values in float32.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
        >>> log_odds = adapted_log_odds(logits, torch.tensor([0]), Adaptor(top_k=2))
        >>> log_odds.sum().backward()
        >>> log_odds.detach(), logits.grad
        (tensor([1.]), tensor([[ 1., -1.,  0.,  0.]]))

    Args:
        logits (Tensor): (..., V), float32, bfloat16, float16, or float64 (for checks).
        tokens (Tensor): `logits.shape[:-1]`, int64, ids in [0, V) or `ignore_index`.
        adaptor (Adaptor): temperature above 0.
        ignore_index (int): rows with this token give 0 and no gradient.
        edits (Edits | None): as in `sample`, with logits of at most float32. Gradients pass through
            them, and reach the values of `Edits.set`.
        allowed (Tensor | None): as in `sample`, with logits of at most float32.
        num_tokens (int | None): as in `sample`.

    Returns:
        Tensor: shape of `tokens`, float32 (float64 for float64 logits), nats. -inf for a token
        outside the support, +inf for one that survives alone, NaN for a bad row; these three have
        zero gradient. `dm/dz = (onehot(y) - q) / T`, q the distribution of the other survivors. The
        backward reads the logits once and one bit a token, and raises when differentiated again.

    Raises:
        TypeError, ValueError: as `score`.
    """
    rows = fold_rows("logits", logits)
    no_tangent("logits", logits)
    rows, changes = edited_rows(rows, logits.shape[:-1], edits, allowed, num_tokens)
    flat = per_row("tokens", tokens, torch.int64, logits.shape[:-1], rows)
    ignore_index = integer("ignore_index", ignore_index)
    knobs = knobs_for(rows, adaptor)
    refuse_coin(adaptor)
    refuse_greedy(adaptor, "adapted_log_odds")
    log_odds: Tensor = torch.ops.fastadapt.adapted_log_odds(
        rows, flat, knobs, adaptor.filter_code, ignore_index, *changes
    )[0]
    return log_odds.view(tokens.shape)


def adapted_logps(
    logits: Tensor,
    tokens: Tensor,
    adaptor: Adaptor,
    *,
    ignore_index: int = -100,
    edits: Edits | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Returns log-probabilities under the adapted distribution, differentiably.

    Args and errors are those of `adapted_log_odds`. A token outside the support gives -inf and no
    gradient, one alone in it 0 and no gradient, an ignored row 0.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> adapted_logps(logits, torch.tensor([0]), Adaptor(top_k=2))
        tensor([-0.3133])
    """
    log_odds = adapted_log_odds(
        logits,
        tokens,
        adaptor,
        ignore_index=ignore_index,
        edits=edits,
        allowed=allowed,
        num_tokens=num_tokens,
    )
    logps = torch.nn.functional.logsigmoid(log_odds)
    return torch.where(tokens == ignore_index, 0.0, logps)
