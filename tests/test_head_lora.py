"""LoRA on the head, from peft: log-odds and gradients of the model's own logits, or a refusal."""

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from fastadapt import RewardPenalizeLoss, linear_divergence, linear_mle_loss
from fastadapt.hf import LogitsFreeTrainer
from fastadapt.log_odds import label_log_odds
from fastadapt.losses import label_logps
from fastadapt.tracking.tracker import RewardPenalizeTracker
from fastadapt.training import (
    forward_log_odds,
    hidden_states,
    logits_log_odds,
    pair_loss,
    reference_logps,
    response_log_odds,
)
from fastadapt.training.head_check import head_of
from fastadapt.training.pairs import IGNORED, PairBatch

V = 37
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}


def bare(name="llama"):
    """A tiny random model with logits of a few nats."""
    torch.manual_seed(0)
    if name == "gemma2 caps":
        config = transformers.Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=3.0)
        model = transformers.Gemma2ForCausalLM(config)
    elif name == "cohere scales":
        model = transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.3))
    elif name == "bert is biased":
        config = transformers.BertConfig(**SIZES, is_decoder=True)
        model = transformers.BertLMHeadModel(config)
    else:
        tied = name == "tied"
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30.0)
        if name == "bert is biased":
            model.get_output_embeddings().bias.normal_()
    return model.eval()


def head_name(model):
    """Of the module that is the head."""
    head = model.get_output_embeddings()
    return next(k for k, module in model.named_modules() if module is head)


def adapted(name="llama", kind=LoraConfig, dropout=None, **options):
    """The same with an adapter on its head and one in its body, whose B is not 0."""
    model = bare(name)
    body = "query" if "bert" in name else "q_proj"
    if kind is LoraConfig:
        options = {"r": 3, "lora_alpha": 5, "lora_dropout": dropout or 0.0, **options}
    model = get_peft_model(model, kind(target_modules=[head_name(model), body], **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.7)
    return model


def inputs_of(rows=2):
    ids = torch.randint(3, V - 3, (rows, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def labels_of(inputs):
    labels = inputs["input_ids"].roll(-1, 1).clone()
    labels[:, -1] = IGNORED
    labels[0, 1] = IGNORED
    return labels


def batch_of(inputs):
    return PairBatch(inputs["input_ids"], inputs["attention_mask"], labels_of(inputs)[:, :-1])


def check(model, tolerance=1e-4):
    """Log-odds and gradients of all that is trained are those of the model's own logits."""
    inputs = inputs_of()
    labels = labels_of(inputs)
    found = []
    logits = model(**inputs).logits.float()
    for log_odds in (label_log_odds(logits, labels), forward_log_odds(model, inputs, labels)):
        model.zero_grad()
        gradients = {}
        if log_odds.requires_grad:
            torch.nn.functional.logsigmoid(log_odds)[labels != IGNORED].sum().backward()
            gradients = {
                key: p.grad.float() for key, p in model.named_parameters() if p.grad is not None
            }
        found.append((log_odds.detach(), gradients))
    (expected, theirs), (got, ours) = found
    bound = tolerance * float(logits.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=bound)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        bound = tolerance * float(theirs[key].abs().max()) + 1e-6
        torch.testing.assert_close(gradient, theirs[key], rtol=0, atol=bound, msg=key)
    return got, ours


NAMES = ("llama", "tied", "gemma2 caps", "cohere scales", "bert is biased")


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_log_odds_and_gradients_are_those_of_the_models_own_logits(name):
    log_odds, gradients = check(adapted(name))
    on_head = [key for key in gradients if "lora_" in key and "layer" not in key]
    assert len(on_head) == 2
    plain = forward_log_odds(bare(name), inputs_of(), labels_of(inputs_of()))
    assert not torch.allclose(log_odds, plain, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
        {"r": 8, "lora_alpha": 1},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True:UserWarning")
def test_kinds_of_lora_that_only_add_their_product(options):
    model = adapted(**options)
    if options.get("lora_bias"):
        with torch.no_grad():
            model.get_output_embeddings().lora_B["default"].bias.normal_()
    _, gradients = check(model)
    biased = any("lm_head.lora_B.default.bias" in key for key in gradients)
    assert biased == bool(options.get("lora_bias"))


def test_the_heads_own_bias_beside_that_of_lora():
    model = adapted("bert is biased", lora_bias=True)
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].bias.normal_()
    check(model)


@pytest.mark.parametrize("autocast_adapter", (True, False), ids=("float32", "bfloat16"))
def test_half_precision(autocast_adapter):
    """peft makes adapters float32 beside a half-precision head, or is told not to."""
    model = bare().bfloat16()
    options = {"autocast_adapter_dtype": autocast_adapter}
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["lm_head"]), **options)
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.normal_(std=0.7)
    dtype = model.get_output_embeddings().lora_A["default"].weight.dtype
    assert dtype == (torch.float32 if autocast_adapter else torch.bfloat16)
    check(model, 3e-2)


def test_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(adapted(), 3e-2)


def test_compiled():
    """The head and its adapter run outside of the graphs, turn by turn with logits."""
    model = adapted()
    inputs = inputs_of()
    expected = forward_log_odds(model, inputs, labels_of(inputs))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(
            forward_log_odds(compiled, inputs, labels_of(inputs)), expected, rtol=1e-5, atol=1e-5
        )
        logits = compiled(**inputs).logits
        from_logits = label_log_odds(logits.float(), labels_of(inputs))
        torch.testing.assert_close(from_logits, expected, rtol=1e-4, atol=1e-3)


def test_the_head_is_asked_for_with_its_adapter():
    """`head_of` has what `linear_log_odds` takes; a trained matrix below is trained too."""
    model = adapted()
    head = head_of(model)
    a, b, scale = head.lora
    assert (tuple(a.shape), tuple(b.shape), scale) == ((3, 16), (V, 3), 5 / 3)
    assert head.weight is model.get_base_model().lm_head.base_layer.weight
    head.weight.requires_grad_()
    check(model)
    a.requires_grad_(False)
    b.requires_grad_(False)
    check(model)


def test_losses_of_heads_take_the_adapter_that_is_in_force():
    """Of the same states those of the model's logits: its cross-entropy, and no divergence."""
    model, batch = adapted(), batch_of(inputs_of())
    with torch.no_grad():
        head, states = head_of(model), hidden_states(model, batch)
        loss = linear_mle_loss(states, head.weight, batch.labels, lora=head.lora)
        logits = logits_log_odds(model, batch)
        expected = -torch.nn.functional.logsigmoid(logits)[batch.mask].mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert abs(loss - linear_mle_loss(states, head.weight, batch.labels)) > 0.1
        a, b, scale = head.lora
        merged = head.weight + scale * b @ a
        same = linear_divergence(states, head.weight, states, merged, lora=head.lora)
        assert (same < 1e-5).all()
        assert (linear_divergence(states, head.weight, states, merged) > 0.1).all()


def test_disabled_adapters_are_the_base_head_turn_by_turn():
    """As in a reference of DPO: each of both is asked once."""
    model, inputs = adapted(), inputs_of()
    labels, asked = labels_of(inputs), []
    check(model)
    on = forward_log_odds(model, inputs, labels)
    model.get_base_model().register_forward_pre_hook(lambda *_: asked.append(1))
    with torch.no_grad():
        for _ in range(2):
            with model.disable_adapter():
                off = forward_log_odds(model, inputs, labels)
            assert torch.equal(forward_log_odds(model, inputs, labels), on)
    assert len(asked) == 1 + 2 * 2
    plain = forward_log_odds(bare(), inputs, labels)
    torch.testing.assert_close(off, plain, rtol=1e-5, atol=1e-5)


def test_another_adapter_is_another_head():
    model = adapted()
    first, _ = check(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], use_rslora=True))
    model.set_adapter("second")
    with torch.no_grad():
        model.get_output_embeddings().lora_B["second"].weight.normal_(std=0.5)
    second, gradients = check(model)
    assert not torch.allclose(first, second, atol=1e-2)
    assert {key.split(".")[-2] for key in gradients} == {"second"}
    model.get_output_embeddings().scaling["second"] *= 3  # the model is asked again
    check(model)
    model.add_adapter("body", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("body")  # it has nothing on the head
    check(model)
    assert head_of(model).lora is None


def test_merged_adapters_are_in_the_weight():
    model = adapted()
    expected, _ = check(model)
    model.merge_adapter()
    merged, _ = check(model)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-3)
    assert head_of(model).lora is None
    with model.disable_adapter(), pytest.raises(ValueError, match="to be unmerged before they are"):
        forward_log_odds(model, inputs_of(), labels_of(inputs_of()))
    model.unmerge_adapter()
    assert torch.allclose(check(model)[0], expected, atol=1e-3)


def test_dropout_counts_in_training_alone():
    model = adapted(dropout=0.2)
    check(model.eval())
    refused(model.train(), r"no dropout in training \(lora_dropout=0, .*got 0.2; .*logits_log_odds")
    check(adapted(dropout=0.0).train())


def refused(model, message):
    inputs = inputs_of()
    with pytest.raises(ValueError, match=f"model: expected .*{message}"):
        forward_log_odds(model, inputs, labels_of(inputs))
    assert logits_log_odds(model, batch_of(inputs)).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LoraConfig, {"use_dora": True}, "a head with plain LoRA, got DoraLinearVariant"),
        (VeraConfig, {"r": 2}, "without an adapter or with one layer of LoRA, got Linear"),
        (LoHaConfig, {"r": 2}, "without an adapter or with one layer of LoRA, got Linear"),
        (AdaLoraConfig, {"total_step": 10}, "or with one layer of LoRA, got SVDLinear"),
        (IA3Config, {"feedforward_modules": []}, "or with one layer of LoRA, got Linear"),
    ],
    ids=["dora", "vera", "loha", "adalora", "ia3"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_adapters_are_refused(kind, options, message):
    refused(adapted(kind=kind, **options), message)


def test_several_active_adapters_are_refused():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    refused(model, r"a head with one active adapter, got \['default', 'second'\]")


def test_a_head_gathered_for_its_own_forward_is_refused():
    """As ZeRO-3 marks the parameters that it gathers."""
    model = adapted()
    model.get_output_embeddings().lora_B["default"].weight.ds_id = 3
    with pytest.raises(ValueError, match="LoRA that is not gathered for its own forward alone"):
        forward_log_odds(model, inputs_of(), labels_of(inputs_of()))


def test_what_a_head_does_beside_its_adapter_is_seen():
    """Also where the change comes after the model was asked, below the adapter."""
    model = adapted()
    check(model)
    model.get_output_embeddings().base_layer.register_forward_hook(lambda m, x, z: z.tanh())
    refused(model, "logits that are products with the head's matrix")
    model = adapted()
    model.get_output_embeddings().register_forward_hook(lambda m, x, z: z * torch.arange(V))
    refused(model, "logits that are products with the head's matrix")


def test_pairs_and_their_reference():
    """The reference is the base model; losses follow those of logits."""
    model, inputs = adapted(), inputs_of()
    batch, objective = batch_of(inputs), RewardPenalizeLoss({"dpo": 1.0, "mle": 0.5})
    with model.disable_adapter():
        chosen, rejected = reference_logps(model, batch)
        plain = label_logps(logits_log_odds(model, batch))
        plain = torch.where(batch.labels == IGNORED, 0.0, plain).sum(-1)
    both = torch.cat([chosen, rejected])
    torch.testing.assert_close(both, plain.double(), rtol=1e-5, atol=1e-4)
    losses = [
        pair_loss(model, batch, objective, (chosen, rejected), log_odds_of=f)[0]
        for f in (response_log_odds, logits_log_odds)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_what_is_tracked_is_of_the_adapter():
    """Norms of the gradients of log P in A and B, from the states of the step."""
    model, inputs = adapted(), inputs_of()
    batch, objective = batch_of(inputs), RewardPenalizeLoss({"exmate": 1.0})
    tracker = RewardPenalizeTracker(objective, model=model, interval=1)
    with tracker:
        tracker.see(batch)
        pair_loss(model, batch, objective)
    log_odds = torch.nn.functional.logsigmoid(logits_log_odds(model, batch))
    wanted = [p for name, p in model.named_parameters() if "lm_head.lora_" in name]
    gradients = torch.autograd.grad(log_odds[0][batch.mask[0]].sum(), wanted)
    norm = sum(float(g.double().square().sum()) for g in gradients)
    assert tracker.pairs[0]["chosen_norm"] == pytest.approx(norm, rel=1e-4)


def rows_of(count):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (count, 9), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def test_the_trainer_without_logits_follows_transformers(tmp_path):
    logs = []
    for kind in (Trainer, LogitsFreeTrainer):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, logging_steps=1, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-2, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = kind(adapted(), arguments, train_dataset=rows_of(16))
        trainer.train()
        seen = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        weights = {k: p.detach() for k, p in trainer.model.named_parameters() if "lora" in k}
        logs.append((seen, copy.deepcopy(weights)))
    (theirs, their_weights), (ours, our_weights) = logs
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    for key, weight in our_weights.items():
        torch.testing.assert_close(weight, their_weights[key], rtol=1e-3, atol=1e-4)
