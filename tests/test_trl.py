"""`fastadapt.trl` beside trl's own trainers: losses, gradients and metrics, step by step."""

import contextlib
import random

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

datasets = pytest.importorskip("datasets", reason="needs trl")
pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import utils as trl_utils  # noqa: E402

from fastadapt.training.compiled import head_outside_graphs  # noqa: E402
from fastadapt.trl import RewardPenalizeTrainer, fused_log_probs  # noqa: E402
from fastadapt.trl import _log_probs as trl_head  # noqa: E402

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
SHARED = (
    *("loss", "grad_norm", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("entropy", "num_tokens", "rewards/chosen", "rewards/rejected", "rewards/margins"),
)
# Where what an accuracy compares is nearer, the accuracy is of roundings.
DECIDED = 1e-3


@pytest.fixture(scope="module")
def folder(letter_model):
    """A model on disk, so that trl can load its reference from there."""
    return letter_model


@pytest.fixture(scope="module")
def tokenizer(letter_model):
    return AutoTokenizer.from_pretrained(letter_model)


def _pairs(count, seed=0):
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choices("abcdefghijklmnop", k=rng.randint(low, high)))

    rows = [
        {"prompt": text(1, 4), "chosen": " " + text(1, 6), "rejected": " " + text(1, 6)}
        for _ in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def _settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 5,
        **changes,
    }


def _train(trainer):
    """The log of a run, a dictionary per step."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def _assert_follows(ours, theirs, names):
    """1e-6 relative at the first step, 1e-4 at the last; names of what changes smoothly."""
    assert len(ours) == len(theirs) == 20
    for name in names:
        # rewards start at 0 and log P has the size of 10 nats: an absolute bound of its rounding
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-6, abs=1e-6), name
        assert ours[-1][name] == pytest.approx(theirs[-1][name], rel=1e-4, abs=1e-6), name


def _assert_accuracies_follow(ours, theirs):
    """Of pairs evaluated one by one, where the sign of the difference of rewards is decided."""
    seen = []
    for trainer in (ours, theirs):
        before = len(trainer.state.log_history)
        trainer.evaluate()
        seen.append(trainer.state.log_history[before:])
    decided = 0
    for one, other in zip(*seen, strict=True):
        margin = other["eval_rewards/margins"]
        assert one["eval_rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
        if abs(margin) > DECIDED:
            decided += 1
            accuracies = {float(each["eval_rewards/accuracies"]) for each in (one, other)}
            assert accuracies == {float(margin > 0)}
    assert decided >= 4


@pytest.mark.parametrize(
    ("lora", "precompute"),
    [(False, False), (True, False), (False, True)],
    ids=["full", "lora", "precomputed"],
)
def test_dpo_follows_trl(folder, tokenizer, tmp_path, lora, precompute):
    logs, trainers = [], []
    pairs = _pairs(80)
    for kind in (DPOTrainer, RewardPenalizeTrainer):
        extra = {"loss": {"dpo": 1.0}} if kind is RewardPenalizeTrainer else {}
        trainer = kind(
            folder,
            args=DPOConfig(**_settings(tmp_path), precompute_ref_log_probs=precompute),
            train_dataset=pairs,
            eval_dataset={str(i): pairs.select([i]) for i in range(8)},
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA) if lora else None,
            **extra,
        )
        logs.append(_train(trainer))
        trainers.append(trainer)
    _assert_follows(logs[1], logs[0], SHARED)
    assert logs[1][0]["mean_token_accuracy"] == pytest.approx(logs[0][0]["mean_token_accuracy"])
    assert abs(logs[1][0]["rewards/margins"]) <= 1e-6  # roundings of log P, of 10 nats, times β
    assert abs(logs[1][-1]["rewards/margins"]) > DECIDED
    _assert_accuracies_follow(*reversed(trainers))
    assert {"loss/dpo", "pairs/accuracies", "gradients/chosen"} <= set(logs[1][0])


class OfLogits(RewardPenalizeTrainer):
    """DPO from the logits of peft's own forward, and the reference with the adapters disabled."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        keep = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        mask = inputs["completion_mask"][:, 1:].bool()
        sums = []
        for context in (contextlib.nullcontext(), model.disable_adapter()):
            with context:
                logits = model(**keep).logits[:, :-1].float()
            logps = logits.log_softmax(-1).gather(-1, keep["input_ids"][:, 1:, None])[..., 0]
            sums.append((logps * mask).sum(-1))
        rewards = self.beta * (sums[0] - sums[1].detach())
        chosen, rejected = rewards.chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("given", ["a config", "a model of peft", "precomputed"])
def test_dpo_with_lora_on_the_head_follows_its_logits(folder, tokenizer, tmp_path, given):
    """trl's own trainer refuses it. The head here is tied to the embedding."""
    adapters = LoraConfig(**{**LORA, "target_modules": ["lm_head", "q_proj"]})
    logs, weights = [], []
    for kind in (OfLogits, RewardPenalizeTrainer):
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_pretrained(folder)
        if given == "a model of peft":
            model = get_peft_model(model, adapters)
        precompute = given == "precomputed" and kind is RewardPenalizeTrainer
        settings = _settings(tmp_path, max_steps=3, learning_rate=2e-2)
        trainer = kind(
            model,
            args=DPOConfig(**settings, precompute_ref_log_probs=precompute),
            train_dataset=_pairs(40),
            processing_class=tokenizer,
            peft_config=None if given == "a model of peft" else adapters,
            loss={"dpo": 1.0},
        )
        logs.append(_train(trainer))
        named = trainer.model.named_parameters()
        weights.append({name: x.detach().clone() for name, x in named if x.requires_grad})
        causal = trainer.model.get_base_model()
        assert causal.get_output_embeddings() is causal.lm_head and hasattr(
            causal.lm_head, "base_layer"
        )
    assert len(logs[0]) == len(logs[1]) == 3
    for theirs, ours in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4)
    assert abs(logs[1][0]["rewards/margins"]) <= 1e-6
    assert abs(logs[1][-1]["rewards/margins"]) > DECIDED
    assert sum("lm_head.lora_" in name for name in weights[0]) == 2
    for name, x in weights[1].items():
        torch.testing.assert_close(x, weights[0][name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_outputs_of_a_head_with_lora(softcap):
    """Those that trl logs, by a forward that trl gives a model after its trainers have looked."""
    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    options = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.Gemma2Config(**sizes, **options, final_logit_softcapping=softcap)
    torch.manual_seed(0)
    bare = transformers.Gemma2ForCausalLM(config)
    model = get_peft_model(bare, LoraConfig(r=3, target_modules=["lm_head"])).eval()
    with torch.no_grad():
        bare.lm_head.lora_B["default"].weight.normal_()
    tokens = torch.randint(30, (2, 9))
    logits = model(input_ids=tokens).logits[:, :-1].float()
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    trl_utils.add_fused_lm_head(bare, outputs=outputs)
    with fused_log_probs():
        found = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    logps = logits.log_softmax(-1)
    mine = logps.gather(-1, tokens[:, 1:, None])[..., 0]
    expected = (
        (found.log_probs, mine),
        (found.entropy, -(logps.exp() * logps).sum(-1)),
        (found.mean_logits, logits.mean(-1)),
        (found.log_sum_sq_probs, (2 * logps).logsumexp(-1)),
    )
    for got, wanted in expected:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.is_top1.bool(), logits.argmax(-1) == tokens[:, 1:])
    b = bare.lm_head.lora_B["default"].weight
    gradients = [
        torch.autograd.grad(x.sum(), b, retain_graph=True)[0]
        for x in (found.log_probs + found.entropy, mine - (logps.exp() * logps).sum(-1))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sft_follows_trl(folder, tokenizer, tmp_path, lora):
    logs = []
    for fused in (False, True):
        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in _pairs(80)]
        trainer = SFTTrainer(
            folder,
            args=SFTConfig(**_settings(tmp_path)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA) if lora else None,
        )
        before = trl_utils._ChunkedLogProbFunction
        if fused:
            with fused_log_probs():
                assert trl_utils._ChunkedLogProbFunction is not before
                logs.append(_train(trainer))
        else:
            logs.append(_train(trainer))
        assert trl_utils._ChunkedLogProbFunction is before
    _assert_follows(logs[1], logs[0], ("loss", "grad_norm", "entropy"))
    assert logs[1][0]["mean_token_accuracy"] == pytest.approx(logs[0][0]["mean_token_accuracy"])


def test_no_token_is_nearly_the_most_probable_one(folder, tokenizer):
    """Token accuracies at the first step are the same on every processor: no label is in a tie."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    for row in _pairs(80):
        for name in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[name] + " <end>", return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            label = ids[0, 1:, None]
            others = logits.scatter(1, label, -torch.inf).amax(1)
            gaps = (logits.gather(1, label)[:, 0] - others).abs()
            assert gaps.min() > DECIDED, row


def _mixed(folder, tokenizer, arguments, **named):
    """A trainer of a mixture with token means, means over pairs and a reference."""
    return RewardPenalizeTrainer(
        folder,
        args=DPOConfig(**arguments),
        train_dataset=_pairs(40),
        processing_class=tokenizer,
        **{"loss": {"dpo": 1.0, "exmate": 0.5}, **named},
    )


def test_steps_of_the_chosen_alone_are_those_of_sft(folder, tokenizer, tmp_path):
    """Without a loss on rejected responses a step reads as many tokens as supervised training."""
    arguments = _settings(tmp_path, max_steps=4, gradient_accumulation_steps=2)
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in _pairs(40)]
    supervised = SFTTrainer(
        folder,
        args=SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    held_out = _pairs(6, seed=1)
    trainer = _mixed(folder, tokenizer, arguments, loss={"mle": 1.0}, eval_dataset=held_out)
    for ours, theirs in zip(_train(trainer), _train(supervised), strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert ours["num_tokens"] == theirs["num_tokens"]
        assert not {"logps/rejected", "pairs/accuracies", "logits/rejected"} & ours.keys()
    assert {"eval_logps/rejected", "eval_pairs/accuracies"} <= trainer.evaluate().keys()


@pytest.mark.parametrize("penalty", ["exmate", "unlikelihood"])
def test_accumulated_batches_are_one(folder, tokenizer, tmp_path, penalty):
    """A step's loss does not depend on how its pairs, of different lengths, are split."""
    logs = []
    for size, parts in ((8, 1), (2, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        arguments = _settings(tmp_path, max_steps=4, **changes)
        logs.append(_train(_mixed(folder, tokenizer, arguments, loss={"dpo": 1.0, penalty: 0.5})))
    names = ("loss", "grad_norm", f"loss/{penalty}", "loss/dpo", "rewards/margins", "num_tokens")
    for one, other in zip(*logs, strict=True):
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_evaluation_and_resumed_run(folder, tokenizer, tmp_path):
    """A run that is resumed from its checkpoint ends where an uninterrupted one does."""
    ends = []
    for resumed in (False, True):
        arguments = _settings(
            tmp_path / str(resumed), max_steps=6, save_strategy="steps", save_steps=3
        )
        trainer = _mixed(folder, tokenizer, arguments, eval_dataset=_pairs(6, seed=1))
        trainer.train()
        if resumed:
            trainer = _mixed(folder, tokenizer, arguments, eval_dataset=_pairs(6, seed=1))
            trainer.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-3"))
            assert trainer.state.global_step == 6
        ends.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    seen = trainer.evaluate()
    expected = seen["eval_loss/dpo"] + 0.5 * seen["eval_loss/exmate"]
    assert seen["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert {"eval_rewards/margins", "eval_logps/chosen", "eval_entropy"} <= set(seen)


def test_without_dpo_there_is_no_reference(folder, tokenizer, tmp_path):
    arguments = DPOConfig(**_settings(tmp_path, max_steps=2))
    trainer = RewardPenalizeTrainer(
        folder,
        args=arguments,
        train_dataset=_pairs(8),
        processing_class=tokenizer,
        loss={"exmate": 1.0},
        loss_options={"coefficient": 0.5},
    )
    log = _train(trainer)
    assert trainer.ref_model is None and not arguments.precompute_ref_log_probs
    assert "loss/exmate" in log[0] and "rewards/chosen" not in log[0]


@pytest.mark.parametrize(
    ("changes", "named", "message"),
    [
        ({"loss_type": ["ipo"]}, {}, r"args.loss_type: expected \['sigmoid'\] \(loss= here\)"),
        (
            {"ld_alpha": 0.5},
            {"loss": {"exmate": 1.0}},
            "args.ld_alpha: expected None, or a loss whose ld_alpha it is, got 0.5 for exmate",
        ),
        (
            {"use_weighting": True},
            {"loss": {"simpo": 1.0}},
            "args.use_weighting: expected False for losses without pair_weights: simpo",
        ),
        ({}, {"loss": {"sigmod": 1.0}}, "weights: expected some of"),
        (
            {},
            {"loss": {"candidate_unlikelihood_penalty": 1.0}},
            "negatives: expected one of previous, top_k, repeated_ngrams for candidate",
        ),
        (
            {"beta": 0.2},
            {"loss_options": {"beta": 0.3}},
            "args.beta: expected 0.1, or a loss whose beta it is, got 0.2 for dpo, exmate",
        ),
        ({"label_smoothing": 0.1}, {}, "cdpo"),
        (
            {"discopop_tau": 0.1},
            {},
            "args.discopop_tau: expected 0.05, or a loss whose discopop_tau it is",
        ),
        (
            {"ld_alpha": 0.5},
            {"loss": {"dpo": 1.0, "kto": 1.0}},
            "ld_alpha: expected the same of all losses that look at the reference",
        ),
        (
            {"precompute_ref_log_probs": True},
            {"loss": {"kto": 1.0}},
            "args.precompute_ref_log_probs: expected False for kto",
        ),
        (
            {"per_device_train_batch_size": 1},
            {"loss": {"kto": 1.0}},
            "args.per_device_train_batch_size: expected at least 2 for kto",
        ),
        (
            {"sync_ref_model": True},
            {"loss": {"simpo": 1.0}},
            "args.sync_ref_model: expected False without a reference: simpo",
        ),
        (
            {},
            {"nll_on_prompt": True},
            "nll_on_prompt: expected False for losses without gold: dpo, exmate",
        ),
        (
            {"gradient_accumulation_steps": 2},
            {"loss_options": {"norm": "batch_token_mean"}},
            "norm: expected one that splits over 2 micro-batches",
        ),
        (
            {"gradient_accumulation_steps": 2},
            {"loss_options": {"exmate": {"norm": "batch_token_mean"}}},
            "norm: expected one that splits over 2 micro-batches",
        ),
    ],
)
def test_what_is_not_supported(folder, tokenizer, tmp_path, changes, named, message):
    with pytest.raises(ValueError, match=message):
        _mixed(folder, tokenizer, _settings(tmp_path, **changes), **named)


def test_another_trl_is_named(monkeypatch):
    class Other:
        @staticmethod
        def forward(ctx, hidden, weight, labels):
            """Takes something else."""

    for found in (Other, None):
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", found)
        with pytest.raises(RuntimeError, match=r"trl 1.*as in trl 1.16.0, got (hidden|none)"):
            with fused_log_probs():
                pass
        assert trl_utils._ChunkedLogProbFunction is found


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_are_those_of_trl(softcap, biased):
    """Temperature, cap, scale and bias, the outputs beside the log-probabilities, gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16), torch.randn(3000, 16) * 0.5
    bias = torch.randn(3000) if biased else None
    targets = torch.randint(3000, (7,))
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    settings = (targets, 0.7, 1024, softcap, 1.3, names)
    seen = []
    for function in (trl_utils._ChunkedLogProbFunction, trl_head.LogProbs):
        points = [x.clone().requires_grad_() for x in (hidden, weight)]
        logps, entropy, squares, mean, hit = function.apply(*points, bias, *settings)
        assert not squares.requires_grad
        (logps * torch.arange(-3.0, 4.0) + 0.3 * entropy).sum().backward()
        rest = squares, mean, hit
        seen.append((logps.detach(), entropy.detach(), *rest, *(x.grad for x in points)))
    for theirs, ours in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_entropy_of_a_frozen_head_has_no_gradient_and_says_so():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    settings = (torch.tensor([0, 1, 2]), 1.0, 8, None, 1.0)
    logps, entropy, *_ = trl_head.LogProbs.apply(hidden, weight, None, *settings, ("entropy",))
    with pytest.raises(RuntimeError, match="expected a loss without the entropy"):
        (logps.sum() - entropy.sum()).backward()
    with pytest.raises(ValueError, match=r"outputs: expected some of .* got \['rank'\]"):
        trl_head.LogProbs.apply(hidden, weight, None, *settings, ("rank",))


def _kto(folder, tokenizer, tmp_path):
    rows = [
        {"prompt": r["prompt"], "completion": r[name], "label": name == "chosen"}
        for r in _pairs(20)
        for name in ("chosen", "rejected")
    ]
    arguments = KTOConfig(**_settings(tmp_path, max_steps=3))
    dataset = datasets.Dataset.from_list(rows)
    return KTOTrainer(folder, args=arguments, train_dataset=dataset, processing_class=tokenizer)


def _grpo(folder, tokenizer, tmp_path):
    arguments = GRPOConfig(
        **_settings(tmp_path, max_steps=3), num_generations=4, max_completion_length=6, beta=0.1
    )
    return GRPOTrainer(
        folder,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=_pairs(20).select_columns(["prompt"]),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("make", [_kto, _grpo], ids=["kto", "grpo"])
def test_other_trainers_are_served(folder, tokenizer, tmp_path, make):
    plain = _train(make(folder, tokenizer, tmp_path))
    calls = []
    with fused_log_probs():
        served = trl_utils._ChunkedLogProbFunction.apply
        with pytest.MonkeyPatch.context() as patch:
            counted = lambda *arguments: calls.append(0) or served(*arguments)  # noqa: E731
            patch.setattr(trl_head.LogProbs, "apply", staticmethod(counted))
            fused = _train(make(folder, tokenizer, tmp_path))
    assert calls and len(fused) == len(plain) == 3
    for one, other in zip(plain, fused, strict=True):
        for name in ("loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def _tiny(name, **options):
    """A small random model of a class, with large logits."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
        **options,
    }
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


def _served_and_own(model):
    """Log-probabilities of labels as trl's forward returns them in a block, and by the logits."""
    ids = torch.randint(3, 35, (2, 6))
    labels = ids.clone()
    labels[0, 2] = -100
    logps = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    own = logps.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    own = own.masked_fill(labels[:, 1:] == -100, 0.0)
    trl_utils.add_fused_lm_head(model)
    with fused_log_probs():
        for _ in range(2):  # asked, remembered
            served = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    return served, own


MLA = {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
    **{"v_head_dim": 4, "head_dim": 4, "dim_model_base": 4},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Granite", {"logits_scaling": 2.5}),
        ("HyperCLOVAX", {"logits_scaling": 2.5}),
        ("MiniCPM3", MLA),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 4}),
        ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 8}),
    ],
)
def test_heads_of_other_models(name, options):
    """As their own logits say, whatever trl reads in their configurations."""
    model = _tiny(name, **options)
    served, own = _served_and_own(model)
    torch.testing.assert_close(served, own, rtol=1e-4, atol=1e-4)
    served.sum().backward()
    assert all(p.grad is not None for p in model.get_output_embeddings().parameters())
    assert "forward" not in model.base_model.__dict__


class _Cut(torch.nn.Linear):
    """Makes logits of the first 35 ids."""

    def forward(self, x):
        return super().forward(x)[..., :35]


class _Scaled(torch.nn.Linear):
    """Scales by a number that stands nowhere."""

    def forward(self, x):
        return 0.37 * super().forward(x)


def _with_head(kind):
    model = _tiny("Llama")
    head = kind(16, 40, bias=False)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    return model


def test_a_head_that_is_cut():
    served, own = _served_and_own(_with_head(_Cut))
    torch.testing.assert_close(served, own, rtol=1e-4, atol=1e-4)


def test_heads_that_trl_takes_for_a_matrix_are_refused():
    hooked = _tiny("Llama")
    hooked.lm_head.register_forward_hook(lambda m, x, z: z * 0.37)
    for model in (_with_head(_Scaled), hooked):
        with pytest.raises(ValueError, match="expected logits that are products of the states"):
            _served_and_own(model)


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}


def test_a_mixture_is_compiled(folder, tokenizer, tmp_path):
    """With a reference model, which is compiled too; graphs ran."""
    torch._dynamo.reset()
    logs, before = [], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for changes in ({"max_steps": 2}, COMPILED):
        logs.append(_train(_mixed(folder, tokenizer, _settings(tmp_path, **changes))))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert (graphs > 0) == (changes is COMPILED)
    for eager, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "entropy"):
            assert other[name] == pytest.approx(eager[name], rel=1e-5), name


def test_trls_own_trainers_are_compiled(folder, tokenizer, tmp_path):
    """Their forward is cut where the head is scored; also after steps with trl's own function."""
    torch._dynamo.reset()
    # of one length: another one is another graph, of some seconds
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in _pairs(1)] * 40
    logs, before = [], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for fused, changes in ((True, {"max_steps": 2}), (False, COMPILED), (True, COMPILED)):
        trainer = SFTTrainer(
            folder,
            args=SFTConfig(**_settings(tmp_path, **changes)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        with fused_log_probs() if fused else contextlib.nullcontext():
            logs.append(_train(trainer))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert (graphs > 0) == (changes is COMPILED)
    for each in logs[1:]:
        for eager, other in zip(logs[0], each, strict=True):
            for name in ("loss", "grad_norm", "entropy"):
                assert other[name] == pytest.approx(eager[name], rel=1e-5), name


def test_a_compiled_model_that_trl_changes():
    """trl puts its forward on the wrapper: what that calls beside the head is compiled still."""
    torch._dynamo.reset()
    model, ids = _tiny("Llama"), torch.randint(3, 35, (2, 6))
    own = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    own = own.gather(-1, ids[:, 1:, None])[..., 0]
    compiled = torch.compile(model, backend="eager")
    trl_utils.add_fused_lm_head(compiled)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with fused_log_probs(), head_outside_graphs(compiled):
        served = compiled(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(served, own, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_compiled_models_whose_logits_are_something_else():
    model = _with_head(_Cut)
    ids = torch.randint(3, 35, (2, 6))
    own = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    own = own.gather(-1, ids[:, 1:, None])[..., 0]
    trl_utils.add_fused_lm_head(model)
    compiled = torch.compile(model, backend="eager")
    with fused_log_probs():
        for _ in range(2):
            served = compiled(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(served, own, rtol=1e-4, atol=1e-4)
    scaled = _with_head(_Scaled)
    trl_utils.add_fused_lm_head(scaled)
    with fused_log_probs(), pytest.raises(ValueError, match="expected logits that are products"):
        torch.compile(scaled, backend="eager")(input_ids=ids, labels=ids, fused_lm_head=True)
