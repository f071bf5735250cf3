"""A head whose weight is there for its own forward and backward alone, as ZeRO-3 has it.

With a stand-in for DeepSpeed's engine, on one process: parameters are empty but between hooks of
their module, which put the data back before its forward and, through what the module returned,
before its backward.
"""

import contextlib

import pytest
import torch
import transformers
from torch import nn

from fastadapt.training import forward_log_odds, head

V = 40
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
MODELS = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 4},
    "Phi": {},  # a bias
}


class _Before(torch.autograd.Function):
    """Does something before the backward of what made a tensor."""

    @staticmethod
    def forward(ctx, act, x):
        """Returns the tensor."""
        ctx.act = act
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        """Acts."""
        ctx.act()
        return None, gradient


def _mapped(function, x):
    if isinstance(x, tuple):
        return tuple(_mapped(function, each) for each in x)
    return function(x) if isinstance(x, torch.Tensor) and x.requires_grad else x


def empty_between_passes(model):
    """Empties a model's parameters; returns a context that gathers given ones, as trl uses it."""
    data = {p: p.data for p in model.parameters()}
    for number, (p, x) in enumerate(data.items()):
        p.ds_id, p.ds_shape = number, x.shape
        p.data = x.new_empty(0)

    def gather(parameters):
        for p in parameters:
            p.data = data[p]

    def release(parameters):
        for p in parameters:
            p.data = data[p].new_empty(0)

    def watch(module, own):
        def before(_, arguments):
            gather(own)
            return _mapped(lambda x: _Before.apply(lambda: release(own), x), arguments)

        def after(_, arguments, output):
            release(own)
            return _mapped(lambda x: _Before.apply(lambda: gather(own), x), output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own:
            watch(module, own)

    @contextlib.contextmanager
    def gathered(*parameters):
        some = [p for p in parameters if isinstance(p, nn.Parameter) and p in data]
        gather(some)
        yield
        release(some)

    return gathered


def _gradients(model, log_odds, factors):
    (log_odds * factors).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _pair(name, trained):
    """A model, and the same with emptied parameters, and what gathers given ones."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
        models.append(getattr(transformers, f"{name}ForCausalLM")(config).eval())
        for p in models[-1].lm_head.parameters():
            p.data.mul_(20)
            p.requires_grad_(trained)
    return (*models, empty_between_passes(models[1]))


def _inputs():
    ids = torch.randint(3, V, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, 1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_as_if_the_weight_had_stayed(name, trained):
    whole, emptied, _ = _pair(name, trained)
    weight = emptied.lm_head.weight
    inputs, labels = _inputs()
    factors = torch.linspace(-1, 1, labels.numel()).view_as(labels)
    seen = []
    for model in (whole, emptied):
        log_odds = forward_log_odds(model, inputs, labels)
        assert weight.numel() == 0  # nothing is held between the passes
        seen.append((log_odds.detach(), _gradients(model, log_odds, factors)))
    (wanted, wanted_gradients), (got, got_gradients) = seen
    assert torch.equal(got, wanted)
    assert got_gradients.keys() == wanted_gradients.keys()
    assert ("lm_head.weight" in got_gradients) == trained
    for key, gradient in wanted_gradients.items():  # summed in another order: the hooks are nodes
        torch.testing.assert_close(got_gradients[key], gradient, msg=key)
    assert weight.numel() == 0  # and nothing after


def test_it_takes_the_hooks_of_the_head(monkeypatch):
    """Scores that do not leave the head's module are not seen by what gathers its weight."""
    whole, emptied, _ = _pair("Llama", True)
    monkeypatch.setattr(head, "is_gathered", lambda layer: False)
    log_odds = forward_log_odds(emptied, *_inputs())
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        log_odds.sum().backward()


def test_hooks_beside_see_one_output_again():
    """What is registered later than the engine's hooks gets the head's output alone."""
    _, emptied, _ = _pair("Llama", True)
    shapes = []
    emptied.lm_head.register_forward_hook(lambda m, x, z: shapes.append(z[0].shape))
    forward_log_odds(emptied, *_inputs()).sum().backward()
    assert len(shapes) == 2
    assert len(emptied.lm_head._forward_hooks) == 2  # the engine's and this one


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_trl_gathers_for_the_forward_alone(monkeypatch, trained):
    pytest.importorskip("trl")
    from trl.trainer import utils as trl_utils

    from fastadapt.trl import fused_log_probs

    whole, emptied, gathered = _pair("Gemma2", trained)
    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", gathered)
    (inputs, labels), seen = _inputs(), []
    for model in (whole, emptied):
        trl_utils.add_fused_lm_head(model)
        with fused_log_probs():
            for _ in range(2):  # asked, remembered
                logps = model(**inputs, labels=labels, fused_lm_head=True).log_probs
        factors = torch.linspace(-1, 1, logps.numel()).view_as(logps)
        seen.append((logps.detach(), _gradients(model, logps, factors)))
    (wanted, wanted_gradients), (got, got_gradients) = seen
    assert torch.equal(got, wanted)
    assert got_gradients.keys() == wanted_gradients.keys()
    for key, gradient in wanted_gradients.items():  # summed in another order: the hooks are nodes
        torch.testing.assert_close(got_gradients[key], gradient, msg=key)
