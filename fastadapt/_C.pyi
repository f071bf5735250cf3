"""Signatures of the C++ extension: the fields of csrc/kernels.h by name, contiguous tensors."""

from typing import TypedDict, Unpack

from torch import Tensor

Rows = tuple[Tensor, int, int, int, int]  # logits, dtype code, n, v, row stride in elements
Knobs = tuple[Tensor, int, int, bool]  # (14, R) float64, R, filters in order, temperature last
# ids, offsets, columns, their length, whether they are given values, words of allowed ids, stride
Edits = tuple[Tensor | None, Tensor | None, Tensor | None, int, bool, Tensor | None, int]

class Tile(TypedDict):
    rows: Rows
    first: int
    k: int
    labels: Tensor
    bias: Tensor | None
    scale: float
    cap: float

class Problems(TypedDict):  # rows.n of them
    rows: Rows
    first: int
    row: Tensor
    inverse: Tensor
    m: Tensor
    cut: Tensor
    least: Tensor
    guard: Tensor
    centre: Tensor
    band: Tensor

def pairs_among(
    labels: Tensor,
    used: Tensor,
    full: Tensor,
    ids: Tensor,
    offsets: Tensor,
    out_ids: Tensor,
    ends: Tensor,
    own: Tensor,
    without: Tensor,
    n: int,
) -> int: ...
def log_odds_among(
    z: Tensor, ends: Tensor, own: Tensor, without: Tensor, m: Tensor, n: int
) -> None: ...
def log_odds_among_backward(
    dm: Tensor, z: Tensor, ends: Tensor, own: Tensor, dz: Tensor, n: int
) -> None: ...

class IdLists:  # each made in its time, to be joined in compressed rows
    def __init__(self, n: int, whole: int) -> None: ...
    def count(self) -> int: ...
    def join(self, offsets: Tensor, ids: Tensor) -> None: ...

# the layout of the statistics of a row
OTHERS_MAX: int
OTHERS_SUM: int
OTHERS_WEIGHTED: int
TOP_ID: int
LABEL_LOGIT: int
OTHERS_SQUARED: int
OTHERS_REST: int
NUM_STATS: int
NUM_TILE_STATS: int

# the layout of the statistics of a row of two heads, and the kinds of divergence
STUDENT_MAX: int
STUDENT_SUM: int
TEACHER_MAX: int
TEACHER_SUM: int
DIVERGENCE: int
CENTRE: int
NUM_PAIR_STATS: int
KL: int
REVERSE_KL: int
JSD: int

def filter(
    *, rows: Rows, knobs: Knobs, edits: Edits | None, out: Tensor, num_threads: int
) -> None: ...
def sample(
    *,
    rows: Rows,
    knobs: Knobs,
    edits: Edits | None,
    seeds: Tensor,
    positions: Tensor | None,
    tokens: Tensor,
    logprobs: Tensor,
    kept: Tensor,
    status: Tensor,
    base_logprobs: Tensor | None,
    log_mass: Tensor | None,
    top_n: int,
    top_ids: Tensor | None,
    top_logprobs: Tensor | None,
    rank: Tensor | None,
    supports: IdLists | None,
    num_threads: int,
) -> None: ...
def verify(
    *,
    rows: Rows,
    knobs: Knobs,
    edits: Edits | None,
    k: int,
    draft: Tensor,
    lengths: Tensor | None,
    draft_rows: Rows | None,
    draft_knobs: Knobs | None,
    seeds: Tensor,
    positions: Tensor | None,
    tokens: Tensor,
    accepted: Tensor,
    logprobs: Tensor,
    kept: Tensor,
    status: Tensor,
    supports: IdLists | None,
    num_threads: int,
) -> None: ...
def score(
    *,
    rows: Rows,
    knobs: list[Knobs],
    edits: Edits | None,
    tokens: Tensor,
    ignore_index: int,
    logprobs: Tensor,
    log_norm: Tensor,
    kept: Tensor,
    base_logprobs: Tensor,
    entropy: Tensor,
    supports: IdLists | None,
    num_threads: int,
) -> None: ...
def slice_tally(
    *,
    typicality: bool,
    g: int,
    pivots: Tensor | None,
    sums: Tensor,
    num_threads: int,
    **problems: Unpack[Problems],
) -> None: ...
def slice_best(
    *,
    typicality: bool,
    end: Tensor,
    count: int,
    x: Tensor,
    ids: Tensor,
    num_threads: int,
    **problems: Unpack[Problems],
) -> None: ...
def slice_top(
    *, rows: Rows, first: int, count: int, x: Tensor, ids: Tensor, num_threads: int
) -> None: ...
def slice_find(
    *,
    target: Tensor,
    x: Tensor,
    ids: Tensor,
    num_threads: int,
    **problems: Unpack[Problems],
) -> None: ...
def slice_list(*, supports: IdLists, num_threads: int, **problems: Unpack[Problems]) -> None: ...
def masses(*, n: int, d: Tensor, w: Tensor, u: Tensor, num_threads: int) -> None: ...
def targets(
    *,
    n: int,
    seeds: Tensor,
    positions: Tensor,
    totals: Tensor,
    targets: Tensor,
    num_threads: int,
) -> None: ...
def logs(*, n: int, masses: Tensor, logs: Tensor, num_threads: int) -> None: ...
def exps(*, n: int, x: Tensor, exps: Tensor, num_threads: int) -> None: ...
def log_odds(
    *,
    rows: Rows,
    knobs: Knobs,
    edits: Edits | None,
    tokens: Tensor,
    ignore_index: int,
    log_odds: Tensor,
    support: Tensor,
    stats: Tensor,
    num_threads: int,
) -> None: ...
def log_odds_backward(
    *,
    rows: Rows,
    knobs: Knobs,
    edits: Edits | None,
    tokens: Tensor,
    ignore_index: int,
    dlog_odds: Tensor,
    support: Tensor,
    stats: Tensor,
    dlogits: Tensor,
    dgiven: Tensor | None,
    num_threads: int,
) -> None: ...
def label_log_odds(
    *,
    rows: Rows,
    labels: Tensor,
    ignore_index: int,
    log_odds: Tensor,
    stats: Tensor,
    num_threads: int,
) -> None: ...
def label_log_odds_backward(
    *,
    rows: Rows,
    labels: Tensor,
    ignore_index: int,
    dlog_odds: Tensor,
    stats: Tensor,
    dlogits: Tensor,
    num_threads: int,
) -> None: ...
def candidate_log_odds(
    *,
    rows: Rows,
    k: int,
    index: Tensor,
    mask: Tensor | None,
    log_odds: Tensor,
    stats: Tensor,
    num_threads: int,
) -> None: ...
def candidate_log_odds_backward(
    *,
    rows: Rows,
    k: int,
    index: Tensor,
    mask: Tensor | None,
    dlog_odds: Tensor,
    stats: Tensor,
    dlogits: Tensor,
    num_threads: int,
) -> None: ...
def tile(
    *,
    moments: bool,
    stats: Tensor,
    exps: Tensor | None,
    shrinks: Tensor,
    num_threads: int,
    **tile: Unpack[Tile],
) -> None: ...
def tile_backward(
    *,
    moments: bool,
    stats: Tensor,
    gains: Tensor,
    out: Tensor,
    num_threads: int,
    **tile: Unpack[Tile],
) -> None: ...
def pair_sum(
    *,
    rows: Rows,
    bias: Tensor | None,
    scale: float,
    cap: float,
    teacher: Tensor,
    teacher_stride: int,
    teacher_bias: Tensor | None,
    teacher_scale: float,
    teacher_cap: float,
    kind: int,
    beta: float,
    stats: Tensor,
    mixing: bool,
    num_threads: int,
) -> None: ...
def pair_backward(
    *,
    rows: Rows,
    bias: Tensor | None,
    scale: float,
    cap: float,
    teacher: Tensor,
    teacher_stride: int,
    teacher_bias: Tensor | None,
    teacher_scale: float,
    teacher_cap: float,
    kind: int,
    beta: float,
    stats: Tensor,
    gains: Tensor,
    out: Tensor,
    num_threads: int,
) -> None: ...
def mix(
    *,
    dtype: int,
    n: int,
    h: int,
    k: int,
    offsets: Tensor | None,
    dst: Tensor,
    factor: Tensor | None,
    gain: Tensor | None,
    index: Tensor | None,
    src: Tensor,
    src_stride: int,
    num_threads: int,
) -> None: ...
def scatter(
    *,
    dtype: int,
    n: int,
    h: int,
    src: Tensor,
    gain: Tensor | None,
    index: Tensor | None,
    out: Tensor,
    num_threads: int,
) -> None: ...
def dot(
    *,
    dtype: int,
    n: int,
    h: int,
    k: int,
    offsets: Tensor | None,
    a: Tensor,
    a_stride: int,
    b: Tensor,
    b_stride: int,
    index: Tensor | None,
    out: Tensor,
    num_threads: int,
) -> None: ...

# drafts, their number a row, offsets, ids, columns, threads; without ids offsets alone are made
Lists = tuple[Tensor | None, int, Tensor, Tensor | None, Tensor | None, int]

class Sequences:
    def __init__(self, ids: list[int], offsets: list[int], biases: list[float]) -> None: ...

class History:
    def __init__(
        self, tokens: Tensor, n: int, stride: int, counts: Tensor, starts: Tensor, prompts: Tensor
    ) -> None: ...
    def rows(self) -> int: ...
    def length(self, row: int, counted: int) -> int: ...
    def row(self, row: int) -> tuple[list[int], int, int]: ...  # tokens, start, end of the prompt
    def append(self, tokens: Tensor, stride: int, counts: int | Tensor) -> None: ...
    def keep(self, rows: list[int]) -> None: ...
    def extend(self, other: History) -> None: ...
    # each returns how many ids there are, and the largest or -1
    def penalties(
        self,
        lists: Lists,
        counted: int,
        repeats: int,
        repetition: float | Tensor,
        presence: float | Tensor,
        frequency: float | Tensor,
        window: int | Tensor,
    ) -> tuple[int, int]: ...
    def n_grams(self, lists: Lists, counted: int, n: int) -> tuple[int, int]: ...
    def min_length(
        self, lists: Lists, counted: int, ids: list[int], least: int | Tensor
    ) -> tuple[int, int]: ...
    def dry(
        self,
        lists: Lists,
        counted: int,
        multiplier: float | Tensor,
        base: float,
        allowed_length: int,
        breakers: list[int],
        window: int | Tensor,
        longest: int,
    ) -> tuple[int, int]: ...
    def sequences(
        self, lists: Lists, counted: int, of_rows: list[Sequences]
    ) -> tuple[int, int]: ...

def join_edits(
    first: Edits,
    after: Edits,
    n: int,
    offsets: Tensor,
    ids: Tensor | None,
    columns: Tensor | None,
) -> int: ...
def first_bad_token(tokens: Tensor, v: int, ignore_index: int) -> int: ...
def cpu_capabilities() -> list[str]: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
