"""Named tuples that group the arguments and results of the kernels."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastadapt import _C

# The statistics of a row, as csrc/kernels.h lays them out.
NUM_STATS = tl.constexpr(_C.NUM_STATS)
NUM_TILE_STATS = tl.constexpr(_C.NUM_TILE_STATS)
OTHERS_MAX = tl.constexpr(_C.OTHERS_MAX)
OTHERS_SUM = tl.constexpr(_C.OTHERS_SUM)
OTHERS_WEIGHTED = tl.constexpr(_C.OTHERS_WEIGHTED)
TOP_ID = tl.constexpr(_C.TOP_ID)
LABEL_LOGIT = tl.constexpr(_C.LABEL_LOGIT)
OTHERS_SQUARED = tl.constexpr(_C.OTHERS_SQUARED)
OTHERS_REST = tl.constexpr(_C.OTHERS_REST)


class Rows(NamedTuple):
    """Rows of logits."""

    logits: Any  # (N, V)
    stride: Any  # of rows, in elements
    v: Any


@triton.jit
def row_at(rows, at):
    """The logits of a row."""
    return rows.logits + at.to(tl.int64) * rows.stride


class Scratch(NamedTuple):
    """Memory of a call: a record for each virtual row, and where its parts lie, in int64.

    A virtual row is a row of logits under one adaptor; adaptors vary fastest. What is of the row
    whatever the adaptor is in the record of its first one. All but `memory` and `words` follow from
    V and are known at compile time.
    """

    memory: Any  # (N A, RECORD) int64
    words: Any  # counters, then histograms, that a call uses
    RECORD: Any
    BOUNDS: Any  # what the filters come to
    SUMS: Any  # masses of blocks, the first of five such parts and one of int32
    LARGEST: Any  # of tiles
    SUPERS: Any  # of super-groups
    GROUPS: Any  # of groups
    LISTS: Any  # the first of two lists, each of scaled logits and ids


class Parts(NamedTuple):
    """The largest logit of each tile, super-group and group of a row; NaN if one entry is NaN."""

    largest: Any  # (splits,) float32
    supers: Any  # (number of them,) float32
    groups: Any  # (splits COLUMNS,) float32
    splits: Any  # tiles of a row


class Weights(NamedTuple):
    """Integer masses by block of a virtual row; once it is decided, of its survivors."""

    sums: Any  # (blocks,) int64: masses, and masses times -d
    surprisal_sums: Any
    base_sums: Any  # (blocks,) int64: the same at temperature 1, of the row's first adaptor
    base_surprisal_sums: Any
    kept_sums: Any  # (blocks,) int64: what is known of the survivors' masses
    finite: Any  # (blocks,) int32: finite logits, or survivors
    tied: Any  # (blocks,) int32: tokens of the level of its list or bracket
    blocks: Any


class Sizes(NamedTuple):
    """Sizes that follow from a plan and V, known at compile time; powers of two."""

    COLUMNS: Any  # groups of a tile
    GROUP: Any  # logits of a group
    PER_TILE: Any  # super-groups of a tile
    AHEAD: Any  # logits of a group that a thread loads before it looks at them
    BLOCK: Any  # logits that are looked at together
    STEP: Any  # where a cut is searched
    ROOM: Any  # tokens that a list has room for in memory
    BINS: Any  # of a histogram
    SPLITS: Any  # at least Parts.splits
    BLOCKS: Any  # at least Weights.blocks
    LIST: Any  # tokens that a program holds at once
    ALONE: Any  # whether a program looks at its list alone, put in order, and never at a row
    PLAIN: Any  # whether no filter but top-k and top-p may act


class Knobs(NamedTuple):
    """The knobs of a virtual row."""

    first: Any  # pointer
    step: Any
    vllm: Any


class Row(NamedTuple):
    """A virtual row."""

    logits: Any  # pointer
    v: Any
    inverse: Any  # 1 / T
    m: Any  # the largest scaled logit


class Bounds(NamedTuple):
    """The conditions under which tokens of a row survive."""

    cut: Any  # int64: the lowest rank that stays
    mass: Any  # of min-p: the least mass that stays, or
    guard: Any  # the rank from which any mass stays
    cutoff: Any  # of epsilon and eta: the same
    cutoff_guard: Any
    band: Any  # of typical: the lowest rank of -kappa that stays
    centre: Any  # float32: U / Z


class List(NamedTuple):
    """A list of tokens in memory."""

    s: Any  # pointers: scaled logits, ids
    ids: Any


class Tokens(NamedTuple):
    """Where tokens of a row come from: a list that holds all that matter, or the row."""

    row: Row
    list: List
    number: Any  # of the list's tokens, -1 for the row


class Bracket(NamedTuple):
    """The bin of a row in which its nucleus ends."""

    stage: Any
    by_kappa: Any
    centre: Any
    reach: Any  # of all bins together
    end: Any  # which it is


class Held(NamedTuple):
    """The list of a virtual row that a program has loaded, and its counts."""

    number: Any
    partial: Any  # that of the bracket alone
    whole: Any  # tokens of the list from the floor up, -1 where it has no room for all
    counted: Any  # whether what is above the bracket is summed and counted by blocks
    above: Any  # the mass above the bracket, and within it
    within: Any
    one: Any  # whether the bracket is one kappa, which no list is needed for, and its rank
    rank: Any
    tied: Any  # tokens of its level, its last entry; 0 where it has none


class Found(NamedTuple):
    """The loaded list of a virtual row; with `ALONE` sorted, best first."""

    held: Held
    floor: Any
    s: Any  # (LIST,) if `ALONE`, else nothing
    ids: Any
    listed: List  # the one from the floor up, in memory
    spare: List  # where that is, or room for another list


class Progress(NamedTuple):
    """A row between two of its filters."""

    bounds: Bounds
    z: Any  # mass and surprisal mass of the survivors, and whether they are known
    u: Any
    known: Any
    known_u: Any
    partial: Any  # whether what is held is the list of a bracket, of use to the first filter
    inside: Any  # whether the list holds all survivors
    tied: Any  # tokens of its level that the cut keeps
    typical_ran: Any
    undecided: Any
    never: Any  # false, where it is not a constant


class Decision(NamedTuple):
    """A row after its filters have run."""

    row: Row
    bounds: Bounds
    status: Any
    greedy: Any  # T is 0
    inside: Any  # whether the list holds all survivors; else the masses of blocks are theirs
    tied: Any  # tokens of its level that the cut keeps
    state: Any  # DECIDED, or what is left to do
    kept: Any
    total: Any  # mass of the survivors


class Outcome(NamedTuple):
    """The state and the results of a row."""

    status: Any
    greedy: Any
    kept: Any
    total: Any  # mass of the survivors
    all_mass: Any  # of all tokens at the same temperature, where it is asked for
    token: Any


class Chance(NamedTuple):
    """Seeds and positions of a draw."""

    seeds: Any  # (N,) int64
    positions: Any  # (N,) int64


class Drawn(NamedTuple):
    """The fields of `sample`'s result, but for the top tokens of the base distribution."""

    tokens: Any  # (N,) int64
    logprobs: Any  # (N,) float32
    kept: Any  # (N,) int32
    status: Any  # (N,) uint8
    base_logprobs: Any  # (N,) float32
    log_masses: Any  # (N,) float32


class Scored(NamedTuple):
    """The fields of `score`'s result."""

    logprobs: Any  # (N, A) float32
    log_norms: Any  # (N, A) float32
    kept: Any  # (N, A) int32
    base_logprobs: Any  # (N,) float32
    entropies: Any  # (N,) float32


class Labels(NamedTuple):
    """One token per row."""

    ids: Any  # (N,) int64
    ignore_index: Any


class Support(NamedTuple):
    """What is kept of each row's survivors for its log-odds."""

    support: Any  # (N, ceil(V / 8)) uint8: a bit a token
    largest_others: Any  # (N, blocks) float64: largest scaled logit among the surviving others
    blocks: Any


class Sums(NamedTuple):
    """Maximum and sum of each tile of a row without the label."""

    tops: Any  # (N, tiles) float64: the largest
    totals: Any  # (N, tiles) float64: sum of e^(x - top)
    tiles: Any


class Tops(NamedTuple):
    """The largest entry of each tile of a row, and maximum and sum of the rest."""

    tops: Any  # (N, tiles) float64
    first_ids: Any  # (N, tiles) int32: its lowest id
    seconds: Any  # (N, tiles) float64: the largest of the rest
    totals: Any  # (N, tiles) float64: sum of e^(x - second) over the rest
    tiles: Any


class Candidates(NamedTuple):
    """Several ids per row."""

    index: Any  # (N, K) int64
    mask: Any  # (N, K) uint8
    number: Any  # K


class Entries(NamedTuple):
    """The statistics of a row's entries."""

    best: Any  # id of the largest
    top: Any  # its logit
    second: Any  # the largest of the rest
    total: Any  # sum of e^(x - second) over the rest
