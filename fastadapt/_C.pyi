"""Signatures of the C++ extension; addresses are those of contiguous tensors, 0 for none."""

Rows = tuple[int, int, int, int, int]  # address, dtype code, n, v, row stride in elements
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
def margins(
    rows: Rows,
    knobs: Knobs,
    tokens: int,
    ignore_index: int,
    out: int,
    support: int,
    stats: int,
    num_threads: int,
) -> None: ...
def margins_backward(
    rows: Rows,
    knobs: Knobs,
    tokens: int,
    ignore_index: int,
    dmargins: int,
    support: int,
    stats: int,
    dlogits: int,
    num_threads: int,
) -> None: ...
def first_bad_token(tokens: int, n: int, v: int, ignore_index: int) -> int: ...
def cpu_capabilities() -> list[str]: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
