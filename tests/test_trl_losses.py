"""Every loss in `RewardPenalizeTrainer`: beside those of trl, packed, with images, with routers."""

import copy
import math
import random

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

datasets = pytest.importorskip("datasets", reason="needs trl")
pytest.importorskip("trl")

from peft import LoraConfig  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from fastadapt.losses import CATALOGUE, ramp  # noqa: E402
from fastadapt.trl import RewardPenalizeTrainer  # noqa: E402

STEPS = 10


@pytest.fixture(scope="module")
def folder(letter_model):
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
    """Plain gradient descent: parameters differ by roundings where gradients do."""
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 5,
        **changes,
    }


def _ours(folder, tokenizer, arguments, **named):
    return RewardPenalizeTrainer(
        folder,
        args=DPOConfig(**arguments),
        processing_class=tokenizer,
        **{"train_dataset": _pairs(40), **named},
    )


def _train(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def _assert_alike(ours, theirs, steps=STEPS, names=("loss", "grad_norm")):
    """Losses of all steps and the parameters at the end, to roundings of float32."""
    logs = _train(ours), _train(theirs)
    assert len(logs[0]) == len(logs[1]) == steps
    for one, other in zip(*logs, strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=2e-6), name
    end = dict(theirs.model.named_parameters())
    moved = 0.0
    for name, x in ours.model.named_parameters():
        torch.testing.assert_close(x, end[name], rtol=1e-4, atol=5e-6, msg=name)
        moved += float(x.detach().double().square().sum())
    assert moved > 0
    return logs


# Of trl's DPO: its losses and arguments, and the same as a mixture, arguments and options.
OF_TRL = {
    "sigmoid": (["sigmoid"], {"beta": 0.3}, {"dpo": 1.0}, {}),
    "sigmoid by its name here": (["sigmoid"], {}, {"sigmoid": 1.0}, {}),
    "hinge": (["hinge"], {"beta": 0.5}, {"hinge": 1.0}, {}),
    "ipo": (["ipo"], {"beta": 0.2}, {"ipo": 1.0}, {}),
    "exo_pair": (["exo_pair"], {"label_smoothing": 1e-3}, {"exo_pair": 1.0}, {}),
    "nca_pair": (["nca_pair"], {}, {"nca_pair": 1.0}, {}),
    "robust": (["robust"], {"label_smoothing": 0.1}, {"robust": 1.0}, {}),
    "bco_pair": (["bco_pair"], {}, {"bco_pair": 1.0}, {}),
    "sppo_hard": (["sppo_hard"], {"beta": 0.5}, {"sppo_hard": 1.0}, {}),
    "aot": (["aot"], {}, {"aot": 1.0}, {}),
    "aot_unpaired": (["aot_unpaired"], {}, {"aot_unpaired": 1.0}, {}),
    "apo_zero": (["apo_zero"], {}, {"apo_zero": 1.0}, {}),
    "apo_down": (["apo_down"], {}, {"apo_down": 1.0}, {}),
    "discopop": (["discopop"], {"discopop_tau": 0.1}, {"discopop": 1.0}, {}),
    "sft": (["sft"], {}, {"sft": 1.0}, {}),
    "sigmoid_norm": (["sigmoid_norm"], {"beta": 2.0}, {"sigmoid_norm": 1.0}, {}),
    "LD-DPO": (["sigmoid"], {"ld_alpha": 0.4}, {"dpo": 1.0}, {}),
    "LD-DPO, precomputed": (
        ["sigmoid"],
        {"ld_alpha": 0.4, "precompute_ref_log_probs": True},
        {"dpo": 1.0},
        {},
    ),
    "forward KL": (["sigmoid"], {"f_divergence_type": "forward_kl"}, {"dpo": 1.0}, {}),
    "Jensen-Shannon": (["ipo"], {"f_divergence_type": "js_divergence"}, {"ipo": 1.0}, {}),
    "alpha divergence": (
        ["sigmoid"],
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {"dpo": 1.0},
        {},
    ),
    "WPO": (["sigmoid"], {"use_weighting": True}, {"dpo": 1.0}, {}),
    "MPO": (
        ["sigmoid", "bco_pair", "sft"],
        {"loss_weights": [0.8, 0.2, 1.0]},
        {"dpo": 0.8, "bco_pair": 0.2, "mle": 1.0},
        {},
    ),
}


@pytest.mark.parametrize("case", OF_TRL)
def test_steps_are_those_of_trl(folder, tokenizer, tmp_path, case):
    kinds, changes, loss, options = OF_TRL[case]
    arguments = _settings(tmp_path, **changes)
    pairs = _pairs(40, seed=len(case))  # trl would take a reference that it kept without ld_alpha
    theirs = DPOTrainer(
        folder,
        args=DPOConfig(**arguments, loss_type=kinds),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    arguments.pop("loss_weights", None)
    ours = _ours(folder, tokenizer, arguments, loss=loss, loss_options=options, train_dataset=pairs)
    names = ["loss", "grad_norm"]
    if "LD-DPO" not in case:  # whose logps trl logs as the loss counts them
        names.append("logps/chosen")
    if case != "sft":  # of which ours leaves the rejected responses out
        names += ["entropy", "num_tokens"]
    _assert_alike(ours, theirs, names=names)


# Of trl's CPO and ORPO: their arguments, and the same as a mixture with options.
WITHOUT_REFERENCE = {
    "cpo": ({"beta": 0.3}, {"cpo": 1.0}, {"beta": 0.3}),
    "cpo, hinge": ({"loss_type": "hinge", "cpo_alpha": 0.5}, {"cpo": 1.0}, {"nll_weight": 0.5}),
    "cpo, smoothed": ({"label_smoothing": 0.2}, {"cpo": 1.0}, {"label_smoothing": 0.2}),
    "simpo": ({"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}, {"simpo": 1.0}, {}),
    "simpo with MLE": (
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.3, "cpo_alpha": 0.5},
        {"simpo": 1.0, "mle": 0.5},
        {"gamma": 0.3},
    ),
    "alphapo": ({"loss_type": "alphapo", "beta": 2.0, "alpha": 0.25}, {"alphapo": 1.0}, {}),
    "orpo": ({"beta": 0.2}, {"orpo": 1.0}, {"beta": 0.2}),
}


@pytest.mark.filterwarnings("ignore")  # that these trainers are experimental
@pytest.mark.parametrize("case", WITHOUT_REFERENCE)
def test_steps_are_those_of_cpo_and_orpo(folder, tokenizer, tmp_path, case):
    """Their rows are tokenised as ours."""
    changes, loss, options = WITHOUT_REFERENCE[case]
    if "orpo" in loss:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    options = options | {k: v for k, v in changes.items() if (k, v) == ("loss_type", "hinge")}
    theirs = Trainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args=Config(**_settings(tmp_path, **changes)),
        train_dataset=_pairs(40),
        processing_class=tokenizer,
    )
    ours = _ours(
        folder,
        tokenizer,
        _settings(tmp_path),
        loss=loss,
        loss_options=options,
        nll_on_prompt="orpo" in loss,
    )
    for one, other in zip(ours.train_dataset, theirs.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            assert one["prompt_ids"] + one[f"{side}_ids"] == other[f"{side}_input_ids"]
    _assert_alike(ours, theirs)


def test_the_likelihood_of_the_prompt_is_in_that_term_alone(folder, tokenizer, tmp_path):
    """The other losses of the mixture are those of the completions, and steps split exactly."""
    loss = {"orpo": 1.0, "exmate_penalty": 0.5}
    logs = {}
    for size, parts, asked in ((8, 1, False), (8, 1, True), (2, 4, True)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        arguments = _settings(tmp_path, max_steps=2, **changes)
        trainer = _ours(folder, tokenizer, arguments, loss=loss, nll_on_prompt=asked)
        logs[parts, asked] = _train(trainer)
    for one, other in zip(logs[1, True], logs[4, True], strict=True):
        for name in ("loss", "grad_norm", "loss/orpo"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    first, whole = logs[1, False][0], logs[1, True][0]
    for name in ("loss/exmate_penalty", "entropy", "logps/chosen", "mean_token_accuracy"):
        assert whole[name] == pytest.approx(first[name], rel=1e-6), name
    assert abs(whole["loss/orpo"] - first["loss/orpo"]) > 1e-2


# Losses that trl's DPO has not.
OTHERS = ("dpop", "cal_dpo", "slic", "focal_mle", "dft", "kto", "apo_zero_unpaired", "bco")


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_train_and_evaluate(folder, tokenizer, tmp_path, name):
    """Alone, with every metric finite; the first loss is evaluation's of the same pairs."""
    pairs = _pairs(8)
    arguments = _settings(
        tmp_path, max_steps=2, per_device_eval_batch_size=4, train_sampling_strategy="sequential"
    )
    trainer = _ours(
        folder,
        tokenizer,
        arguments,
        loss={name: 1.0},
        train_dataset=pairs.select(range(4)),
        eval_dataset=pairs.select(range(4)),
    )
    before = trainer.evaluate()
    log = _train(trainer)
    assert log[0]["loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    for entry in (*log, trainer.evaluate()):
        assert all(math.isfinite(x) for x in entry.values() if isinstance(x, float)), entry
    assert log[0]["grad_norm"] > 0
    uses = "reference" in CATALOGUE[name].needs
    assert ("rewards/chosen" in log[0]) == uses == (trainer.ref_model is not None)


def test_kto_on_pairs_compares_with_completions_of_other_prompts(folder, tokenizer, tmp_path):
    """The reference point, by the logits of policy and reference; weights reach the loss."""
    torch.manual_seed(3)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for x in policy.parameters():
            x.add_(torch.randn_like(x), alpha=0.1)
    pairs = _pairs(4)
    point, ratios = [], {"chosen": [], "rejected": []}

    def log_ratio(prompt, answer):
        own = tokenizer(prompt).input_ids
        ids = torch.tensor([own + tokenizer(answer).input_ids + [tokenizer.eos_token_id]])
        rows = slice(len(own) - 1, -1)
        with torch.no_grad():
            logps = [
                model(input_ids=ids).logits[0, rows].double().log_softmax(-1)
                for model in (policy, reference)
            ]
        seen = ids[0, len(own) :, None]
        return float(
            sum(sign * x.gather(1, seen).sum() for sign, x in zip((1, -1), logps, strict=True))
        )

    for i, row in enumerate(pairs):
        for side, found in ratios.items():
            found.append(log_ratio(row["prompt"], row[side]))
            point.append(log_ratio(row["prompt"], pairs[i - 1][side]))
    z = max(sum(point) / 8, 0.0)
    assert z > 0.1
    x = {k: torch.tensor(v) for k, v in ratios.items()}
    good, bad = torch.sigmoid(-0.2 * (x["chosen"] - z)), torch.sigmoid(0.2 * (x["rejected"] - z))
    trainer = _ours(
        policy,
        tokenizer,
        _settings(tmp_path, max_steps=1, beta=0.2, train_sampling_strategy="sequential"),
        ref_model=reference,
        loss={"kto": 1.0},
        loss_options={"desirable_weight": 0.5},
        train_dataset=pairs,
    )
    (log,) = _train(trainer)
    assert log["kl"] == pytest.approx(z, rel=1e-5)
    assert log["loss"] == pytest.approx(float(0.5 * good.sum() + bad.sum()) / 8, rel=1e-5)


def test_a_batch_of_one_pair_has_no_other_prompt(folder, tokenizer, tmp_path):
    trainer = _ours(
        folder,
        tokenizer,
        _settings(tmp_path, max_steps=2, per_device_train_batch_size=2),
        loss={"kto": 1.0},
        train_dataset=_pairs(3),
    )
    logs = _train(trainer)
    assert logs[1]["kl"] == 0  # the last batch of the epoch


def test_weights_follow_the_progress_of_the_run(folder, tokenizer, tmp_path):
    """In training, in evaluation between steps, and in a run that is resumed."""
    loss = {"dpo": ramp(1.0, 0.0), "mle": lambda progress: 0.5 * progress}
    ends = []
    for resumed in (False, True):
        path = tmp_path / str(resumed)
        changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        arguments = _settings(path, **changes, eval_strategy="steps", eval_steps=1)
        make = lambda arguments=arguments: _ours(  # noqa: E731
            folder, tokenizer, arguments, loss=loss, eval_dataset=_pairs(4, seed=2)
        )
        trainer = make()
        trainer.train()
        if resumed:
            trainer = make()
            trainer.train(resume_from_checkpoint=str(path / "checkpoint-2"))
        steps = {"": [], "eval_": []}
        for entry in trainer.state.log_history:
            for prefix, found in steps.items():
                if f"{prefix}loss/dpo" in entry:
                    found.append([entry[f"{prefix}{k}"] for k in ("loss", "loss/dpo", "loss/mle")])
        for prefix, first in (("", 0), ("eval_", 1)):
            assert len(steps[prefix]) == 4
            for i, (total, dpo, mle) in enumerate(steps[prefix]):
                progress = (first + i) / 4
                expected = (1 - progress) * dpo + 0.5 * progress * mle
                assert total == pytest.approx(expected, rel=1e-5)
        ends.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_inputs_that_no_trainer_has(folder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"loss: expected losses of .* got tpo, which needs gold"):
        _ours(folder, tokenizer, _settings(tmp_path), loss={"tpo": 1.0})


def _logits_of(model, tokenizer, rows, side):
    """Logits (T, V) in float64 and labels of the completions of rows."""
    found = []
    for row in rows:
        own = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([own + tokenizer(row[side]).input_ids + [tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, len(own) - 1 : -1].double()
        found.append((logits, ids[0, len(own) :]))
    return found


def _gradients_of_a_step(trainer):
    """The change of every parameter by a step of size 1, the gradient of the loss."""
    before = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
    (log,) = _train(trainer)
    return log, {k: before[k] - v.detach() for k, v in trainer.model.named_parameters()}


@pytest.mark.parametrize("packed", [False, True])
def test_smoothed_labels_have_the_gradient_of_the_logits(folder, tokenizer, tmp_path, packed):
    rows, model = _pairs(4), AutoModelForCausalLM.from_pretrained(folder)
    parts = _logits_of(model, tokenizer, rows, "chosen")
    logits, labels = (torch.cat(x) for x in zip(*parts, strict=True))
    wanted = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    wanted.backward()
    trainer = _ours(
        AutoModelForCausalLM.from_pretrained(folder),
        tokenizer,
        _settings(tmp_path, max_steps=1, learning_rate=1.0, max_grad_norm=0, padding_free=packed),
        train_dataset=rows,
        loss={"smoothed_mle": 1.0},
        loss_options={"smoothed_mle": {"label_smoothing": 0.3}},
    )
    log, found = _gradients_of_a_step(trainer)
    assert log["loss"] == pytest.approx(float(wanted), rel=1e-6)
    for name, x in model.named_parameters():
        torch.testing.assert_close(found[name], x.grad, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("packed", [False, True])
def test_divergences_of_tdpo_have_the_gradient_of_the_logits(folder, tokenizer, tmp_path, packed):
    """Of TDPO2, with a reference that differs, and with the likelihood of the prompt beside it."""
    torch.manual_seed(3)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for x in reference.parameters():
            x.add_(torch.randn_like(x), alpha=0.05)
    rows, model = _pairs(4), AutoModelForCausalLM.from_pretrained(folder)
    sides = {}
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            theirs = _logits_of(reference, tokenizer, rows, side)
        ratios, above = [], []
        parts = zip(_logits_of(model, tokenizer, rows, side), theirs, strict=True)
        for (z, labels), (z_ref, _) in parts:
            p, q = z.log_softmax(-1), z_ref.log_softmax(-1)
            ratios.append((p - q).gather(1, labels[:, None]).sum())
            above.append((q.exp() * (q - p)).sum())
        sides[side] = torch.stack(ratios), torch.stack(above)
    (good, over), (bad, below) = sides["chosen"], sides["rejected"]
    gap = good - bad - 0.5 * (below - over.detach())
    wanted = -torch.nn.functional.logsigmoid(0.3 * gap).mean()
    wanted.backward()
    arguments = _settings(
        tmp_path, max_steps=1, learning_rate=1.0, max_grad_norm=0, padding_free=packed, beta=0.3
    )
    trainer = _ours(
        AutoModelForCausalLM.from_pretrained(folder),
        tokenizer,
        arguments,
        ref_model=reference,
        train_dataset=rows,
        loss={"tdpo": 1.0, "orpo": 0.0},
        nll_on_prompt=True,
    )
    log, found = _gradients_of_a_step(trainer)
    assert log["loss"] == pytest.approx(float(wanted), rel=1e-5)
    for name, x in model.named_parameters():
        torch.testing.assert_close(found[name], x.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert float(below.mean()) > 0.1  # the divergences count


def test_tdpo_wants_the_reference_in_each_step(folder, tokenizer, tmp_path):
    arguments = _settings(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="precompute_ref_log_probs: expected False for tdpo"):
        _ours(folder, tokenizer, arguments, loss={"tdpo": 1.0})


def test_logits_with_a_cap_have_no_mean_without_them(tokenizer, tmp_path):
    sizes = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    more = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.Gemma2Config(**sizes, **more, final_logit_softcapping=5.0)

    def make():
        model = transformers.Gemma2ForCausalLM(copy.deepcopy(config))
        with torch.no_grad():
            model.lm_head.weight.mul_(40)  # so that the cap is felt
        return model

    trainer = _ours(make(), tokenizer, _settings(tmp_path), loss={"smoothed_mle": 1.0})
    with pytest.raises(ValueError, match="model: expected logits without a cap for the mean"):
        trainer.train()
    trainer = _ours(
        make(),
        tokenizer,
        _settings(tmp_path, max_steps=1),
        ref_model=make(),
        loss={"tdpo": 1.0},
    )
    assert _train(trainer)[0]["loss"] > 0


def test_smoothed_labels_and_tdpo_with_adapters(folder, tokenizer, tmp_path):
    """On the head too: it is frozen, and the reference is the policy without them."""
    adapters = LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    for loss in ({"smoothed_mle": 1.0}, {"tdpo": 1.0}):
        trainer = _ours(
            AutoModelForCausalLM.from_pretrained(folder),
            tokenizer,
            _settings(tmp_path, max_steps=8, learning_rate=0.5),
            peft_config=adapters,
            train_dataset=_pairs(4),
            loss=loss,
        )
        log = _train(trainer)
        assert log[-1]["loss"] < log[0]["loss"] and log[0]["grad_norm"] > 0
    assert trainer.ref_model is None and abs(log[0]["rewards/margins"]) < 1e-6
