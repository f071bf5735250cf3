"""A mass that is exactly a knob: textbook rows, whose probabilities are fractions.

Truth is made of whole numbers here. Against it stand the CPU kernels and their PyTorch references,
on logits that were rounded, moved and weighed by a polynomial.
"""

import itertools
import math
import random

import pytest
import torch

from fastadapt import Adaptor, adapted_log_odds, filter_logits, reference, sample, score

pytestmark = pytest.mark.usefixtures("device")

IMPLEMENTATIONS = {"kernel": filter_logits, "reference": reference.filter_logits}
TOTALS = (10, 20, 100)
PER_LENGTH = 40  # compositions of a total in a number of parts, where there are more


def compositions(total, parts):
    """Ways to write a total as a sum: all of them, or a sample of always the same."""
    if math.comb(total - 1, parts - 1) <= PER_LENGTH:
        cuts = itertools.combinations(range(1, total), parts - 1)
    else:
        rng = random.Random(f"{total} {parts}")
        cuts = (sorted(rng.sample(range(1, total), parts - 1)) for _ in range(PER_LENGTH))
    for cut in cuts:
        ends = (0, *cut, total)
        yield [b - a for a, b in itertools.pairwise(ends)]


def top_p_cases(counts):
    """(p, kept) for every prefix of the tokens in rank order; p is its mass."""
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    for n in range(1, len(counts)):
        yield sum(counts[i] for i in order[:n]) / sum(counts), set(order[:n])


def typical_cases(counts):
    """The same by the distance to the entropy, in which the equally near are as one."""
    p = [c / sum(counts) for c in counts]
    entropy = -sum(q * math.log(q) for q in p)
    distance = [round(abs(-math.log(q) - entropy), 9) for q in p]
    for radius in sorted(set(distance))[:-1]:
        kept = {i for i, d in enumerate(distance) if d <= radius}
        yield sum(counts[i] for i in kept) / sum(counts), kept


def min_p_cases(counts):
    """(min_p, kept): a token is exactly that share of the largest."""
    for least in sorted(set(counts))[:-1]:
        yield least / max(counts), {i for i, c in enumerate(counts) if c >= least}


def epsilon_cases(counts):
    """(epsilon, kept): a token has exactly that probability."""
    for least in sorted(set(counts)):
        if least < sum(counts):
            yield least / sum(counts), {i for i, c in enumerate(counts) if c >= least}


def eta_cases(counts):
    """(eta, kept): a token has exactly min(eta, sqrt(eta) e^-H)."""
    entropy = -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts)
    for least in sorted(set(counts)):
        p = least / sum(counts)
        eta = max(p, (p * math.exp(entropy)) ** 2)  # the other term of the minimum is larger
        if eta < 0.999:  # it is 1, which is no cutoff, or rounds to it
            yield eta, {i for i, c in enumerate(counts) if c >= least}


CASES = {
    "top_p": top_p_cases,
    "typical_p": typical_cases,
    "min_p": min_p_cases,
    "epsilon_cutoff": epsilon_cases,
    "eta_cutoff": eta_cases,
}


def textbook(name, total, parts):
    """Probabilities (N, V) in float64, the knob of each row, and which of its tokens stay."""
    rows, knobs, kept = [], [], []
    for counts in compositions(total, parts):
        for value, tokens in CASES[name](counts):
            rows.append([c / total for c in counts])
            knobs.append(value)
            kept.append([i in tokens for i in range(parts)])
    p, value = (torch.tensor(t, dtype=torch.float64) for t in (rows, knobs))
    return p.view(-1, parts), value, torch.tensor(kept, dtype=torch.bool).view(-1, parts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("name", CASES)
def test_textbook_rows(device, cpu_capability, name, total, implementation):
    seen = 0
    for parts in range(2, 9):
        p, value, kept = textbook(name, total, parts)
        if not len(p):
            continue
        x = p.log().to(device)
        # far from zero, logits have the error of 20 times 2^-24, and single tokens show it
        shifts = (0.0, 7.3, -19.0) if name == "top_p" else (0.0,)
        for shift, knob in itertools.product(shifts, (value, value.float())):
            adaptor = Adaptor(**{name: knob.to(device)})
            got = IMPLEMENTATIONS[implementation]((x + shift).float(), adaptor)
            wrong = ((got > float("-inf")).cpu() != kept).any(-1)
            assert not wrong.any(), (p[wrong][0], value[wrong][0], shift, knob.dtype)
            seen += len(p)
    assert seen > 100


@pytest.mark.parametrize("name", CASES)
def test_textbook_rows_in_float64(name):
    """The textbook form of the reference, whose only roundings are those of float64."""
    for total, parts in itertools.product(TOTALS, (2, 3, 5, 8)):
        p, value, kept = textbook(name, total, parts)
        if len(p):
            got = reference.filter_logits(p.log() - 3, Adaptor(**{name: value}))
            assert torch.equal(got > float("-inf"), kept), (total, parts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_tokens(device, cpu_capability, implementation):
    """Of n equal tokens, p = k / n keeps the first k."""
    rng = random.Random(0)
    for n in (2, 3, 7, 10, 20, 64, 100, 255, 1000, 1023, 1024, 1025, 3000):
        k = torch.tensor(sorted(rng.sample(range(1, n), min(n - 1, 20))))
        adaptor = Adaptor(top_p=(k.double() / n).to(device))
        x = torch.full((len(k), n), -2.7, device=device)
        got = IMPLEMENTATIONS[implementation](x, adaptor) > float("-inf")
        assert torch.equal(got.cpu(), torch.arange(n) < k[:, None]), n


def test_equally_typical_tokens_stay_or_go_together(device, cpu_capability):
    """Two levels, one of them exactly tau: many tokens of little mass count as one of much."""
    for few, many in ((2, 3000), (50, 700), (900, 2000)):
        # the few are nearer the entropy: they share 0.9 of the mass
        p = torch.cat([torch.full((few,), 0.9 / few), torch.full((many,), 0.1 / many)])
        x = p.double().log().float().to(device)[None]
        kept = filter_logits(x, Adaptor(typical_p=0.9)) > float("-inf")
        assert torch.equal(kept.cpu()[0], torch.arange(few + many) < few), (few, many)


@pytest.mark.parametrize("kind", ["normal", "spread", "bf16"])
@pytest.mark.parametrize("v", [1000, 32_000, 128_256])
def test_counts_are_those_of_sorted_float64_probabilities(rows, v, kind):
    """Away from exact masses nothing changes: the same number of tokens, row by row."""
    x = rows(kind, 3, v)
    p = x.double().softmax(-1).sort(-1, descending=True).values
    before = p.cumsum(-1) - p
    for top_p in (0.1, 0.5, 0.8, 0.9, 0.95, 0.99):
        got = filter_logits(x, Adaptor(top_p=top_p)) > float("-inf")
        assert torch.equal(got.sum(-1), (before < top_p).sum(-1)), top_p
    for least in (1e-4, 1e-3, 0.02):
        got = filter_logits(x, Adaptor(epsilon_cutoff=least)) > float("-inf")
        assert torch.equal(got.sum(-1), (p >= least).sum(-1).clamp(min=1)), least
        got = filter_logits(x, Adaptor(min_p=least)) > float("-inf")
        assert torch.equal(got.sum(-1), (p >= least * p[:, :1]).sum(-1)), least


@pytest.mark.parametrize("name", CASES)
def test_every_verb_has_the_same_survivors(device, cpu_capability, name):
    p, value, kept = textbook(name, 20, 5)
    x, adaptor = p.log().float().to(device), Adaptor(**{name: value.to(device)})
    wanted = kept.sum(-1)
    assert torch.equal(sample(x, adaptor).kept.cpu().long(), wanted)
    for token in range(5):
        y = torch.full((len(x),), token, device=device)
        # four adaptors or more look at long rows in pieces; these are short
        scored = score(x, y, [adaptor] * 5)
        assert torch.equal(scored.kept[:, 4].cpu().long(), wanted)
        assert torch.equal(scored.logprobs[:, 0].isfinite().cpu(), kept[:, token])
        inside = adapted_log_odds(x, y, adaptor) > float("-inf")
        assert torch.equal(inside.cpu(), kept[:, token])


@pytest.mark.parametrize("filler", [5, 5000])
def test_long_rows_of_textbook_heads(device, cpu_capability, filler):
    """A head of fractions before a tail of no mass, alone and as one of many adaptors."""
    p, value, kept = textbook("top_p", 20, 4)
    p, value, kept = p[::9], value[::9], kept[::9]
    tail = torch.full((len(p), filler), -60.0)
    x = torch.cat([tail, p.log().float(), tail], 1).to(device)
    for row, top_p, wanted in zip(x, value.tolist(), kept, strict=True):
        many = [Adaptor(top_p=top_p), *(Adaptor(top_p=q) for q in (0.1, 0.3, 0.6, 0.99))]
        got = filter_logits(row, many[0]) > float("-inf")
        assert torch.equal(got[filler:-filler].cpu(), wanted)
        assert int(got.sum()) == int(wanted.sum())
        scored = score(row[None], torch.tensor([filler], device=device), many)
        assert int(scored.kept[0, 0]) == int(wanted.sum())
