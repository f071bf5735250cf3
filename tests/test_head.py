"""A head is asked what its model makes of it: right, or refused by a sentence that says why."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from fastadapt import RewardPenalizeLoss
from fastadapt.log_odds import label_log_odds
from fastadapt.tracking.tracker import RewardPenalizeTracker
from fastadapt.training import (
    forward_log_odds,
    hidden_states,
    logits_log_odds,
    pair_loss,
    response_log_odds,
)
from fastadapt.training.head_check import ask, head_of
from fastadapt.training.pairs import IGNORED, PairBatch

V = 40
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}
SEQ2SEQ = {
    "vocab_size": V,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
    "vocab_size": V,
}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "head_dim": 4,
}
# name: class, options of its configuration
MODELS = {
    "llama": ("Llama", {}),
    "granite divides": ("Granite", {"logits_scaling": 2.5}),
    "hyperclovax multiplies": ("HyperCLOVAX", {"logits_scaling": 2.5}),
    "minicpm3 divides before": ("MiniCPM3", {**MLA, "dim_model_base": 4}),
    "cohere multiplies": ("Cohere", {"logit_scale": 0.3}),
    "falcon_h1 multiplies": (
        "FalconH1",
        {
            "lm_head_multiplier": 0.3,
            "mamba_d_ssm": 16,
            "mamba_n_heads": 4,
            "mamba_d_head": 4,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
        },
    ),
    "gemma2 caps": ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 4}),
    "gpt2": ("GPT2", {"n_positions": 32}),
    "opt projects": ("OPT", {"word_embed_proj_dim": 8, "ffn_dim": 24}),
    "mixtral": ("Mixtral", {"num_local_experts": 2}),
}


def _config(name, options):
    return getattr(transformers, f"{name}Config")(**{**SIZES, **options})


def _paligemma():
    text = {**SIZES, "head_dim": 4, "model_type": "gemma2", "final_logit_softcapping": 3.0}
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        image_token_index=V - 1,
        projection_dim=16,
        hidden_size=16,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _gemma3():
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=4, final_logit_softcapping=None)
    return transformers.Gemma3ForCausalLM(config)


def _bert():
    config = transformers.BertConfig(**SIZES, is_decoder=True)
    return transformers.BertLMHeadModel(config)


def _bart():
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ))
    model.final_logits_bias.normal_()
    return model


def _t5():
    config = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


SPECIAL = {
    "gemma3 caps nothing": _gemma3,
    "paligemma caps in its text_config": _paligemma,
    "bert transforms": _bert,
    "bart adds a buffer": _bart,
    "t5 scales before": _t5,
}


HALF = ("llama", "hyperclovax multiplies", "gemma2 caps", "bert transforms")


def make(name="llama", spread=40.0):
    """A tiny random model in evaluation mode, with large logits, so that a cap shows."""
    torch.manual_seed(0)
    if name in SPECIAL:
        model = SPECIAL[name]()
    else:
        kind, options = MODELS[name]
        class_name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
        model = getattr(transformers, class_name)(_config(kind, options))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(spread)
    return model.eval()


def inputs_of(model, rows=2):
    ids = torch.randint(3, V - 5, (rows, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def labels_of(inputs):
    labels = inputs["input_ids"].roll(-1, 1).clone()
    labels[:, -1] = IGNORED
    labels[0, 1] = IGNORED
    return labels


def check(model, tolerance=1e-4):
    """Log-odds are those of the model's own logits."""
    inputs = inputs_of(model)
    labels = labels_of(inputs)
    with torch.no_grad():
        logits = model(**inputs).logits.float()
        ours = forward_log_odds(model, inputs, labels)
    expected = label_log_odds(logits, labels)
    bound = tolerance * float(logits.abs().max())
    assert ours.dtype == torch.float32 and not (labels == IGNORED).all()
    torch.testing.assert_close(ours, expected, rtol=0, atol=bound)
    if not model.config.is_encoder_decoder:
        batch = PairBatch(inputs["input_ids"], inputs["attention_mask"], labels[:, :-1])
        with torch.no_grad():
            for log_odds_of in (response_log_odds, logits_log_odds):
                log_odds = log_odds_of(model, batch)
                torch.testing.assert_close(log_odds, expected[:, :-1], rtol=0, atol=bound)


@pytest.mark.parametrize("name", [*MODELS, *SPECIAL])
def test_log_odds_are_those_of_the_models_own_logits(name):
    check(make(name))


@pytest.mark.parametrize("name", HALF)
def test_in_half_precision(name):
    model = make(name)
    check(model.bfloat16(), 2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(make(name), 2e-2)


def test_the_shape_is_found():
    """The numbers are those of the configuration, to the bit."""
    found = {name: head_of(make(name)) for name in ("granite divides", "gemma2 caps", "llama")}
    assert [(head.softcap, head.logit_scale) for head in found.values()] == [
        (None, 1 / 2.5),
        (3.0, 1.0),
        (None, 1.0),
    ]
    assert head_of(make("hyperclovax multiplies")).logit_scale == 2.5
    assert head_of(make("minicpm3 divides before")).logit_scale == 1.0


def test_a_vocabulary_that_is_cut():
    """Logits of fewer ids than the head has rows: the others are no outcomes."""
    model = make()

    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x)[..., : V - 5]

    head = Cut(16, V, bias=False)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    check(model)
    assert head_of(model).weight.shape == (V - 5, 16)


class Scaled(nn.Linear):
    """Halves what it makes, and says so nowhere."""

    def forward(self, x):
        return 0.37 * super().forward(x)


class Transformed(nn.Linear):
    """Looks like a matrix."""

    def forward(self, x):
        return super().forward(torch.tanh(x))


def _replaced(kind):
    def change(model):
        head = kind(16, V, bias=False)
        head.weight = model.lm_head.weight
        model.set_output_embeddings(head)

    return change


def _hooked(function):
    return lambda model: model.lm_head.register_forward_hook(lambda m, x, z: function(z))


def _after(function):
    def change(model):
        def on_output(module, inputs, output):
            output.logits = function(output.logits)

        model.register_forward_hook(on_output)

    return change


def _forbids(z):
    return torch.cat([torch.full_like(z[..., :2], -1e9), z[..., 2:]], -1)


CHANGES = {
    "a hook that scales": _hooked(lambda z: z * 0.37),
    "a hook that adds": _hooked(lambda z: z + torch.linspace(0, 1, z.shape[-1])),
    "a hook that forbids": _hooked(_forbids),
    "a hook that caps": _hooked(lambda z: 30 * torch.tanh(z / 30)),
    "a hook of the model": _after(lambda z: z * 0.37),
    "a hook of the model that caps": _after(lambda z: 50 * torch.tanh(z / 50)),
    "a class that scales": _replaced(Scaled),
    "a class that transforms": _replaced(Transformed),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_product_is_refused(name):
    """Also where it changes nothing that these small logits would show; once asked, asked again."""
    model = make(spread=1.0)
    check(model)
    CHANGES[name](model)
    inputs = inputs_of(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected logits that are products.*logits_log_odds"):
            forward_log_odds(model, inputs, labels_of(inputs))
        with pytest.raises(ValueError, match="expected logits that are products"):
            head_of(model)


def test_a_hook_that_is_gone_is_forgotten():
    model = make()
    handle = model.lm_head.register_forward_hook(lambda m, x, z: z * 0.37)
    with pytest.raises(ValueError, match="expected logits that are products"):
        head_of(model)
    handle.remove()
    check(model)


def test_another_number_is_another_head():
    """The configuration is read by the model in each forward, and so it is here."""
    model = make("granite divides")
    check(model)
    model.config.logits_scaling = 5.0
    check(model)
    assert head_of(model).logit_scale == 0.2


def test_a_hook_before_the_head_is_seen():
    """It changes what reaches the head, not what is made of it."""
    model = make()
    model.lm_head.register_forward_pre_hook(lambda m, x: (x[0] * 0.37,))
    check(model)


class Codes(nn.Module):
    """An int8 head: a scale a row, as quantisers have it."""

    def __init__(self, weight):
        super().__init__()
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight * self.scale).t().to(x.dtype)


class NoMatrix(nn.Module):
    """As of GPTQ: packed numbers under another name."""

    def __init__(self, weight):
        super().__init__()
        self.codes = Codes(weight)

    def forward(self, x):
        return self.codes(x)


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [(Codes, "can be dequantised, got Tensor of torch.int8 in Codes"), (NoMatrix, "a linear head")],
)
def test_quantised_heads_are_refused(kind, message, cast):
    model = make()
    model.set_output_embeddings(kind(model.lm_head.weight))
    inputs = inputs_of(model)
    batch = PairBatch(*inputs.values(), labels_of(inputs)[:, :-1])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        for log_odds_of in (response_log_odds, lambda m, b: head_of(m)):
            with pytest.raises(ValueError, match=f"{message}.*logits_log_odds is right"):
                log_odds_of(model, batch)
        assert logits_log_odds(model, batch).isfinite().all()


class Packed(nn.Parameter):
    """As of bitsandbytes: two codes a byte in a column, and the scales beside."""


def _packed(weight, state):
    low, high = weight.flatten() % 16, weight.flatten() // 16
    codes = torch.stack([low, high], 1).flatten().view(state.shape).float() - 8
    return (codes * state.scale).to(state.dtype)


class PackedHead(nn.Module):
    """A linear layer that makes its matrix in each call."""

    def __init__(self, weight, dtype, factor=1.0):
        super().__init__()
        scale = weight.detach().float().abs().amax(1, keepdim=True) / 7
        codes = (weight.detach().float() / scale).round().clamp(-8, 7).add(8).byte().view(-1, 2)
        packed = (codes[:, 0] + 16 * codes[:, 1])[:, None]
        self.weight = Packed(packed, requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=weight.shape, scale=scale, dtype=dtype)
        self.bias, self.factor = None, factor

    def forward(self, x):
        matrix = _packed(self.weight.data, self.weight.quant_state)
        return self.factor * nn.functional.linear(x, matrix.to(x.dtype))


@pytest.fixture
def quantiser(monkeypatch):
    """A package of the quantiser's interface; weights say which one defines them."""
    package = SimpleNamespace(functional=SimpleNamespace(dequantize_4bit=_packed))
    monkeypatch.setitem(sys.modules, "a_quantiser", package)
    monkeypatch.setattr(Packed, "__module__", "a_quantiser.nn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_that_can_be_dequantised(quantiser, dtype):
    """Also a matrix that is made in another dtype than that of the states; the body is trained."""
    model = make("gemma2 caps")
    model.set_output_embeddings(PackedHead(model.lm_head.weight, dtype))
    check(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, 2e-2)
    inputs = inputs_of(model)
    labels = labels_of(inputs)
    gradients = []
    for log_odds in (
        label_log_odds(model(**inputs).logits, labels),
        forward_log_odds(model, inputs, labels),
    ):
        model.zero_grad()
        log_odds[labels != IGNORED].sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    bound = 1e-4 * float(gradients[0].abs().max())
    torch.testing.assert_close(*reversed(gradients), rtol=0, atol=bound)


def test_codes_that_are_more_than_a_matrix_are_refused(quantiser):
    """What a layer does beside is seen in its logits; a weight that says nothing, at the front."""
    model = make()
    inputs = inputs_of(model)
    model.set_output_embeddings(PackedHead(model.lm_head.weight, torch.float32, factor=0.37))
    with pytest.raises(ValueError, match="expected logits that are products"):
        forward_log_odds(model, inputs, labels_of(inputs))
    del sys.modules["a_quantiser"].functional.dequantize_4bit
    with pytest.raises(ValueError, match="can be dequantised, got Packed of torch.uint8"):
        forward_log_odds(model, inputs, labels_of(inputs))


class Scales(torch.Tensor):
    """As of torchao: floats to the outside, which a method of their own makes of codes."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Scales(inner["codes"], inner["scale"])

    def dequantize(self):
        """The matrix."""
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        if function is torch.ops.aten.detach.default:
            return Scales(arguments[0].codes, arguments[0].scale)
        plain = [x.dequantize() if isinstance(x, Scales) else x for x in arguments]
        return function(*plain, **(named or {}))


def test_a_tensor_that_dequantises_itself():
    model = make()
    weight = model.lm_head.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = Scales((weight / scale).round().to(torch.int8), scale)
    model.lm_head.weight = nn.Parameter(codes, requires_grad=False)
    check(model)
    model.lm_head.weight = nn.Parameter(codes, requires_grad=True)
    with pytest.raises(ValueError, match="expected a quantised head that is frozen, got Scales"):
        head_of(model)


def test_a_tensor_that_dequantises_itself_below_lora():
    """The frozen matrix is made of its codes, and the adapter's product is beside it."""
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=["lm_head"]))
    layer = model.get_output_embeddings()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    weight = layer.base_layer.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = Scales((weight / scale).round().to(torch.int8), scale)
    layer.base_layer.weight = nn.Parameter(codes, requires_grad=False)
    check(model)
    assert head_of(model).lora is not None


def test_a_tensor_of_tensors_is_refused():
    """As of torchao: a dtype of floats, made of codes."""
    model = make()
    from torch.testing._internal.two_tensor import TwoTensor

    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(TwoTensor(weight, weight))
    with pytest.raises(ValueError, match="can be dequantised, got TwoTensor"):
        head_of(model)


class Twice(transformers.LlamaForCausalLM):
    """Calls its head for nothing."""

    def forward(self, *args, **rest):
        self.lm_head(torch.zeros(1, 1, 16))
        return super().forward(*args, **rest)


class Never(transformers.LlamaForCausalLM):
    """Does not call its head."""

    def forward(self, input_ids, attention_mask=None, **rest):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=states @ self.lm_head.weight.t())


@pytest.mark.parametrize(("kind", "times"), [(Twice, "calls it twice"), (Never, "never calls it")])
def test_heads_are_called_once(kind, times):
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**SIZES)).eval()
    inputs = inputs_of(model)
    with pytest.raises(ValueError, match=f"calls its head once, {kind.__name__} {times}"):
        forward_log_odds(model, inputs, labels_of(inputs))


def test_trained_tokens_of_the_head_are_refused():
    inputs = inputs_of(make())
    changes = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}}
    model = get_peft_model(make(), LoraConfig(r=2, **changes))
    with pytest.raises(ValueError, match="a head without an adapter.*, got .*logits_log_odds"):
        forward_log_odds(model, inputs, labels_of(inputs))


SAVED = [
    ("llama", "lm_head"),
    ("gemma2 caps", "lm_head"),
    ("bert transforms", "decoder"),
    ("bert transforms", "predictions"),  # what holds the head is saved, with its transform
]


@pytest.mark.parametrize(("name", "saved"), SAVED)
def test_a_head_that_an_adapter_saves(name, saved):
    """Its trained copy while the adapter is active, else the original, turn by turn."""
    torch.manual_seed(0)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "query"], modules_to_save=[saved])
    model = get_peft_model(make(name), adapters)
    with torch.no_grad():
        model.get_base_model().get_output_embeddings().weight.mul_(0.5)
    inputs = inputs_of(model)
    labels = labels_of(inputs)
    seen = []
    for log_odds in (
        label_log_odds(model(**inputs).logits, labels),
        forward_log_odds(model, inputs, labels),
    ):
        model.zero_grad()
        log_odds[labels != IGNORED].sum().backward()
        seen.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    assert seen[0].keys() == seen[1].keys() and any("modules_to_save" in key for key in seen[1])
    for key, gradient in seen[0].items():
        bound = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(seen[1][key], gradient, rtol=0, atol=bound)
    on = forward_log_odds(model, inputs, labels)
    asked = []
    model.get_base_model().register_forward_pre_hook(lambda *_: asked.append(1))
    for _ in range(2):  # the original is asked once, the copy no more
        with model.disable_adapter(), torch.no_grad():
            off = forward_log_odds(model, inputs, labels)
            expected = label_log_odds(model(**inputs).logits, labels)
        torch.testing.assert_close(off, expected, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(off, on, atol=1e-2)
        assert torch.equal(forward_log_odds(model, inputs, labels), on)
    assert len(asked) == 1 + 2 * 3
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj", "query"]))
    model.set_adapter("plain")  # one without a copy of the head
    check(model)


def test_arguments_that_are_none_of_a_forward():
    model = make()
    inputs = inputs_of(model)
    labels = labels_of(inputs)
    with pytest.raises(ValueError, match="inputs: expected no labels among them"):
        forward_log_odds(model, {**inputs, "labels": labels}, labels)
    with pytest.raises(TypeError, match="inputs: expected a mapping.*, got Tensor"):
        forward_log_odds(model, inputs["input_ids"], labels)
    with pytest.raises(ValueError, match=r"labels: expected one for each position, \(\d+, \d+\),"):
        forward_log_odds(model, inputs, labels[:, :2])
    with pytest.raises(ValueError, match="expected a language model of transformers, got Linear"):
        forward_log_odds(torch.nn.Linear(2, 2), inputs, labels)


def test_asked_once():
    """One forward more than the calls, of one row, however many calls there are."""
    model, rows = make(), []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    inputs = inputs_of(model, rows=3)
    for _ in range(3):
        forward_log_odds(model, inputs, labels_of(inputs))
    assert rows == [1, 3, 3, 3]
    other = copy.deepcopy(model)
    forward_log_odds(other, inputs, labels_of(inputs))
    assert rows == [1, 3, 3, 3, 3]  # a copy knows what its model knew
    other.set_output_embeddings(copy.deepcopy(model.lm_head))
    forward_log_odds(other, inputs, labels_of(inputs))
    assert rows == [1, 3, 3, 3, 3, 1, 3]


def test_nothing_is_left_of_the_question():
    """Modes of each module, random numbers, hooks, gradients, buffers: as they were."""
    model = _bart()
    model.train()
    model.model.encoder.eval()
    modes = [module.training for module in model.modules()]
    model.final_logits_bias.zero_()  # made visible while asking
    inputs = inputs_of(model)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    answer = ask(model, inputs)
    assert answer.offset == "final_logits_bias"
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(a or b for a, b in hooks)


def test_dropout_draws_the_same_with_and_without_the_question():
    model = make("gpt2").train()
    assert model.config.resid_pdrop > 0
    inputs = inputs_of(model)
    seen = []
    for _ in range(2):  # asked in the first
        torch.manual_seed(3)
        seen.append(forward_log_odds(model, inputs, labels_of(inputs)).detach())
    assert torch.equal(*seen)


def test_a_model_that_fails_leaves_nothing():
    model = make()
    model.lm_head.register_forward_hook(lambda m, x, z: 1 / 0)
    inputs = inputs_of(model)
    with pytest.raises(ZeroDivisionError):
        forward_log_odds(model, inputs, labels_of(inputs))
    assert len(model.lm_head._forward_hooks) == 1 and not model.lm_head._forward_pre_hooks
    assert not model._forward_hooks and not model.model._forward_hooks


@pytest.mark.parametrize("name", ["minicpm3 divides before", "bert transforms", "gemma2 caps"])
def test_studies_take_what_reaches_the_head(name):
    """Hidden states, and the tracker's, are those that the head's product is made of."""
    model = make(name)
    inputs = inputs_of(model)
    batch = PairBatch(*inputs.values(), labels_of(inputs)[:, :-1])
    head, states = head_of(model), hidden_states(model, batch)
    z = torch.nn.functional.linear(states, head.weight, head.bias) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    logits = model(**inputs).logits[:, :-1]
    torch.testing.assert_close(z, logits, rtol=1e-4, atol=1e-4 * float(logits.detach().abs().max()))
    objective = RewardPenalizeLoss({"exmate": 1.0})
    tracker = RewardPenalizeTracker(objective, model=model, interval=1)
    with tracker:
        tracker.see(batch)
        pair_loss(model, batch, objective)
    gradients = []
    for row in range(2):
        loss = torch.nn.functional.logsigmoid(response_log_odds(model, batch))[row]
        loss = loss[batch.mask[row]].sum()
        wanted = [p for p in (head.weight, head.bias) if p is not None]
        gradients.append(torch.autograd.grad(loss, wanted))
    norm = sum(float(g.double().square().sum()) for g in gradients[0])
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if not tied:
        assert tracker.pairs[0]["chosen_norm"] == pytest.approx(norm, rel=1e-4)
    assert tracker.pairs[0]["chosen_norm"] > 0
