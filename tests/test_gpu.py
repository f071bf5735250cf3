"""What only a CUDA device has: graphs, streams, no host to wait for, offsets above 2^31.

That its results are those of the CPU is tested in every module whose tests take `device`, and here
over a million rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastadapt import (
    Adaptor,
    adapted_log_odds,
    candidate_log_odds,
    filter_logits,
    label_log_odds,
    sample,
    score,
    verify,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

KINDS = ["normal", "spread", "near_flat", "flat", "ties", "two_level", "one_hot", "holes", "far"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ASKED = {"base_logprobs": True, "log_mass": True, "top_logprobs": 5}
ADAPTORS = {
    "neutral": Adaptor(),
    "greedy": Adaptor(temperature=0),
    "top_k_top_p": Adaptor(temperature=0.8, top_k=50, top_p=0.95),
    "typical": Adaptor(typical_p=0.9),
    "all": Adaptor(
        temperature=1.2,
        top_k=90,
        top_p=0.95,
        min_p=0.002,
        typical_p=0.95,
        epsilon_cutoff=1e-3,
        eta_cutoff=2e-3,
        min_tokens_to_keep=3,
        order="vllm",
    ),
    "chain": Adaptor(
        temperature=0.7,
        min_k=500.0,
        top_h=0.9,
        xtc_probability=1.0,
        xtc_threshold=0.05,
        order=("min_k", "top_h", "xtc", "temperature"),
    ),
}
MANY = [ADAPTORS["top_k_top_p"], Adaptor(top_p=0.9), Adaptor(temperature=2.0, typical_p=0.5)]


def assert_same_bits(ours, wanted, where=""):
    """Every field that was asked for is equal, NaN to NaN."""
    for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        if a is not None or b is not None:
            torch.testing.assert_close(
                a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{where} field {i}: {m}"
            )


def random_seeds(n):
    """(n,) of all 64 bits."""
    return torch.randint(-(2**63), 2**63 - 1, (n,))


@pytest.mark.parametrize("part", range(16))
def test_draws_of_a_million_rows_are_those_of_the_cpu(rows, on_device, per_row_adaptor, part):
    """16 parts of 16 batches of 4096 rows: rows of all kinds, sizes, dtypes and adaptors."""
    n = 4096
    fixed = list(ADAPTORS.values())
    for i in range(part, 256, 16):
        v = 1 + (i * 37) % 299
        # kinds, adaptors and dtypes come round at different paces
        x = rows(KINDS[i % len(KINDS)], n, v).to(DTYPES[i // 16 % 3]).cpu()
        at = i // 2 % (len(fixed) + 3)
        if at < len(fixed):
            adaptor = wanted_adaptor = fixed[at]
        else:
            adaptor = per_row_adaptor(n, v)
            wanted_adaptor = on_device(lambda a: a, adaptor)
        asked = {"seeds": random_seeds(n), "positions": random_seeds(n)}
        if i % 5 == 0:
            asked.update(ASKED, top_logprobs=min(5, v))
        ours, wanted = on_device(sample, x, adaptor, **asked), sample(x, wanted_adaptor, **asked)
        assert_same_bits(ours, wanted, f"batch {i}, V = {v}, {adaptor}:")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ADAPTORS)
def test_draws_of_long_rows_are_those_of_the_cpu(rows, on_device, name, dtype):
    v = 128_256
    x = torch.cat([rows(kind, 8, v) for kind in [*KINDS, "power"]]).to(dtype).cpu()
    seeds = random_seeds(x.shape[0])
    ours = on_device(sample, x, ADAPTORS[name], seeds=seeds, **ASKED)
    assert_same_bits(ours, sample(x, ADAPTORS[name], seeds=seeds, **ASKED))


@pytest.mark.parametrize("name", ["greedy", "top_k_top_p", "typical", "chain"])
def test_verified_drafts_are_those_of_the_cpu(rows, on_device, name):
    n, k, v = 40, 3, 5000
    x = rows("spread", n * (k + 1), v).cpu().view(n, k + 1, v)
    y = x[:, :k] + 0.3 * torch.randn(n, k, v)
    lengths, seeds = torch.randint(0, k + 1, (n,)), random_seeds(n)
    for known in ({}, {"draft_logits": y, "draft_adaptor": MANY[1]}):
        given = {"draft_lengths": lengths, "seeds": seeds, "positions": seeds >> 40, **known}
        arguments = x, y.argmax(-1), ADAPTORS[name]
        assert_same_bits(on_device(verify, *arguments, **given), verify(*arguments, **given), name)


def every_verb(x, y, upstream, adaptor, seeds, positions):
    """All results of all verbs; the leaf is x itself, which the caller may rewrite."""
    log_odds = adapted_log_odds(x, y, adaptor)
    (gradient,) = torch.autograd.grad(log_odds, x, upstream)
    drawn = sample(x, adaptor, seeds=seeds, positions=positions, **ASKED)
    return [
        *drawn[:9],
        *score(x, y, [adaptor, *MANY])[:5],
        filter_logits(x, adaptor),
        log_odds.detach(),
        gradient,
    ]


def verb_arguments(rows, device, n, v):
    """The tensors that `every_verb` takes, as (x, y, upstream), seeds and positions."""
    x = rows("spread", n, v).requires_grad_()
    y = torch.where(torch.rand(n) < 0.2, -100, torch.randint(v, (n,))).to(device)
    upstream = torch.randn(n).to(device)
    return (x, y, upstream), random_seeds(n).to(device), torch.zeros_like(y)


def captured(call):
    """A CUDA graph of a call after a warm-up on a side stream, and the tensors it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("name", [*ADAPTORS, "per_row"])
@pytest.mark.parametrize(("n", "v"), [(1, 128_256), (64, 128_256), (300, 1000)])
def test_replay_with_advancing_positions(rows, device, per_row_adaptor, n, v, name):
    """What a server does: one capture, then a replay a token, with new logits and positions."""
    adaptor = per_row_adaptor(n, v) if name == "per_row" else ADAPTORS[name]
    x, seeds = rows("normal", n, v), random_seeds(n).to(device)
    logits, positions = x.clone(), torch.zeros(n, dtype=torch.int64, device=device)
    graph, out = captured(lambda: sample(logits, adaptor, seeds=seeds, positions=positions))
    drawn = []
    for step in range(12):
        if step == 6:
            logits.copy_(x.flip(-1))
        graph.replay()
        drawn.append(out.tokens.clone())
        eager = sample(
            x if step < 6 else x.flip(-1),
            adaptor,
            seeds=seeds,
            positions=torch.full((n,), step, device=device),
        )
        assert_same_bits(out, eager, f"step {step}:")
        positions.add_(1)
    assert name == "greedy" or not all(torch.equal(drawn[0], other) for other in drawn[1:6])


@pytest.mark.parametrize("name", ["neutral", "all", "chain", "per_row"])
@pytest.mark.parametrize(("n", "v"), [(2, 50_257), (200, 1001)])
def test_replay_of_every_verb(rows, device, per_row_adaptor, n, v, name):
    adaptor = per_row_adaptor(n, v) if name == "per_row" else ADAPTORS[name]
    (x, y, upstream), seeds, positions = verb_arguments(rows, device, n, v)
    graph, out = captured(lambda: every_verb(x, y, upstream, adaptor, seeds, positions))
    for kind in ("ties", "normal", "holes"):
        with torch.no_grad():
            x.copy_(rows(kind, n, v))
        upstream.neg_()
        graph.replay()
        assert_same_bits(out, every_verb(x, y, upstream, adaptor, seeds, positions), kind)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raises where torch would make the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["neutral", "all", "chain", "per_row"])
@pytest.mark.parametrize(("n", "v"), [(1, 128_256), (200, 1001)])
def test_no_verb_waits_for_the_device(rows, device, per_row_adaptor, n, v, name):
    adaptor = per_row_adaptor(n, v) if name == "per_row" else ADAPTORS[name]
    (x, y, upstream), seeds, positions = verb_arguments(rows, device, n, v)
    every_verb(x, y, upstream, adaptor, seeds, positions)
    sample(x, adaptor)
    with no_synchronisation():
        every_verb(x, y, upstream, adaptor, seeds, positions)
        sample(x, adaptor)


def test_new_knobs_on_the_device_are_not_waited_for(rows, device):
    x, k = rows("spread", 3, 100), torch.tensor([1, 2, 3], device=device)
    sample(x, Adaptor(top_k=k))
    with no_synchronisation():
        sample(x, Adaptor(top_k=k + 1, temperature=k * 0.5))


def test_work_is_on_the_current_stream(rows, device):
    """A call sees what its stream has written before it, and is seen by what follows there."""
    x, adaptor = rows("spread", 8, 50_257), ADAPTORS["top_k_top_p"]
    seeds, logits = torch.arange(8, device=device), torch.zeros_like(x)
    wanted = sample(x, adaptor, seeds=seeds).tokens
    sample(logits, adaptor, seeds=seeds)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # cycles: some 10 ms
        logits.copy_(x)
        got = sample(logits, adaptor, seeds=seeds).tokens + 1
    side.synchronize()
    assert torch.equal(got, wanted + 1)


def test_seeds_come_from_a_generator_of_the_device(rows, device):
    x, generator = rows("spread", 64, 300), torch.Generator(device)
    drawn = [
        sample(x, Adaptor(), generator=generator.manual_seed(seed)).tokens for seed in (3, 3, 4)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_logits_on_another_device_than_the_current_one(rows):
    x, seeds = rows("spread", 4, 5000), torch.arange(4)
    wanted = sample(x, ADAPTORS["all"], seeds=seeds.to(x.device), **ASKED)
    with torch.cuda.device(0):
        got = sample(x.to("cuda:1"), ADAPTORS["all"], seeds=seeds.to("cuda:1"), **ASKED)
    assert got.tokens.device == torch.device("cuda:1")
    assert_same_bits([t.cpu() for t in got[:9]], [t.cpu() for t in wanted[:9]])


def test_bad_knobs_on_the_device_are_a_status(rows, device):
    """They are not read where an Adaptor is made: that would synchronise."""
    n, v = 10, 40
    x, seeds = rows("spread", n, v), torch.arange(n, device=device)
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "typical_p": 1.0,
               "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_tokens_to_keep": 1}  # fmt: skip
    bad = [("temperature", -1.0), ("temperature", 1e-9), ("top_k", -1), ("top_p", 1.5),
           ("min_p", float("nan")), ("typical_p", 0.0), ("epsilon_cutoff", 1.0),
           ("min_tokens_to_keep", 0)]  # fmt: skip
    knobs = {name: torch.tensor([value] * n) for name, value in neutral.items()}
    for row, (name, value) in enumerate(bad):
        knobs[name][row] = value
    adaptor = Adaptor(**{name: value.to(device) for name, value in knobs.items()})
    y = x.argmax(-1)
    drawn = sample(x, adaptor, seeds=seeds, **ASKED)
    clean = sample(x, Adaptor(**neutral), seeds=seeds, **ASKED)
    assert drawn.status.tolist() == [4] * 8 + [0] * 2
    assert drawn.tokens.tolist() == [-1] * 8 + clean.tokens[8:].tolist()
    assert drawn.logprobs[:8].isnan().all()
    assert drawn.kept[:8].tolist() == [0] * 8
    assert_same_bits([t[8:] for t in drawn[:9]], [t[8:] for t in clean[:9]])
    assert torch.equal(filter_logits(x, adaptor)[:8], x[:8])
    scored = score(x, y, [adaptor, Adaptor()])
    assert scored.logprobs[:, 0].isnan().tolist() == [True] * 8 + [False] * 2
    assert scored.logprobs[:, 1].isfinite().all()
    x.requires_grad_()
    log_odds = adapted_log_odds(x, y, adaptor)
    (gradient,) = torch.autograd.grad(log_odds, x, torch.ones(n, device=device))
    assert log_odds.isnan().tolist() == [True] * 8 + [False] * 2
    assert (gradient[:8] == 0).all()
    assert gradient[8:].isfinite().all()


def test_temperature_zero_on_the_device_scores_nan(rows, device):
    x, t = rows("spread", 2, 40), torch.tensor([0.0, 1.0], device=device)
    y = x.argmax(-1)
    for values in (
        score(x, y, [Adaptor(temperature=t)]).logprobs[:, 0],
        adapted_log_odds(x, y, Adaptor(temperature=t)),
    ):
        assert values.isnan().tolist() == [True, False]


def test_tokens_out_of_range_are_nan_and_have_no_gradient(rows, device):
    """On the CPU they raise; here that would synchronise."""
    x = rows("spread", 5, 40).requires_grad_()
    y = torch.tensor([3, 40, -1, 2**40, -100], device=device)
    bad = [False, True, True, True, False]
    assert score(x, y, MANY).logprobs.isnan().tolist() == [[b] * 3 for b in bad]
    log_odds = adapted_log_odds(x, y, Adaptor())
    (gradient,) = torch.autograd.grad(log_odds, x, torch.ones(5, device=device))
    assert log_odds.isnan().tolist() == bad
    assert gradient.abs().sum(-1).gt(0).tolist() == [True, False, False, False, False]


def test_arguments_on_another_device_raise(rows, device):
    x, here = rows("spread", 3, 10), torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"seeds: expected device cuda:0, got cpu"):
        sample(x, Adaptor(), seeds=here.cpu())
    with pytest.raises(ValueError, match=r"tokens: expected device cuda:0, got cpu"):
        score(x, here.cpu(), [Adaptor()])
    with pytest.raises(ValueError, match=r"adaptor: expected per-row knobs on cuda:0, got cpu"):
        sample(x, Adaptor(top_k=torch.tensor([1, 2, 3])), seeds=here)
    with pytest.raises(ValueError, match=r"adaptor: expected per-row knobs on cpu, got cuda:0"):
        sample(x.cpu(), Adaptor(top_k=here + 1))


@pytest.fixture
def large(device) -> torch.Tensor:
    """Logits of more than 2^31 entries, 4.4 GB; the verbs write as much again, or twice that."""
    n, v = 17_000, 128_256
    free, need = torch.cuda.mem_get_info()[0], 4 * n * v * 2
    if free < need:
        pytest.skip(f"needs {need >> 30} GiB of free memory on the device, there are {free >> 30}")
    return torch.empty(n, v, dtype=torch.bfloat16, device=device).normal_(std=3)


def test_more_entries_than_32_bits_count(large):
    """The rows around entry 2^31 and the last, against the CPU."""
    n, v = large.shape
    edge = 2**31 // v
    checked = torch.tensor([0, 1, edge // 2, edge - 1, edge, edge + 1, n - 2, n - 1])
    here = checked.to(large.device)
    seeds, adaptor = torch.arange(n, device=large.device), ADAPTORS["top_k_top_p"]
    few, few_seeds = large[here].cpu().requires_grad_(), seeds[here].cpu()
    drawn, wanted = sample(large, adaptor, seeds=seeds), sample(few, adaptor, seeds=few_seeds)
    assert_same_bits([t[here].cpu() for t in drawn[:4]], wanted[:4], "sample")
    assert (drawn.status == 0).all()
    y = drawn.tokens
    scored, wanted = score(large, y, MANY), score(few, wanted.tokens, MANY)
    assert_same_bits([t[here].cpu() for t in scored[:5]], wanted[:5], "score")
    assert torch.equal(filter_logits(large, adaptor)[here].cpu(), filter_logits(few, adaptor))
    large.requires_grad_()
    log_odds = adapted_log_odds(large, y, adaptor)
    (gradient,) = torch.autograd.grad(log_odds, large, torch.ones_like(log_odds))
    wanted = adapted_log_odds(few, y[here].cpu(), adaptor)
    (few_gradient,) = torch.autograd.grad(wanted.sum(), few)
    torch.testing.assert_close(log_odds[here].cpu(), wanted, rtol=2**-23, atol=0)
    torch.testing.assert_close(gradient[here].cpu(), few_gradient, rtol=2**-7, atol=2**-126)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("v", [1, 1000, 128_256])
def test_log_odds_of_labels_and_candidates_are_those_of_the_cpu(on_device, v, dtype):
    n, k = 6, 5
    x, labels = (torch.randn(n, v) * 4).to(dtype), torch.randint(v, (n,))
    labels[0] = -100
    index, mask = torch.randint(v, (n, k)), torch.rand(n, k) < 0.7
    upstreams = torch.randn(n), torch.randn(n, k)

    def both(x, labels, index, mask, g, many):
        """Log-odds and the gradient of each."""
        leaf = x.detach().requires_grad_()
        found = []
        for m, up in (
            (label_log_odds(leaf, labels), g),
            (candidate_log_odds(leaf, index, mask), many),
        ):
            found += [m.detach(), torch.autograd.grad(m, leaf, up.to(m.dtype))[0]]
        return found

    ours, wanted = (
        on_device(both, x, labels, index, mask, *upstreams),
        both(x, labels, index, mask, *upstreams),
    )
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 1e-12}
    for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        tolerance = rounding.get(dtype, 3e-6) if i % 2 else rounding.get(a.dtype, 3e-6)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 1e-2 + 1e-12)


def test_labels_out_of_range_spoil_their_own_rows(on_device):
    x, labels = torch.randn(3, 40), torch.tensor([40, -1, 3])
    log_odds = on_device(label_log_odds, x, labels)
    assert log_odds.isnan().tolist() == [True, True, False]
    torch.testing.assert_close(log_odds[2:], label_log_odds(x[2:], labels[2:]))
