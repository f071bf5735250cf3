"""Signatures of the C++ extension; addresses are those of contiguous tensors, 0 for none."""

Rows = tuple[int, int, int, int, int]  # address, dtype code, n, v, row stride in elements
Tile = tuple[Rows, int, int, int, float, float]  # rows, first id, labels, bias or 0, scale, cap
Knobs = tuple[int, int, int]  # address of (8, R) float64, R, order code

def filter(rows: Rows, knobs: Knobs, out: int, num_threads: int) -> None: ...
def sample(
    rows: Rows,
    knobs: Knobs,
    seeds: int,
    positions: int,
    tokens: int,
    logprobs: int,
    kept: int,
    status: int,
    base_logprobs: int,
    log_mass: int,
    top_n: int,
    top_ids: int,
    top_logprobs: int,
    rank: int,
    num_threads: int,
) -> None: ...
def score(
    rows: Rows,
    adaptors: list[Knobs],
    tokens: int,
    ignore_index: int,
    logprobs: int,
    log_norm: int,
    kept: int,
    base_logprobs: int,
    entropy: int,
    num_threads: int,
) -> None: ...
def log_odds(
    rows: Rows,
    knobs: Knobs,
    tokens: int,
    ignore_index: int,
    out: int,
    support: int,
    stats: int,
    num_threads: int,
) -> None: ...
def log_odds_backward(
    rows: Rows,
    knobs: Knobs,
    tokens: int,
    ignore_index: int,
    dlog_odds: int,
    support: int,
    stats: int,
    dlogits: int,
    num_threads: int,
) -> None: ...
def label_log_odds(
    rows: Rows, labels: int, ignore_index: int, out: int, stats: int, num_threads: int
) -> None: ...
def label_log_odds_backward(
    rows: Rows,
    labels: int,
    ignore_index: int,
    dlog_odds: int,
    stats: int,
    dlogits: int,
    num_threads: int,
) -> None: ...
def candidate_log_odds(
    rows: Rows, k: int, index: int, mask: int, out: int, stats: int, num_threads: int
) -> None: ...
def candidate_log_odds_backward(
    rows: Rows,
    k: int,
    index: int,
    mask: int,
    dlog_odds: int,
    stats: int,
    dlogits: int,
    num_threads: int,
) -> None: ...
def tile(
    tile: Tile, weighted: bool, stats: int, exps: int, shrinks: int, num_threads: int
) -> None: ...
def tile_backward(tile: Tile, stats: int, gains: int, out: int, num_threads: int) -> None: ...
def mix(
    dtype: int,
    n: int,
    h: int,
    dst: int,
    factor: int,
    gain: int,
    index: int,
    src: int,
    src_stride: int,
    num_threads: int,
) -> None: ...
def scatter(
    dtype: int, n: int, h: int, src: int, gain: int, index: int, out: int, num_threads: int
) -> None: ...
def dot(
    dtype: int,
    n: int,
    h: int,
    a: int,
    a_stride: int,
    b: int,
    b_stride: int,
    index: int,
    out: int,
    num_threads: int,
) -> None: ...
def prefer_huge_pages(address: int, bytes: int) -> None: ...
def first_bad_token(tokens: int, n: int, v: int, ignore_index: int) -> int: ...
def cpu_capabilities() -> list[str]: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
