"""The sampling backend of SGLang against `sample`, `filter_logits` and the engine's own numbers."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastadapt
import fastadapt.sglang
from fastadapt import Adaptor, filter_logits, label_logps, sample, support_log_odds

ALL = 1 << 30  # SGLang's top_k without a top-k
V = 1003
STAND_IN = Path(__file__).with_name("sglang_stand_in.py")


def _stand_in():
    spec = importlib.util.spec_from_file_location("sglang_stand_in", STAND_IN)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


HELPERS = _stand_in()
OWN = importlib.util.find_spec("sglang") is not None


@pytest.fixture(scope="module", autouse=True)
def engine():
    """SGLang's module of the sampler, or what stands in for it."""
    before = dict(sys.modules)
    if not OWN:
        sys.modules |= HELPERS.modules()
    yield importlib.import_module("sglang.srt.layers.sampler")
    for name in set(sys.modules) - set(before):
        if name == "sglang" or name.startswith("sglang.") or name == "fastadapt.sglang._sampler":
            del sys.modules[name]


@pytest.fixture
def make(engine, monkeypatch):
    """Makes a sampler as a server with these options does."""
    group = SimpleNamespace(device_group="the ranks")
    monkeypatch.setattr(engine, "get_parallel", lambda: SimpleNamespace(tp_group=group))
    monkeypatch.setattr(engine, "is_dp_attention_enabled", lambda: False)
    ours = importlib.import_module("fastadapt.sglang._sampler")

    def made(of_engine=False, original=False, **options):
        monkeypatch.setattr(engine, "get_exec", lambda: HELPERS.published(**options))
        monkeypatch.setattr(engine, "SGLANG_RETURN_ORIGINAL_LOGPROB", original)
        return engine.Sampler() if of_engine else ours.FusedSampler()

    return made


def output_of(logits):
    module = importlib.import_module("sglang.srt.layers.logits_processor")
    return module.LogitsProcessorOutput(next_token_logits=logits.clone())


def batch_of(requests, **more):
    """A batch of requests, each (temperature, top_k, top_p, min_p), as the engine makes it."""
    module = importlib.import_module("sglang.srt.sampling.sampling_batch_info")
    temperatures, top_ks, top_ps, min_ps = (list(x) for x in zip(*requests, strict=True))
    return module.SamplingBatchInfo(
        temperatures=torch.tensor(temperatures).view(-1, 1),
        top_ks=torch.tensor(top_ks, dtype=torch.int32),
        top_ps=torch.tensor(top_ps),
        min_ps=torch.tensor(min_ps),
        is_all_greedy=all(k <= 1 for k in top_ks),
        is_any_greedy=any(k <= 1 for k in top_ks),
        need_top_p_sampling=any(p != 1 for p in top_ps),
        need_top_k_sampling=any(k != ALL for k in top_ks),
        need_min_p_sampling=any(p > 0 for p in min_ps),
        vocab_size=V,
        device="cpu",
        **more,
    )


KINDS = [
    (0.8, ALL, 0.9, 0.0), (1.0, 50, 1.0, 0.0), (1.3, ALL, 1.0, 0.05), (0.7, 40, 0.95, 0.02),
    (1.0, 1, 1.0, 0.0), (1.0, ALL, 1.0, 0.0), (0.5, 1, 0.9, 0.1),
]  # fmt: skip


def requests_of(n):
    return [KINDS[i % len(KINDS)] for i in range(n)]


def adaptor_of(request):
    """The law that a request asks for, written independently of the backend."""
    temperature, top_k, top_p, min_p = request
    if top_k == 1:
        return Adaptor(temperature=0.0)
    # the engine keeps these numbers in float32
    temperature, top_p, min_p = torch.tensor([temperature, top_p, min_p]).tolist()
    return Adaptor(
        temperature=temperature, top_k=0 if top_k == ALL else top_k, top_p=top_p, min_p=min_p
    )


def rows_of(n):
    return torch.randn(n, V) * 3


def draw(sampler, logits, batch, positions=None, logprob=False, top=0, ids=None):
    n = len(logits)
    output = output_of(logits)
    positions = torch.zeros(n, dtype=torch.int64) if positions is None else positions
    tokens = sampler(output, batch, logprob, [top] * n, [ids] * n, positions)
    return tokens, output


def test_tokens_are_samples_row_by_row(make):
    n = 10_000 if OWN else 700
    logits, requests = rows_of(n), requests_of(n)
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (n,)), torch.randint(10_000, (n,))
    tokens, _ = draw(make(), logits, batch_of(requests, sampling_seed=seeds), positions)
    assert tokens.dtype == torch.int32
    for i, request in enumerate(requests):
        row = slice(i, i + 1)
        drawn = sample(logits[row], adaptor_of(request), seeds=seeds[row], positions=positions[row])
        assert tokens[i] == drawn.tokens, (i, request)


def test_positions_may_be_int32(make):
    logits, seeds = rows_of(8), torch.arange(8)
    batch = batch_of(requests_of(8), sampling_seed=seeds)
    positions = torch.arange(8)
    narrow, _ = draw(make(), logits, batch, positions.int())
    wide, _ = draw(make(), logits, batch, positions)
    assert torch.equal(narrow, wide)


def test_batch_mates_change_nothing(make):
    """A request's draw depends on its own seed and position, whatever filters others have."""
    logits, requests = rows_of(64), requests_of(64)
    seeds, positions = torch.arange(64), torch.arange(64) * 3
    tokens, _ = draw(make(), logits, batch_of(requests, sampling_seed=seeds), positions)
    sampler, order = make(), torch.randperm(64)
    for part in order.split(5):
        batch = batch_of([requests[i] for i in part], sampling_seed=seeds[part])
        alone, _ = draw(sampler, logits[part], batch, positions[part])
        assert torch.equal(alone.int(), tokens[part])


def test_without_seeds_draws_follow_torch(make):
    logits, batch = torch.zeros(500, V), batch_of([(1.0, ALL, 0.9, 0.0)] * 500)
    torch.manual_seed(1)
    first, _ = draw(make(), logits, batch)
    again, _ = draw(make(), logits, batch)
    assert not torch.equal(first, again) and len(first.unique()) > 20
    torch.manual_seed(1)
    repeated, _ = draw(make(), logits, batch)
    assert torch.equal(first, repeated)


def test_greedy_requests_are_the_engines(make):
    logits = rows_of(9).round()  # ties at the top
    greedy = [(1.0, 1, 1.0, 0.0)] * 9
    expected, _ = draw(make(of_engine=True), logits, batch_of(greedy))
    alone, output = draw(make(), logits, batch_of(greedy), logprob=True)
    among, _ = draw(make(), logits, batch_of([*greedy[:8], (1.0, ALL, 0.9, 0.0)]))
    assert torch.equal(alone, expected) and torch.equal(among[:8].long(), expected[:8])
    assert torch.equal(output.next_token_logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_logprobs_are_the_engines(make, original, deterministic):
    """Bit for bit, those of all ids and of the most probable ones."""
    logits, ids = rows_of(60), list(range(V))
    logits[:, 7] = float("-inf")  # what a grammar forbids
    batch = batch_of([(0.8, ALL, 1.0, 0.0), (1.3, ALL, 1.0, 0.0)] * 30)
    options = {"original": original, "deterministic": deterministic}
    _, theirs = draw(make(of_engine=True, **options), logits, batch, logprob=True, top=5, ids=ids)
    tokens, ours = draw(make(**options), logits, batch, logprob=True, top=5, ids=ids)
    for name in ("top_logprobs_val", "top_logprobs_idx", "token_ids_logprobs_val"):
        of_both = (getattr(x, f"next_token_{name}") for x in (theirs, ours))
        assert all(torch.equal(a, b) for a, b in zip(*of_both, strict=True)), name
    of_all = torch.stack(list(theirs.next_token_token_ids_logprobs_val))
    expected = of_all.gather(1, tokens[:, None].long())[:, 0]
    assert torch.equal(ours.next_token_logprobs, expected)


@pytest.mark.parametrize("sanitized", [False, True])
def test_masks_are_the_sets_of_filter_logits(make, sanitized, engine, monkeypatch):
    n = 140
    logits, requests = rows_of(n), requests_of(n)
    logits[::3, 5:] = float("-inf")  # a grammar that allows five tokens
    if sanitized:
        monkeypatch.setattr(
            engine, "sanitize_nan_logits", lambda x, _: torch.nan_to_num_(x, -1e30, 1e30, -1e30)
        )
    asked = torch.arange(n)[torch.arange(n) % 4 != 1]
    support = torch.arange(0, len(asked), 2)
    batch = batch_of(
        requests,
        sampling_seed=torch.arange(n),
        sampling_mask_batch_indices=asked,
        sampling_support_logprobs_capture_indices=support,
    )
    tokens, output = draw(make(cap=V), logits, batch)
    mask = output.sampling_mask_output
    assert mask.statuses.tolist() == [0] * len(asked)
    assert mask.token_ids.dtype == mask.lengths.dtype == mask.statuses.dtype == torch.int32
    for row, i in enumerate(asked.tolist()):
        kept = filter_logits(logits[i], adaptor_of(requests[i]))
        length = mask.lengths[row]
        ids = mask.token_ids[row, :length].long()
        assert set(ids.tolist()) == set((kept > float("-inf")).nonzero()[:, 0].tolist()), i
        law = kept.double().log_softmax(-1)
        assert (law[ids].diff() < 1e-6).all()  # the most probable first
        assert (mask.selected_logprobs[row] - law[tokens[i]]).abs() < 1e-5
        if row % 2 == 0:
            told = mask.support_logprobs[row // 2, :length]
            assert (told - law[ids]).abs().max() < 1e-5


def test_supports_are_those_of_the_draw(make):
    """Of the lists that a request gets, on the way that the engine's own class makes them."""
    n = 60
    logits, requests = rows_of(n), requests_of(n)
    batch = batch_of(
        requests, sampling_seed=torch.arange(n), sampling_mask_batch_indices=torch.arange(n)
    )
    tokens, output = draw(make(cap=V), logits, batch)
    mask = output.sampling_mask_output
    rows = [ids[:k].numpy() for ids, k in zip(mask.token_ids, mask.lengths, strict=True)]
    lists = [ids.tolist() for ids in rows]
    if OWN:
        sent = importlib.import_module("sglang.srt.sampling.sampling_mask").SamplingMaskRows()
        for ids, logprob in zip(rows, mask.selected_logprobs, strict=True):
            sent.append(ids, logprob[None].numpy())
        told, logprobs = sent.take().to_lists(support_logprobs=False)
        assert told == lists and logprobs == mask.selected_logprobs.tolist()
    kept = [filter_logits(logits[i], adaptor_of(requests[i])) for i in range(n)]
    support = fastadapt.sglang.support_of(lists).check(V)
    assert torch.equal(support.to_mask(V), torch.stack(kept) > float("-inf"))
    assert bool(support.contains(tokens.long()).all())
    scaled = logits / torch.tensor([max(one[0], 1e-6) for one in requests])[:, None]
    logps = label_logps(support_log_odds(scaled, tokens.long(), support))
    torch.testing.assert_close(logps, mask.selected_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (None, TypeError, "^mask: expected a list of ids for each token, got NoneType"),
        ([3], TypeError, r"^mask\[0\]: expected a list of ids, got int"),
        ([[1], "12"], TypeError, r"^mask\[1\]: expected a list of ids, got str"),
        ([[1.5]], TypeError, r"^mask\[0\]: expected an integer, got 1.5"),
        ([[1], []], ValueError, r"^mask\[1\]: expected ids, each once, got 0"),
        ([[1, 1]], ValueError, r"^mask\[0\]: expected ids, each once, got 2"),
        ([[-1]], ValueError, r"^mask\[0\]: expected 0 to 2147483647, got -1"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        fastadapt.sglang.support_of(mask)


def test_no_tokens_are_no_rows():
    assert len(fastadapt.sglang.support_of([])) == 0


def test_masks_beyond_the_cap(make):
    logits = rows_of(3)
    batch = batch_of(
        [(1.0, 10, 1.0, 0.0), (1.0, 11, 1.0, 0.0), (1.0, 1, 1.0, 0.0)],
        sampling_mask_batch_indices=torch.arange(3),
    )
    _, output = draw(make(cap=10), logits, batch)
    mask = output.sampling_mask_output
    assert mask.statuses.tolist() == [0, 1, 0]  # the second is OVERFLOW
    assert mask.lengths.tolist() == [10, 10, 1] and mask.token_ids.shape == (3, 10)
    assert mask.support_logprobs is None


def test_greedy_masks_are_the_engines(make):
    batch = batch_of([(1.0, 1, 1.0, 0.0)] * 2, sampling_mask_batch_indices=torch.tensor([1]))
    logits = rows_of(2)
    tokens, output = draw(make(), logits, batch)
    mask = output.sampling_mask_output
    assert mask.token_ids.tolist() == [[int(tokens[1])]] and mask.lengths.tolist() == [1]


def test_rows_without_a_token_disturb_nobody(make):
    logits, batch = rows_of(4), batch_of([(1.0, ALL, 0.9, 0.0)] * 4, sampling_seed=torch.arange(4))
    expected, _ = draw(make(), logits, batch)
    logits[1, 3], logits[2] = float("nan"), float("-inf")
    batch.sampling_mask_batch_indices = torch.arange(4)
    tokens, output = draw(make(cap=V), logits, batch)
    assert tokens.tolist() == [expected[0], 0, 0, expected[3]]
    assert output.sampling_mask_output.statuses.tolist() == [0, 2, 2, 0]  # INVALID: it is ended


def test_custom_processors_come_first(make):
    module = importlib.import_module("sglang.srt.sampling.sampling_batch_info")

    def only(logits, params):
        keep = torch.full_like(logits, float("-inf"))
        for row, token in zip(keep, params, strict=True):
            row[token] = 0.0
        return keep

    rows = torch.tensor([0, 2])
    batch = batch_of([(1.0, ALL, 0.9, 0.0)] * 3)
    batch.has_custom_logit_processor, batch.custom_params = True, [11, None, 13]
    batch.custom_logit_processor = {1: module.ProcessorEntry(only, rows.tolist(), rows)}
    tokens, _ = draw(make(), rows_of(3), batch)
    assert tokens[rows].tolist() == [11, 13]


def test_tokens_are_made_equal_on_all_ranks(make, monkeypatch):
    """As the engine does where there are grammars; masks are of the token that all have then."""
    told = []

    def all_reduce(tokens, op, group):
        told.append(group)
        tokens[:] = 4

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    logits = rows_of(2)
    batch = batch_of([(1.0, ALL, 1.0, 0.001)] * 2, sampling_mask_batch_indices=torch.arange(2))
    draw(make(), logits, batch)
    assert told == []
    batch.grammars = [object(), None]
    tokens, output = draw(make(cap=V), logits, batch)
    assert tokens.tolist() == [4, 4] and told == ["the ranks"]
    law = filter_logits(logits, Adaptor(min_p=float(torch.tensor(0.001)))).log_softmax(-1)[:, 4]
    told = output.sampling_mask_output
    kept = law > float("-inf")
    assert torch.allclose(told.selected_logprobs[kept], law[kept], atol=1e-5)
    assert told.statuses.tolist() == [0 if k else 2 for k in kept]


def test_the_adaptor_is_made_when_the_batch_changes(make, monkeypatch):
    knobs = importlib.import_module("fastadapt.sglang._knobs")
    made = []
    monkeypatch.setattr(knobs, "Adaptor", lambda **k: made.append(set(k)) or Adaptor(**k))
    sampler, batch = make(), batch_of(requests_of(7))
    for _ in range(3):
        draw(sampler, rows_of(7), batch)
    draw(sampler, rows_of(5), batch_of(requests_of(5)))
    assert len(made) == 1 + 2  # that of no batch at all, and one for each


def test_one_call_draws_a_batch(make, monkeypatch):
    ours = importlib.import_module("fastadapt.sglang._sampler")
    calls = []
    monkeypatch.setattr(ours, "sample", lambda *a, **k: calls.append(a[0].shape) or sample(*a, **k))
    draw(make(), rows_of(70), batch_of(requests_of(70)), logprob=True)
    assert calls == [(70, V)]


@pytest.mark.parametrize("seeded", [False, True])
def test_the_host_reads_no_tensor(make, seeded):
    """On a GPU a read would wait for it. Tensors without values, as here, raise at one."""
    meta = {"device": "meta"}
    batch = batch_of(
        requests_of(7),
        sampling_seed=torch.empty(7, dtype=torch.int64, **meta) if seeded else None,
        sampling_mask_batch_indices=torch.empty(3, dtype=torch.int64, **meta),
        sampling_support_logprobs_capture_indices=torch.empty(2, dtype=torch.int64, **meta),
    )
    batch.temperatures, batch.top_ks = batch.temperatures.to("meta"), batch.top_ks.to("meta")
    batch.top_ps, batch.min_ps = batch.top_ps.to("meta"), batch.min_ps.to("meta")
    logits, positions = torch.empty(7, V, **meta), torch.empty(7, dtype=torch.int64, **meta)
    with pytest.raises(RuntimeError, match="meta"):
        logits[0, 0].item()
    tokens, output = draw(make(), logits, batch, positions, logprob=True)
    assert tokens.shape == (7,) and output.next_token_logprobs.shape == (7,)
    assert output.sampling_mask_output.token_ids.shape == (3, V)


def test_the_trainers_rounding_is_refused(make):
    with pytest.raises(ValueError, match="rl-on-policy-target.*got 'fsdp'"):
        make(rl_on_policy_target="fsdp")


def test_registration(engine, make, monkeypatch):
    """Under its name, and under `pytorch`, which the engine asks for in its deterministic mode."""
    monkeypatch.setattr(engine, "_CUSTOM_SAMPLER_FACTORIES", {})
    ours = importlib.import_module("fastadapt.sglang._sampler")
    make()
    fastadapt.sglang.register()
    given = SimpleNamespace(sampling_backend="fastadapt")
    monkeypatch.setattr(ours, "get_server_args", lambda: given)
    monkeypatch.setattr(engine, "get_server_args", lambda: given)
    assert type(engine.create_sampler("fastadapt")) is ours.FusedSampler
    assert type(engine.create_sampler("pytorch")) is ours.FusedSampler
    for other in ("pytorch", "flashinfer", None):
        given.sampling_backend = other
        assert type(engine.create_sampler("pytorch")) is engine.Sampler
    assert type(engine.create_sampler("flashinfer")) is engine.Sampler


def test_another_engine_is_refused(engine, monkeypatch):
    monkeypatch.delattr(engine.Sampler, "_build_sampling_mask_output")
    with pytest.raises(RuntimeError, match="SGLang 0.5.23.*without _build_sampling_mask_output"):
        fastadapt.sglang.register()


def test_the_entry_point_needs_nothing_of_sglang():
    """Loading it imports no SGLang: only calling it does."""
    project = tomllib.loads(STAND_IN.parents[1].joinpath("pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {
        "sglang.srt.plugins": {"fastadapt": "fastadapt.sglang:register"}
    }
    code = "import sys, fastadapt.sglang; print('sglang' in sys.modules)"
    run = [sys.executable, "-P", "-c", code]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.skipif(not OWN, reason="needs SGLang's own classes")
def test_the_stand_in_has_the_interface_of_the_engine(engine):
    for name in ("forward", "_preprocess_logits", "_sync_token_ids_across_tp"):
        theirs = inspect.signature(getattr(engine.Sampler, name)).parameters
        assert list(inspect.signature(getattr(HELPERS.Sampler, name)).parameters) == list(theirs)
    for name in ("SamplingBatchInfo", "LogitsProcessorOutput", "SamplingMaskOutput"):
        here = {field.name for field in HELPERS.dataclasses.fields(getattr(HELPERS, name))}
        module = {
            "SamplingBatchInfo": "sampling.sampling_batch_info",
            "LogitsProcessorOutput": "layers.logits_processor",
            "SamplingMaskOutput": "layers.logits_processor",
        }[name]
        there = getattr(importlib.import_module(f"sglang.srt.{module}"), name)
        assert here <= {field.name for field in HELPERS.dataclasses.fields(there)}, name
