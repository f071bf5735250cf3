"""Registration: fakes, opcheck, torch.compile, autograd of what is not differentiable."""

import pytest
import torch
from torch.autograd import forward_ad

import fastadapt
from fastadapt import (
    Adaptor,
    adapted_log_odds,
    candidate_log_odds,
    label_log_odds,
    linear_candidate_log_odds,
    linear_divergence,
    linear_log_odds,
    linear_mle_loss,
)
from fastadapt._ops.common import AS_THEY_ARE

ADAPTOR = Adaptor(temperature=0.8, top_k=20, top_p=0.9)
OPS = torch.ops.fastadapt


OP_CASES = ["filter_logits", "sample", "sample_all", "score", "adapted_log_odds"]
OP_CASES += ["adapted_log_odds_backward", "score_all", "verify", "verify_all"]


def op_cases(device):
    """Every operator with arguments of every kind it takes."""
    x = torch.randn(3, 50, device=device)
    y, seeds = torch.tensor([1, -100, 7], device=device), torch.arange(3, device=device)
    knobs, neutral = ADAPTOR.packed.to(device), Adaptor().packed.to(device)
    log_odds, support, stats = OPS.adapted_log_odds(x, y, knobs, 0, -100, *AS_THEY_ARE)
    edits = (
        torch.tensor([1, 7, 3], dtype=torch.int32, device=device),
        torch.tensor([0, 2, 2, 3], device=device),
        torch.randn(1, 3, device=device, requires_grad=True),
        torch.full((3, 2), -1, dtype=torch.int32, device=device),
    )
    draft, first = torch.tensor([[3, 5]], device=device), seeds[:1]
    return {
        "verify": (x, knobs, 0, draft, None, None, None, 0, first, None, 0, *AS_THEY_ARE),
        "verify_all": (
            x,
            knobs,
            0,
            draft,
            first,
            x[:2] + 1,
            neutral,
            0,
            first,
            first,
            50,
            *(t.detach() for t in edits),
        ),  # fmt: skip
        "filter_logits": (x.bfloat16(), knobs, 1, *edits),
        "sample": (x, knobs, 0, seeds, seeds, False, False, 0, 0, *AS_THEY_ARE),
        "sample_all": (x.half(), knobs, 0, seeds, seeds, True, True, 4, 50, *edits),
        "score": (x, y, [knobs, neutral], [0, 1], -100, 0, *edits),
        "score_all": (x, y, [knobs, neutral], [0, 1], -100, 50, *edits),
        "adapted_log_odds": (x.clone().requires_grad_(), y, knobs, 0, -100, *edits),
        "adapted_log_odds_backward": (
            log_odds,
            x,
            y,
            knobs,
            0,
            -100,
            support,
            stats,
            *AS_THEY_ARE,
            False,
        ),
    }


@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck(device, name):
    arguments = op_cases(device)[name]
    op = getattr(OPS, name.removesuffix("_all")).default
    torch.library.opcheck(op, arguments)


def test_compiled_without_graph_breaks(rows, device):
    x = rows("spread", 4, 300)
    y, seeds = x.argmax(-1), torch.arange(4, device=device)

    def pipeline(x, y, seeds):
        drawn = fastadapt.sample(x * 2, ADAPTOR, seeds=seeds, base_logprobs=True, top_logprobs=2)
        masked = fastadapt.filter_logits(x, ADAPTOR)
        scored = fastadapt.score(x, y, [ADAPTOR, Adaptor(typical_p=0.9)])
        return drawn.tokens, drawn.rank, masked, scored.logprobs, drawn.base_logprobs + 1

    compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(x, y, seeds), pipeline(x, y, seeds), strict=True):
        assert torch.equal(got, wanted)


def test_compiled_gradient(rows, device):
    x = rows("spread", 4, 300).requires_grad_()
    y = x.detach().argmax(-1)

    def loss(x):
        return -fastadapt.adapted_logps(x * 0.5, y, ADAPTOR).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(x), x)[0] for f in (loss, compiled)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


def test_compiled_with_default_generator(rows, device):
    x = rows("spread", 64, 300)
    compiled = torch.compile(
        lambda x: fastadapt.sample(x, ADAPTOR).tokens, fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(3)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(3)
    assert torch.equal(first, compiled(x))
    assert not torch.equal(first, second)


def _calls():
    """A call of each operator with its differentiable inputs, by name."""
    hidden, head, logits = torch.randn(3, 8), torch.randn(11, 8), torch.randn(3, 11)
    labels, index = torch.tensor([1, 2, 3]), torch.tensor([[1, 2]] * 3)
    return {
        "label_log_odds": (lambda x: label_log_odds(x, labels), (logits,)),
        "candidate_log_odds": (lambda x: candidate_log_odds(x, index), (logits,)),
        "adapted_log_odds": (lambda x: adapted_log_odds(x, labels, Adaptor(top_k=4)), (logits,)),
        "linear_log_odds": (lambda h, w: linear_log_odds(h, w, labels), (hidden, head)),
        "linear_candidate_log_odds": (
            lambda h, w: linear_candidate_log_odds(h, w, index),
            (hidden, head),
        ),
        "linear_log_odds of an adapter": (
            lambda h, w, a, b: linear_log_odds(h, w, labels, lora=(a, b, 0.5)),
            (hidden, head, torch.randn(2, 8), torch.randn(11, 2)),
        ),
        "linear_mle_loss": (lambda h, w: linear_mle_loss(h, w, labels), (hidden, head)),
        "linear_mle_loss of an adapter": (
            lambda h, w, a, b: linear_mle_loss(h, w, labels, lora=(a, b, 0.5)),
            (hidden, head, torch.randn(2, 8), torch.randn(11, 2)),
        ),
        "linear_divergence": (
            lambda h, w: linear_divergence(h, w, torch.ones(3, 8), torch.ones(11, 8)),
            (hidden, head),
        ),
        "linear_divergence of an adapter": (
            lambda h, w, a, b: linear_divergence(h, w, h, w, lora=(a, b, 1.0)),
            (hidden, head, torch.randn(2, 8), torch.randn(11, 2)),
        ),
    }


@pytest.mark.parametrize("name", _calls())
def test_forward_mode_is_refused(name):
    """Each input alone, by `jvp` and by dual numbers: its tangent would be dropped."""
    call, inputs = _calls()[name]
    for i in range(len(inputs)):

        def of_one(x, i=i):
            return call(*inputs[:i], x, *inputs[i + 1 :])

        with pytest.raises(RuntimeError, match="expected no tangent, got forward-mode AD"):
            torch.func.jvp(of_one, (inputs[i],), (inputs[i],))
        with forward_ad.dual_level():
            with pytest.raises(RuntimeError, match="expected no tangent, got forward-mode AD"):
                of_one(forward_ad.make_dual(inputs[i], inputs[i]))
            call(*inputs)  # others may go on


def test_what_is_detached_takes_tangents():
    """Samples and filtered rows have no gradient in either mode."""
    logits, seeds = torch.randn(3, 11), torch.arange(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, logits)
        assert torch.equal(
            fastadapt.sample(dual, Adaptor(), seeds=seeds).tokens,
            fastadapt.sample(logits, Adaptor(), seeds=seeds).tokens,
        )
        assert forward_ad.unpack_dual(fastadapt.filter_logits(dual, Adaptor())).tangent is None


def test_linear_operators_on_meta():
    hidden, head = (torch.zeros(*s, device="meta", requires_grad=True) for s in ((3, 8), (11, 8)))
    labels = torch.zeros(3, dtype=torch.int64, device="meta")
    for loss in (linear_log_odds(hidden, head, labels), linear_mle_loss(hidden, head, labels)):
        gradients = torch.autograd.grad(loss.sum(), (hidden, head))
        assert [x.shape for x in gradients] == [(3, 8), (11, 8)]
        assert {x.device.type for x in gradients} == {"meta"}


def test_compiled_by_inductor(rows, device):
    """The default backend generates code: it must leave our operators and their order alone."""
    x, seeds = rows("spread", 4, 300), torch.arange(4, device=device)
    compiled = torch.compile(
        lambda x, s: fastadapt.sample(x + 1, ADAPTOR, seeds=s).tokens + 1, fullgraph=True
    )
    assert torch.equal(compiled(x, seeds), fastadapt.sample(x + 1, ADAPTOR, seeds=seeds).tokens + 1)


def test_undifferentiable_results_are_detached(rows, device):
    x = rows("spread", 2, 50).requires_grad_()
    drawn = fastadapt.sample(x, ADAPTOR, base_logprobs=True, log_mass=True)
    scored = fastadapt.score(x, drawn.tokens, [ADAPTOR])
    results = [*drawn[:6], *scored[:5], fastadapt.filter_logits(x, ADAPTOR)]
    assert not any(t.requires_grad for t in results if t is not None)


def test_inputs_are_never_written(rows, device):
    x = rows("spread", 4, 300).bfloat16()
    before = x.clone()
    fastadapt.sample(x, ADAPTOR, base_logprobs=True, top_logprobs=3)
    fastadapt.filter_logits(x, ADAPTOR)
    fastadapt.score(x, x.argmax(-1), [ADAPTOR])
    assert torch.equal(x, before)


def test_meta_tensors_have_the_right_shapes():
    x = torch.empty(5, 100, device="meta", dtype=torch.bfloat16)
    seeds = torch.empty(5, device="meta", dtype=torch.int64)
    knobs = torch.empty(8, 1, device="meta", dtype=torch.float64)
    outputs = OPS.sample(x, knobs, 0, seeds, seeds, True, False, 3, 0, *AS_THEY_ARE)
    shapes = [tuple(t.shape) for t in outputs]
    assert shapes == [(5,)] * 5 + [(5, 3), (5, 3), (5,)]


def test_unsupported_device_is_an_error():
    x = torch.empty(2, 10, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        OPS.adapted_log_odds_backward.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA),
            x,
            x,
            x,
            x,
            0,
            0,
            x,
            x,
            *AS_THEY_ARE,
            False,
        )


def test_operator_refuses_what_the_kernel_cannot_take():
    x = torch.zeros(3, 10)
    with pytest.raises(ValueError, match="knobs: expected 1 or 3 columns, got 2"):
        OPS.filter_logits(x, Adaptor(top_p=torch.tensor([0.1, 0.2])).packed, 0, *AS_THEY_ARE)
    with pytest.raises(ValueError, match="logits: expected a dtype code of 0 to 2, got 3"):
        OPS.filter_logits(x.double(), Adaptor().packed, 0, *AS_THEY_ARE)
    for code in (4, 5, 1 << 9, -1):
        with pytest.raises(
            ValueError, match=f"order: expected 0, 1 or the filter_code .* got {code}"
        ):
            OPS.filter_logits(x, Adaptor().packed, code, *AS_THEY_ARE)
    with pytest.raises(ValueError, match="adaptors: expected 1 to 256, got 257"):
        own = [Adaptor().packed] * 257, [0] * 257
        OPS.score(x, torch.zeros(3).long(), *own, -100, 0, *AS_THEY_ARE)
    wide = torch.zeros(1).expand(1, 2**22 + 1)
    with pytest.raises(ValueError, match="expected 1 to 4194304 entries a row, got 4194305"):
        fastadapt.filter_logits(wide.contiguous(), Adaptor())


def test_knob_out_of_range_in_the_operator_is_a_status(rows, device):
    """What a bad knob on CUDA comes to: only packing on the CPU reads values."""
    x = rows("spread", 3, 40)
    good = Adaptor(top_p=torch.tensor([0.9, 0.9, 0.9], device=device))
    seeds = torch.arange(3, device=device)
    clean = fastadapt.sample(x, good, seeds=seeds)
    for knob, value in ((0, -1.0), (0, 1e-9), (1, -1.0), (2, 1.5), (4, 0.0), (5, 1.0), (7, 0.0),
                        (3, float("nan"))):  # fmt: skip
        packed = good.packed.clone()
        packed[knob, 1] = value
        out = OPS.sample(
            x, packed, 0, seeds, torch.zeros_like(seeds), False, False, 0, 0, *AS_THEY_ARE
        )
        assert out[3].tolist() == [0, 4, 0]
        assert out[0].tolist() == [clean.tokens[0], -1, clean.tokens[2]]
        assert torch.equal(OPS.filter_logits(x, packed, 0, *AS_THEY_ARE)[1], x[1])


@pytest.mark.parametrize("temperature", [float("nan"), 0.0])
def test_bad_temperature_in_the_operator_scores_nan(rows, device, temperature):
    x, packed = rows("spread", 2, 40), Adaptor().packed.to(device, copy=True)
    packed[0] = temperature
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    logprobs, log_norm, kept, *_ = OPS.score(x, tokens, [packed], [0], -100, 0, *AS_THEY_ARE)
    assert logprobs.isnan().all()
    assert log_norm.isnan().all()
    assert kept.tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("linear_log_odds", True),
        ("linear_log_odds_backward", True),
        ("frozen_head_backward", True),
        ("refused_gradient", True),
        ("linear_divergence", True),
        ("linear_divergence_backward", True),
        ("linear_mle", True),
        ("scaled_gradient", False),
        ("without_gradient", False),
    ],
)
def test_what_waits_for_the_device_is_in_no_cuda_graph(name, waits):
    tags = getattr(OPS, name).default.tags
    assert (torch.Tag.cudagraph_unsafe in tags) == waits
