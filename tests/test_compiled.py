"""Compiled models: the head is scored outside of their graphs, which run all the same."""

import copy
import functools

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from fastadapt.training import forward_log_odds, hidden_states, logits_log_odds
from fastadapt.training.pairs import PairBatch

V = 40
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}
OPTIONS = {
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {"final_logit_softcapping": 3.0, "head_dim": 4},
    "OPTForCausalLM": {"word_embed_proj_dim": 8, "ffn_dim": 24},  # calls the decoder of its body
    "BertLMHeadModel": {"is_decoder": True},  # a transform before the head
}


@pytest.fixture(autouse=True)
def no_graphs():
    """Eight graphs are kept for each code; those of other tests would be in the way."""
    torch._dynamo.reset()


def make(name="LlamaForCausalLM"):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**SIZES, **OPTIONS[name])).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


class Calls:
    """A backend that counts the calls of its graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        def run(*arguments):
            self.count += 1
            return graph(*arguments)

        return run


def whole(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def its_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


WAYS = [whole, in_place, its_forward]


def batch_of():
    ids = torch.randint(3, V - 5, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, 1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def scored(model, parameters):
    """Log-odds, and the gradients of a signed sum of them."""
    inputs, labels = batch_of()
    log_odds = forward_log_odds(model, inputs, labels)
    (log_odds * torch.linspace(-1, 1, labels.numel()).view_as(labels)).sum().backward()
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return [log_odds.detach(), *gradients]


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "way"),
    [*(("LlamaForCausalLM", way) for way in WAYS), *((name, whole) for name in [*OPTIONS][1:])],
)
def test_as_the_eager_model(name, way):
    plain, model, backend = make(name), make(name), Calls()
    wanted = scored(plain, list(plain.parameters()))
    before = {n: dict(module.__dict__) for n, module in model.named_modules()}
    compiled, counts = way(model, backend), []
    for _ in range(2):
        assert_same(scored(compiled, list(model.parameters())), wanted)
        counts.append(backend.count)
    assert 0 < counts[0] < counts[1]  # also in the second call, in which no graph is made
    for n, module in model.named_modules():  # all is put back
        assert module.__dict__.get("forward") is before[n].get("forward") or n == ""
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_that_was_made_without_hooks(way):
    """It is that of logits, before and after."""
    plain, backend = make(), Calls()
    wanted, (inputs, _) = scored(plain, list(plain.parameters())), batch_of()
    model = make()
    compiled = way(model, backend)
    logits = plain(**inputs).logits
    torch.testing.assert_close(compiled(**inputs).logits, logits)
    assert_same(scored(compiled, list(model.parameters())), wanted)
    before = backend.count
    torch.testing.assert_close(compiled(**inputs).logits, logits)
    assert backend.count > before


@pytest.mark.parametrize("part", ["lm_head", "model"])
@pytest.mark.parametrize("way", [whole, in_place])
def test_parts_that_are_compiled(part, way):
    plain, model, backend = make(), make(), Calls()
    parameters = list(model.parameters())
    setattr(model, part, way(getattr(model, part), backend))
    wanted = scored(plain, list(plain.parameters()))
    model(**batch_of()[0])  # a graph of logits
    before = backend.count
    for _ in range(2):
        assert_same(scored(model, parameters), wanted)
    assert part == "lm_head" or backend.count > before


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_with_an_adapter(outside):
    backend, adapters = Calls(), LoraConfig(r=2, target_modules=["q_proj"])
    plain = get_peft_model(make(), adapters)
    if outside:
        model = torch.compile(get_peft_model(make(), adapters), backend=backend)
    else:
        model = get_peft_model(torch.compile(make(), backend=backend), adapters)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (plain, model)]
    for p, other in zip(*trained, strict=True):
        p.data = torch.full_like(p, 0.1)
        other.data = p.data.clone()
    assert_same(scored(model, trained[1]), scored(plain, trained[0]))
    assert backend.count > 0


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead", "fullgraph": True}], ids=str)
def test_by_inductor(options):
    plain, model = make(), make()
    compiled = torch.compile(model, **options)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    got = scored(compiled, list(model.parameters()))
    wanted = scored(plain, list(plain.parameters()))
    for one, other in zip(got, wanted, strict=True):  # sums in another order, each of < 100 terms
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_a_step_that_is_compiled():
    """Of a loop that compiles its own step, the call itself among it."""
    plain, model, backend = make(), make(), Calls()
    wanted, (inputs, labels) = scored(plain, list(plain.parameters()))[0], batch_of()
    step = torch.compile(lambda: forward_log_odds(model, inputs, labels) * 2, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(step().detach(), 2 * wanted)


def test_states_and_logits_of_a_compiled_model():
    plain, model = make(), make()
    compiled = torch.compile(model, backend=Calls())
    inputs, labels = batch_of()
    batch = PairBatch(*inputs.values(), labels[:, :-1])
    for function in (hidden_states, logits_log_odds):
        torch.testing.assert_close(function(compiled, batch), function(plain, batch))


def test_hooks_of_the_body_see_each_call():
    """Also those that were not there when its graph was made."""
    model, seen = make(), []
    compiled = torch.compile(model, backend=Calls())
    scored(compiled, list(model.parameters()))
    model.model.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        scored(compiled, list(model.parameters()))
    assert len(seen) == 2


def test_a_copy_is_compiled_as_its_model():
    model, backend = make(), Calls()
    compiled = torch.compile(model, backend=backend)
    wanted = scored(compiled, list(model.parameters()))
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert_same(scored(other, list(other.parameters())), wanted)


def test_what_torch_is_told_not_to_compile():
    plain, model, backend = make(), make(), Calls()
    model.lm_head.forward = torch.compiler.disable(model.lm_head.forward)
    compiled = torch.compile(model, backend=backend)
    parameters = [list(m.parameters()) for m in (plain, model)]
    assert_same(scored(compiled, parameters[1]), scored(plain, parameters[0]))
    assert backend.count > 0


def test_a_compiled_forward_inside_of_a_function_is_refused():
    """What the function does beside could not be kept."""
    model = make()
    inner = torch.compile(model.forward, backend="eager")

    @functools.wraps(inner)
    def outer(*arguments, **named):
        return inner(*arguments, **named)

    model.forward = outer
    with pytest.raises(ValueError, match="got one inside of another function; compile the module"):
        scored(model, [])
