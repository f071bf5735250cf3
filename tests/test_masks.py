"""Kept sets against transformers' own warpers, run in float64, filter by filter.

The last warper of a chain is given what our filters before it left (the chains before it are cases
of their own), so that a token at a boundary in one filter does not excuse the next. Two sets may
differ by equal values (ties), by tokens whose cumulated mass lies within 1e-5 of the threshold, or
whose probability does (relative). Top-k has no such band.
"""

import itertools

import pytest
import torch

from fastadapt import Adaptor, filter_logits, sample

warpers = pytest.importorskip(
    "transformers.generation.logits_process", reason="masks are compared with transformers"
)

BAND = 1e-5
pytestmark = pytest.mark.usefixtures("device")

KINDS = ["normal", "spread", "flat", "ties", "two_level", "one_hot", "holes", "far", "bf16"]
ORDERS = {
    "hf": ["top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"],
    "vllm": ["min_p", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff"],
}
KNOBS = {
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.9,
    "epsilon_cutoff": 9e-4,
    "eta_cutoff": 9e-4,
}
SUBSETS = [c for n in range(7) for c in itertools.combinations(KNOBS, n)]
SIZES = [1, 2, 31, 32, 33, 1000, 32_000, 50_257, 128_256, 151_936, 262_144]


def stock_mask(name, value, keep, scores):
    """What one warper of transformers keeps of (N, V) float64 scores."""
    kinds = {
        "top_k": warpers.TopKLogitsWarper,
        "top_p": warpers.TopPLogitsWarper,
        "min_p": warpers.MinPLogitsWarper,
        "typical_p": warpers.TypicalLogitsWarper,
        "epsilon_cutoff": warpers.EpsilonLogitsWarper,
        "eta_cutoff": warpers.EtaLogitsWarper,
    }
    device = {"device": scores.device} if name == "eta_cutoff" else {}
    warper = kinds[name](value, min_tokens_to_keep=keep, **device)
    return warper(None, scores) > float("-inf")


def statistic(name, value, scores):
    """(N, V) float64: what the filter compares; smaller is more surely kept."""
    p = scores.softmax(-1)
    if name == "typical_p":
        return (-scores.log_softmax(-1) + torch.special.entr(p).sum(-1, keepdim=True) * -1).abs()
    return -p if name in ("min_p", "epsilon_cutoff", "eta_cutoff") else -scores


def assert_same_cut(name, value, scores, ours, stock):
    """Every token that one set keeps and the other does not lies at the boundary."""
    p = scores.softmax(-1)
    order = statistic(name, value, scores)
    for row in (ours ^ stock).any(-1).nonzero()[:, 0].tolist():
        differ = ours[row] ^ stock[row]
        o, s = order[row][ours[row]].sort().values, order[row][stock[row]].sort().values
        if torch.equal(o, s):
            continue  # other members of a group of ties
        if name == "top_p":
            # the cumulated masses of the differing tokens reach from `first` to `last`
            removed = sorted(float(p[row][~kept[row]].sum()) for kept in (ours, stock))
            first, last = removed[0] + float(p[row][differ].min()), removed[1]
            far = max(abs(first - (1 - value)), abs(last - (1 - value)))
            assert far < BAND, f"{name}={value}: row {row} differs {far} from the threshold"
        elif name == "typical_p":
            near = order[row][differ]
            mass = abs(float(p[row][ours[row]].sum() - p[row][stock[row]].sum()))
            spread = float(near.max() - near.min())
            assert mass < BAND or spread < BAND, f"{name}={value}: row {row}, mass {mass}"
        else:
            assert name != "top_k", f"top_k={value}: row {row} differs"
            near = -order[row][differ]
            spread = float(near.max() / near.min()) - 1
            assert spread < BAND, f"{name}={value}: row {row}, probabilities {near.tolist()}"


def check(x, order, knobs, temperature=1.0, keep=1):
    """Compares the last filter of the chain, given what those before it left."""
    applied = {"temperature": temperature, "min_tokens_to_keep": keep, "order": order}
    chain = [name for name in ORDERS[order] if name in knobs]
    before = filter_logits(x, Adaptor(**applied, **{name: knobs[name] for name in chain[:-1]}))
    after = filter_logits(x, Adaptor(**applied, **knobs))
    ours = after > float("-inf")
    for name in chain[-1:]:
        scores = before.double()
        assert_same_cut(
            name, knobs[name], scores, ours, stock_mask(name, knobs[name], keep, scores)
        )
    assert torch.equal(after[ours], before[ours]), "survivors keep their scaled value"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["hf", "vllm"])
def test_every_combination_of_knobs(rows, kind, order):
    x = rows(kind, 3, 1000)
    for subset in SUBSETS:
        check(x, order, {name: KNOBS[name] for name in subset}, temperature=0.8)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["hf", "vllm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_combination_of_knobs_is_that_of_the_cpu(rows, on_device, dtype, order):
    """Also where a token lies at a threshold, as the comparisons above do not ask."""
    x = torch.cat([rows(kind, 3, 1000) for kind in KINDS]).to(dtype).cpu()
    seeds = torch.arange(x.shape[0])
    for subset in SUBSETS:
        adaptor = Adaptor(temperature=0.8, order=order, **{name: KNOBS[name] for name in subset})
        masked = on_device(filter_logits, x, adaptor)
        assert torch.equal(masked, filter_logits(x, adaptor)), subset
        drawn = on_device(sample, x, adaptor, seeds=seeds)
        for got, wanted in zip(drawn[:4], sample(x, adaptor, seeds=seeds)[:4], strict=True):
            assert torch.equal(got, wanted), subset


@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_size(rows, kind, v):
    x = rows(kind, 2, v)
    check(x, "hf", {"top_p": 0.9}, 1.3)
    check(x, "hf", {"top_p": 0.9, "epsilon_cutoff": 3e-4})
    check(x, "vllm", {"min_p": 0.02, "top_k": 40, "typical_p": 0.7})
    check(x, "vllm", {"typical_p": 0.9})
    check(x, "hf", {"top_k": v // 2 + 1, "eta_cutoff": 9e-4}, 1.3)
    check(x, "hf", {"top_k": v // 2 + 1}, 0.5)
    check(x, "hf", KNOBS)


@pytest.mark.parametrize("kind", ["spread", "ties", "holes", "bf16"])
@pytest.mark.parametrize(
    "knobs",
    [{"top_k": k} for k in (1, 2, 999, 1000, 1005)]
    + [{"top_p": p} for p in (0.0, 1e-6, 0.1, 0.5, 0.95, 0.999, 0.999999)]
    + [{"min_p": p} for p in (1e-7, 0.1, 1.0)]
    + [{"typical_p": p} for p in (1e-6, 0.2, 0.5, 0.999)]
    + [{"epsilon_cutoff": p} for p in (1e-5, 0.02, 0.9)]
    + [{"eta_cutoff": p} for p in (1e-5, 0.02, 0.9)],
    ids=lambda knobs: "-".join(f"{k}={v}" for k, v in knobs.items()),
)
def test_values_of_each_knob(rows, kind, knobs):
    check(rows(kind, 8, 1000), "hf", knobs)


@pytest.mark.parametrize("keep", [2, 7, 100, 2000])
@pytest.mark.parametrize("kind", ["spread", "ties", "one_hot"])
def test_min_tokens_to_keep(rows, kind, keep):
    x = rows(kind, 4, 500)
    hard = {
        "top_k": 1,
        "top_p": 0.01,
        "min_p": 0.9,
        "typical_p": 0.01,
        "epsilon_cutoff": 0.9,
        "eta_cutoff": 0.9,
    }
    for name, value in hard.items():
        check(x, "hf", {name: value}, keep=min(keep, 500))


def test_temperature_multiplies_by_the_rounded_inverse(rows):
    """As transformers does on CUDA; its CPU division differs by a unit in the last place."""
    x = rows("spread", 2, 1000)
    scaled = filter_logits(x, Adaptor(temperature=0.7))
    assert torch.equal(scaled, x * (1 / torch.tensor(0.7, device=x.device)))
    stock = warpers.TemperatureLogitsWarper(0.7)(None, x)
    torch.testing.assert_close(scaled, stock, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_keep_what_their_float32_values_keep(rows, dtype):
    x = rows("spread", 4, 5000).to(dtype)
    adaptor = Adaptor(temperature=0.9, top_k=700, top_p=0.9, typical_p=0.8)
    wide = filter_logits(x.float(), adaptor)
    assert torch.equal(filter_logits(x, adaptor), wide.to(dtype))


# Regressions that peers have met.


def test_top_p_keeps_the_crossing_token(device):
    x = torch.tensor([[0.5, 0.3, 0.2]], device=device).log()
    kept = filter_logits(x, Adaptor(top_p=0.6)) > float("-inf")
    assert kept.tolist() == [[True, True, False]]


def test_top_p_zero_keeps_one_and_ties_keep_the_lowest_ids(device):
    x = torch.zeros(1, 10, device=device)
    assert (filter_logits(x, Adaptor(top_p=0.0)) == 0).nonzero()[:, 1].tolist() == [0]
    assert (filter_logits(x, Adaptor(top_p=0.35)) == 0).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


def test_top_k_keeps_all_ties_and_more_than_v(device):
    x = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]], device=device)
    assert (filter_logits(x, Adaptor(top_k=2)) > -9).sum() == 3
    assert torch.equal(filter_logits(x, Adaptor(top_k=99)), x)
    one_hot = torch.tensor([[-100.0, 50.0, -100.0]], device=device)
    assert (filter_logits(one_hot, Adaptor(top_k=2)) > -1e9).sum() == 3


def test_signed_zeros_are_equal(device):
    x = torch.tensor([[0.0, -0.0, -1.0, 0.0]], device=device)
    assert (filter_logits(x, Adaptor(top_k=1)) > -9).tolist() == [[True, True, False, True]]
    assert (filter_logits(x, Adaptor(top_p=0.2)) > -9).tolist() == [[True, False, False, False]]


def test_typical_matches_worked_examples(device):
    for p, table in (
        ([0.5, 0.25, 0.125, 0.125], {0.1: [1], 0.5: [0, 1], 0.8: [0, 1, 2, 3]}),
        ([0.4, 0.3, 0.2, 0.1], {0.25: [1], 0.49: [1, 2], 0.7: [0, 1, 2]}),
    ):
        for mass, ids in table.items():
            x = torch.tensor([p], device=device).log()
            kept = filter_logits(x, Adaptor(typical_p=mass)) > float("-inf")
            assert kept.nonzero()[:, 1].tolist() == ids, (p, mass)
