"""A row's result depends on its own logits, knobs, seed and position, and on nothing else."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from fastadapt import _C, Adaptor, adapted_margins, filter_logits, sample, score

V, N = 5003, 24
ASKED = {"base_logprobs": True, "log_mass": True, "top_logprobs": 5}
MORE_THAN_CORES = (os.cpu_count() or 1) + 3
# One for each way through the kernels: a plain draw, one threshold, several, a band.
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
    kinds = ["normal", "spread", "flat", "ties", "two_level", "one_hot", "holes", "far"]
    x = torch.cat([rows(kind, N // len(kinds), V) for kind in kinds])
    return x, torch.randint(-(2**63), 2**63 - 1, (N,)), torch.randint(2**62, (N,))


def per_row_adaptor():
    """Every knob differs from row to row."""
    r = torch.rand(N, 5).double()
    return Adaptor(
        temperature=0.5 + r[:, 0],
        top_k=torch.randint(0, V, (N,)),
        top_p=0.5 + r[:, 1] / 2,
        min_p=r[:, 2] * 1e-3,
        typical_p=0.5 + r[:, 3] / 2,
        eta_cutoff=r[:, 4] * 1e-3,
        min_tokens_to_keep=torch.randint(1, 4, (N,)),
    )


def pick(adaptor, index):
    """The adaptor of some of the rows."""
    names = ["temperature", "top_k", "top_p", "min_p", "typical_p", "eta_cutoff"]
    names.append("min_tokens_to_keep")
    return Adaptor(**{name: getattr(adaptor, name)[index] for name in names})


def everything(x, adaptor, seeds, positions):
    """All results of all verbs, as one list of tensors."""
    drawn = sample(x, adaptor, seeds=seeds, positions=positions, **ASKED)
    y = drawn.tokens
    leaf = x.detach().clone().requires_grad_()
    margins = adapted_margins(leaf, y, adaptor)
    upstream = torch.linspace(-1, 1, y.shape[0])
    (gradient,) = torch.autograd.grad(margins, leaf, upstream)
    many = score(x, y, [adaptor, Adaptor(top_p=0.9), Adaptor(temperature=2.0)])
    return [*drawn, *many, filter_logits(x, adaptor), margins.detach(), gradient]


def assert_all_equal(a, b):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_instruction_sets_agree(batch):
    adaptor = per_row_adaptor()
    results = []
    for name in _C.cpu_capabilities():
        _C.set_cpu_capability(name)
        results.append(everything(batch[0], adaptor, *batch[1:]))
    for other in results[1:]:
        assert_all_equal(results[0], other)


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
def test_threads_change_nothing(batch, num_threads, threads):
    adaptor = per_row_adaptor()
    num_threads(1)
    one = everything(batch[0], adaptor, *batch[1:])
    num_threads(threads)
    assert_all_equal(one, everything(batch[0], adaptor, *batch[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ADAPTORS)
@pytest.mark.parametrize(("n", "v"), [(1, 5), (1, 1000), (1, 65_537), (1, 262_144), (3, 128_256)])
def test_fewer_rows_than_threads(rows, num_threads, n, v, name, dtype):
    """A row is the same bits whether or not several threads share it."""
    x = torch.cat([rows(kind, n, v) for kind in ("spread", "ties", "power")]).to(dtype)
    seeds = torch.arange(n)
    for part in x.split(n):
        num_threads(1)
        one = everything(part, ADAPTORS[name], seeds, seeds)
        for threads in (2, 3, 4, 7):
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


def test_row_alone_is_row_in_batch(batch):
    x, seeds, positions = batch
    adaptor = per_row_adaptor()
    together = sample(x, adaptor, seeds=seeds, positions=positions, **ASKED)
    for r in range(N):
        i = slice(r, r + 1)
        alone = sample(x[i], pick(adaptor, i), seeds=seeds[i], positions=positions[i], **ASKED)
        assert_all_equal([t[i] for t in together], alone)


def test_permuted_batch_gives_permuted_result(batch):
    x, seeds, positions = batch
    adaptor, order = per_row_adaptor(), torch.randperm(N)
    plain = sample(x, adaptor, seeds=seeds, positions=positions, **ASKED)
    shuffled = sample(
        x[order], pick(adaptor, order), seeds=seeds[order], positions=positions[order], **ASKED
    )
    assert_all_equal([t[order] for t in plain], shuffled)


def test_strides_change_nothing(batch):
    x, seeds, positions = batch
    adaptor = per_row_adaptor()
    plain = everything(x, adaptor, seeds, positions)
    padded = torch.full((N, V + 61), float("nan"))
    padded[:, 3 : V + 3] = x
    column_major = x.t().contiguous().t()
    for view in (padded[:, 3 : V + 3], column_major, torch.stack([x, x * 0])[0]):
        assert_all_equal(plain, everything(view, adaptor, seeds, positions))


def test_expanded_row_is_read_in_place(batch):
    x, seeds, positions = batch
    wide, repeated = x[:1].expand(N, -1), x[:1].repeat(N, 1)
    adaptor = per_row_adaptor()
    assert_all_equal(
        everything(repeated, adaptor, seeds, positions), everything(wide, adaptor, seeds, positions)
    )


def test_leading_dimensions_fold(batch):
    x, seeds, positions = batch
    adaptor = per_row_adaptor()
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
    assert_all_equal(flat, [t.reshape(N, *t.shape[3:]) for t in folded])
    one = sample(x[0], Adaptor(top_p=0.9), seeds=seeds[0])
    assert one.tokens.shape == ()


def test_empty_batch_and_smallest_vocabulary():
    empty = torch.empty(0, V)
    drawn = sample(empty, Adaptor(top_p=0.9), **ASKED)
    assert [tuple(t.shape) for t in drawn] == [(0,)] * 6 + [(0, 5)] * 2 + [(0,)]
    assert filter_logits(empty, Adaptor()).shape == (0, V)
    assert score(empty, torch.empty(0, dtype=torch.int64), [Adaptor()]).logprobs.shape == (0, 1)
    single = sample(torch.tensor([[-5.0]]), Adaptor(top_p=0.1, typical_p=0.1, epsilon_cutoff=0.9))
    assert (single.tokens.item(), single.logprobs.item(), single.kept.item()) == (0, 0.0, 1)


def test_python_threads_may_call_at_once(batch):
    """Eight callers, each with a number of OpenMP threads of its own and another adaptor first."""
    x, seeds, positions = batch
    adaptors = [per_row_adaptor(), *ADAPTORS.values()]
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
