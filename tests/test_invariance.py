"""A row's result depends on its own logits, knobs, seed and position, and on nothing else."""

import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastadapt import _C, Adaptor, adapted_log_odds, filter_logits, sample, score

V, N = 5003, 24
ASKED = {"base_logprobs": True, "log_mass": True, "top_logprobs": 5}
MORE_THAN_CORES = (os.cpu_count() or 1) + 3
# One for each way through the kernels: a plain draw, one threshold, several, a band.
KINDS = ["normal", "spread", "flat", "ties", "two_level", "one_hot", "holes", "far"]
ADAPTORS = {
    "temperature": Adaptor(temperature=0.8),
    "top_p": Adaptor(temperature=0.8, top_p=0.9),
    "top_k": Adaptor(top_k=50, top_p=0.95, min_p=1e-4),
    "typical": Adaptor(typical_p=0.9),
    "tails": Adaptor(temperature=1.2, epsilon_cutoff=1e-6, eta_cutoff=1e-4, order="vllm"),
}


@pytest.fixture
def batch(rows):
    """(x, seeds, positions): rows of every kind in one batch."""
    x = torch.cat([rows(kind, N // len(KINDS), V) for kind in KINDS])
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (N,)), torch.randint(2**62, (N,))
    return x, seeds.to(x.device), positions.to(x.device)


def pick(adaptor, index):
    """The adaptor of some of the rows."""
    names = ["temperature", "top_k", "top_p", "min_p", "typical_p", "eta_cutoff"]
    names.append("min_tokens_to_keep")
    return Adaptor(**{name: getattr(adaptor, name)[index] for name in names})


def everything(x, adaptor, seeds, positions, asked=ASKED):
    """All results of all verbs, as one list of tensors."""
    drawn = sample(x, adaptor, seeds=seeds, positions=positions, **asked)
    y = drawn.tokens
    leaf = x.detach().clone().requires_grad_()
    log_odds = adapted_log_odds(leaf, y, adaptor)
    upstream = torch.linspace(-1, 1, y.shape[0], device=x.device)
    (gradient,) = torch.autograd.grad(log_odds, leaf, upstream)
    many = score(x, y, [adaptor, Adaptor(top_p=0.9), Adaptor(temperature=2.0)])
    return [*drawn[:9], *many[:5], filter_logits(x, adaptor), log_odds.detach(), gradient]


def assert_all_equal(a, b):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_instruction_sets_agree(batch, per_row_adaptor):
    adaptor = per_row_adaptor(N, V)
    results = []
    for name in _C.cpu_capabilities():
        _C.set_cpu_capability(name)
        results.append(everything(batch[0], adaptor, *batch[1:]))
    for other in results[1:]:
        assert_all_equal(results[0], other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [1, 2, 31, 1000, 5003, 50_257, 128_256, 262_144])
def test_devices_agree(rows, on_device, per_row_adaptor, v, dtype):
    """All bits, except the last one of log-odds and the last digits of a gradient."""
    x = torch.cat([rows(kind, 1, v) for kind in KINDS]).to(dtype).cpu()
    n = x.shape[0]
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (n,)), torch.randint(2**62, (n,))
    digits = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    asked = {**ASKED, "top_logprobs": min(5, v)}
    for adaptor in (per_row_adaptor(n, v), *ADAPTORS.values()):
        arguments = (x, adaptor, seeds, positions, asked)
        *ours, log_odds, gradient = on_device(everything, *arguments)
        adaptor = on_device(lambda a: a, adaptor)
        *wanted, cpu_log_odds, cpu_gradient = everything(x, adaptor, *arguments[2:])
        assert_all_equal(wanted, ours)
        last = {"rtol": 2**-23, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(log_odds, cpu_log_odds, **last)
        small = torch.finfo(dtype).smallest_normal * (2**-10 if dtype == torch.float16 else 1)
        torch.testing.assert_close(gradient, cpu_gradient, rtol=digits, atol=small)


@pytest.mark.gpu
@pytest.mark.parametrize("v", [1000, 128_256])
def test_rows_of_a_large_batch_are_those_of_small_ones(rows, device, per_row_adaptor, v):
    """One program a row where there are many rows, several a row where there are few."""
    n = 300
    x = torch.cat([rows(kind, n // 3, v) for kind in ("spread", "ties", "normal")])
    seeds = torch.arange(n, device=device)
    adaptor = per_row_adaptor(n, v)
    together = sample(x, adaptor, seeds=seeds, **ASKED)
    for few in (1, 2, 17, 140):
        i = slice(95, 95 + few)
        alone = sample(x[i], pick(adaptor, i), seeds=seeds[i], **ASKED)
        assert_all_equal([t[i] for t in together[:9]], alone[:9])


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, N])
def test_every_call_gives_the_same_bits(batch, per_row_adaptor, n):
    """A race between programs would show sooner or later."""
    x, seeds, positions = (t[:n] for t in batch)
    adaptor = pick(per_row_adaptor(N, V), slice(n))
    first = everything(x, adaptor, seeds, positions)
    for _ in range(100):
        assert_all_equal(first, everything(x, adaptor, seeds, positions))


def test_instruction_sets_agree_on_the_sign_of_zero():
    """Zeros of both signs compete for the maximum; torch.equal would not see which one won."""
    x = torch.full((1, 4096), -100.0)
    x[0, 0], x[0, 1000] = -0.0, 0.0
    seen = set()
    for name in _C.cpu_capabilities():
        _C.set_cpu_capability(name)
        drawn = sample(x, Adaptor(top_p=0.1), seeds=torch.zeros(1, dtype=torch.int64))
        seen.add(str(drawn.logprobs.item()))
    assert len(seen) == 1


def test_unknown_instruction_set_raises():
    with pytest.raises(ValueError, match="cpu capability: not known .* 'sse9'"):
        _C.set_cpu_capability("sse9")


@pytest.mark.parametrize("threads", [2, 3, 7, MORE_THAN_CORES])
def test_threads_change_nothing(batch, per_row_adaptor, num_threads, threads):
    adaptor = per_row_adaptor(N, V)
    num_threads(1)
    one = everything(batch[0], adaptor, *batch[1:])
    num_threads(threads)
    assert_all_equal(one, everything(batch[0], adaptor, *batch[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ADAPTORS)
@pytest.mark.parametrize(("n", "v"), [(1, 5), (1, 1000), (1, 65_537), (1, 262_144), (3, 128_256)])
def test_fewer_rows_than_threads(rows, num_threads, n, v, name, dtype):
    """A row is the same bits whether or not several threads share it.

    Half precision differs by the conversion of what is loaded: one kind of rows shows it. Longer
    rows are more pieces of the same: two kinds.
    """
    kinds = ("spread", "power", "ties") if dtype == torch.float32 else ("spread",)
    kinds = kinds[:2] if v > 100_000 else kinds
    x = torch.cat([rows(kind, n, v) for kind in kinds]).to(dtype)
    seeds = torch.arange(n)
    for part in x.split(n):
        num_threads(1)
        one = everything(part, ADAPTORS[name], seeds, seeds)
        for threads in (2, 3, 7) if dtype == torch.float32 else (3,):
            num_threads(threads)
            assert_all_equal(one, everything(part, ADAPTORS[name], seeds, seeds))


def test_bad_and_good_rows_share_threads(rows, num_threads):
    """A row that fails early frees its thread; its batch mates are what they are without it."""
    x = rows("spread", 6, 70_000)
    x[1, 69_999], x[3] = float("nan"), float("-inf")
    seeds = torch.arange(6)
    num_threads(1)
    one = sample(x, ADAPTORS["top_p"], seeds=seeds, **ASKED)
    assert one.status.tolist() == [0, 1, 0, 3, 0, 0]
    for threads in (2, 5, MORE_THAN_CORES):
        num_threads(threads)
        assert_all_equal(one, sample(x, ADAPTORS["top_p"], seeds=seeds, **ASKED))


def test_row_alone_is_row_in_batch(device, batch, per_row_adaptor):
    x, seeds, positions = batch
    adaptor = per_row_adaptor(N, V)
    together = sample(x, adaptor, seeds=seeds, positions=positions, **ASKED)
    for r in range(N):
        i = slice(r, r + 1)
        alone = sample(x[i], pick(adaptor, i), seeds=seeds[i], positions=positions[i], **ASKED)
        assert_all_equal([t[i] for t in together[:9]], alone[:9])


def test_permuted_batch_gives_permuted_result(device, batch, per_row_adaptor):
    x, seeds, positions = batch
    adaptor, order = per_row_adaptor(N, V), torch.randperm(N).to(device)
    plain = sample(x, adaptor, seeds=seeds, positions=positions, **ASKED)
    shuffled = sample(
        x[order], pick(adaptor, order), seeds=seeds[order], positions=positions[order], **ASKED
    )
    assert_all_equal([t[order] for t in plain[:9]], shuffled[:9])


def test_strides_change_nothing(device, batch, per_row_adaptor):
    x, seeds, positions = batch
    adaptor = per_row_adaptor(N, V)
    plain = everything(x, adaptor, seeds, positions)
    padded = torch.full((N, V + 61), float("nan"), device=device)
    padded[:, 3 : V + 3] = x
    column_major = x.t().contiguous().t()
    for view in (padded[:, 3 : V + 3], column_major, torch.stack([x, x * 0])[0]):
        assert_all_equal(plain, everything(view, adaptor, seeds, positions))


@pytest.mark.parametrize("v", [4096, 4099])
def test_alignment_changes_nothing(rows, device, v):
    """Rows that start at and apart by what is a multiple of 16 bytes and what is not."""
    for dtype in (torch.float32, torch.bfloat16):
        x, seeds = rows("spread", 3, v).to(dtype), torch.arange(3, device=device)
        plain = everything(x, ADAPTORS["top_k"], seeds, seeds)
        for offset, gap in ((0, 1), (1, 0), (3, 13), (16, 16)):
            room = torch.full((offset + 3 * (v + gap),), float("nan"), dtype=dtype, device=device)
            view = room[offset:].view(3, v + gap)[:, :v]
            view.copy_(x)
            assert_all_equal(plain, everything(view, ADAPTORS["top_k"], seeds, seeds))


def test_expanded_row_is_read_in_place(device, batch, per_row_adaptor):
    x, seeds, positions = batch
    wide, repeated = x[:1].expand(N, -1), x[:1].repeat(N, 1)
    adaptor = per_row_adaptor(N, V)
    assert_all_equal(
        everything(repeated, adaptor, seeds, positions), everything(wide, adaptor, seeds, positions)
    )


def test_leading_dimensions_fold(device, batch, per_row_adaptor):
    x, seeds, positions = batch
    adaptor = per_row_adaptor(N, V)
    flat = sample(x, adaptor, seeds=seeds, positions=positions, **ASKED)
    shape = (2, 3, N // 6)
    folded = sample(
        x.view(*shape, V),
        adaptor,
        seeds=seeds.view(shape),
        positions=positions.view(shape),
        **ASKED,
    )
    assert folded.tokens.shape == shape
    assert folded.top_ids.shape == (*shape, 5)
    assert_all_equal(flat[:9], [t.reshape(N, *t.shape[3:]) for t in folded[:9]])
    one = sample(x[0], Adaptor(top_p=0.9), seeds=seeds[0])
    assert one.tokens.shape == ()


def test_empty_batch_and_smallest_vocabulary(device):
    empty = torch.empty(0, V, device=device)
    drawn = sample(empty, Adaptor(top_p=0.9), **ASKED)
    assert [tuple(t.shape) for t in drawn[:9]] == [(0,)] * 6 + [(0, 5)] * 2 + [(0,)]
    assert filter_logits(empty, Adaptor()).shape == (0, V)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert score(empty, none, [Adaptor()]).logprobs.shape == (0, 1)
    assert adapted_log_odds(empty.requires_grad_(), none, Adaptor()).shape == (0,)
    lone = torch.tensor([[-5.0]], device=device)
    single = sample(lone, Adaptor(top_p=0.1, typical_p=0.1, epsilon_cutoff=0.9))
    assert (single.tokens.item(), single.logprobs.item(), single.kept.item()) == (0, 0.0, 1)


def test_python_threads_may_call_at_once(device, batch, per_row_adaptor):
    """Eight callers, each with a number of OpenMP threads of its own and another adaptor first."""
    x, seeds, positions = batch
    adaptors = [per_row_adaptor(N, V), *ADAPTORS.values()]
    wanted = [everything(x, adaptor, seeds, positions) for adaptor in adaptors]
    results = []

    def work(caller):
        torch.set_num_threads(1 + caller % 4)  # of the calling thread only
        for i in range(2 * len(adaptors)):
            at = (caller + i) % len(adaptors)
            results.append((at, everything(x, adaptors[at], seeds, positions)))

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(caller,)) for caller in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_num_threads() == before
    assert len(results) == 8 * 2 * len(adaptors)
    for at, result in results:
        assert_all_equal(wanted[at], result)


def test_forked_child_with_one_thread_works():
    """A child of a process whose thread pool has run must enter no parallel region."""
    code = """
import os, torch, fastadapt
torch.set_num_threads(3)
adaptor = fastadapt.Adaptor(top_p=0.9)
many, seeds = torch.randn(64, 1000), torch.arange(64)
long = torch.randn(1, 262144)

def draw():
    drawn = fastadapt.sample(many, adaptor, seeds=seeds)
    scored = fastadapt.score(many, drawn.tokens, [adaptor])
    one = fastadapt.sample(long, adaptor, seeds=seeds[:1])
    return [drawn.tokens, drawn.logprobs, scored.log_norm, one.tokens, one.logprobs]

wanted = draw()  # starts the pool
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, draw(), wanted)) else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
os._exit(status or (0 if all(map(torch.equal, draw(), wanted)) else 4))  # the pool still runs
"""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    done = subprocess.run(command, timeout=120, check=False)
    assert done.returncode == 0


CPUINFO = Path("/proc/cpuinfo")
NEEDS = {
    "avx2": {"avx2", "f16c"},
    "avx512": {"avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


@pytest.mark.skipif(
    not CPUINFO.exists() or platform.machine() != "x86_64", reason="reads /proc/cpuinfo of x86-64"
)
def test_capabilities_are_what_the_system_says() -> None:
    """The extension asks the processor itself; Linux asks it too."""
    flags = set(re.search(r"^flags\s*: (.*)$", CPUINFO.read_text(), re.MULTILINE)[1].split())
    expected = ["scalar", *(name for name, needed in NEEDS.items() if needed <= flags)]
    assert list(_C.cpu_capabilities()) == expected
