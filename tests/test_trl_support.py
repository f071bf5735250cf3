"""trl's GRPO and RLOO on what was sampled: ratios, order, gradients."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

datasets = pytest.importorskip("datasets", reason="needs trl")
pytest.importorskip("trl")

from peft import LoraConfig  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402

from fastadapt import Adaptor, Support, filter_logits  # noqa: E402
from fastadapt.trl import SupportGRPOTrainer, SupportRLOOTrainer, fused_log_probs  # noqa: E402
from fastadapt.trl import support_trainers as module  # noqa: E402
from fastadapt.trl._log_probs import Head  # noqa: E402
from fastadapt.trl._sampled import Recorder  # noqa: E402
from fastadapt.trl._support import Decided, Replayed, scored_on  # noqa: E402

KINDS = {"grpo": (SupportGRPOTrainer, GRPOConfig), "rloo": (SupportRLOOTrainer, RLOOConfig)}
TRLS = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}
FILTERS = {"temperature": 0.7, "top_p": 0.9}
BOUND = 1e-3  # nats a token: float32 logits with a cache and without


@pytest.fixture(autouse=True)
def _one_thread(num_threads):
    """Models as small as these only lose time to a second thread."""
    num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(letter_model):
    return AutoTokenizer.from_pretrained(letter_model)


def _reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


class Seen:
    """What trainers of this module's tests are asked for and answer."""

    def __init__(self):
        self.losses, self.batches = [], []


def make(kind, folder, tokenizer, tmp_path, seen=None, named=None, **changes):
    """A trainer of a few steps, which writes down what it sees."""
    trainer, config = KINDS[kind]
    seen = Seen() if seen is None else seen

    class Watched(trainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen.batches.append(output)
            return output

        def _compute_loss(self, model, inputs):
            seen.losses.append([inputs])
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(self, *given, **named):
            made = super()._get_per_token_logps_and_entropies(*given, **named)
            if self._batch.mask is not None:
                seen.losses[-1].append(made[0].detach())
            return made

    rng = random.Random(1)
    prompts = [" ".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 5))) for _ in range(16)]
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 5,
        "beta": 0.0,
        **FILTERS,
        **changes,
    }
    return Watched(
        folder,
        reward_funcs=_reward,
        args=config(**settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        **(named or {}),
    )


def _log(trainer):
    """The log of a run, a dictionary per step."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def _dense(model, inputs, temperature):
    """Logits of the completions over the temperature, (B, T, V)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, -inputs["completion_ids"].shape[1] - 1 : -1] / temperature


def _masks(inputs, shape):
    """The supports of the completions as one mask, (B, T, V), False behind their ends."""
    masks = torch.zeros(shape, dtype=torch.bool)
    for row, support in enumerate(inputs["supports"]):
        masks[row, : len(support)] = support.to_mask(shape[-1])
    return masks


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainers_ratio_to_the_sampler_is_one(kind, letter_model, tokenizer, tmp_path):
    """Of every token, before the policy has moved; sequences end early, and supports hold them."""
    seen = Seen()
    entries = _log(make(kind, letter_model, tokenizer, tmp_path, seen))
    assert len(entries) == len(seen.losses) == 3
    lengths = set()
    for (inputs, logps), entry in zip(seen.losses, entries, strict=True):
        mask = inputs["completion_mask"].bool()
        off = (logps - inputs["sampler_logps"])[mask]
        assert off.abs().max() <= BOUND
        assert (inputs["sampler_logps"][~mask] == 0).all()
        assert isinstance(inputs["supports"], list)
        for ids, support in zip(inputs["completion_ids"], inputs["supports"], strict=True):
            assert support.contains(ids[: len(support)]).all()
        lengths |= set(mask.sum(1).tolist())
        assert [len(s) for s in inputs["supports"]] == mask.sum(1).tolist()
        assert entry["support/ratio"] == pytest.approx(1, abs=BOUND)
        assert entry["support/ratio_far"] == 0 and 1 < entry["support/kept"] < 19
        assert "support/removed" not in entry and entry["grad_norm"] > 0
        assert ("sampling_per_token_logps" in inputs) == (kind == "grpo")
    assert len(lengths) > 1 and min(lengths) < 8


@pytest.mark.parametrize("kind", KINDS)
def test_without_replay_the_ratio_is_the_kept_mass(kind, letter_model, tokenizer, tmp_path):
    seen = Seen()
    off = make(kind, letter_model, tokenizer, tmp_path, seen, {"support": "off"}, learning_rate=0.0)
    entries = _log(off)
    filters = Adaptor(top_p=FILTERS["top_p"])
    for (inputs, logps), entry in zip(seen.losses, entries, strict=True):
        assert "supports" not in inputs and "sampling_per_token_logps" not in inputs
        with torch.no_grad():
            z = _dense(off.model, inputs, FILTERS["temperature"])
        kept = filter_logits(z, filters) > -torch.inf
        mass = z.softmax(-1).masked_fill(~kept, 0).sum(-1).log()
        mask = inputs["completion_mask"].bool()
        ratio = (logps - inputs["sampler_logps"])[mask]
        torch.testing.assert_close(ratio, mass[mask], rtol=0, atol=BOUND)
        assert entry["support/ratio"] == pytest.approx(float(ratio.exp().mean()), rel=1e-5)
        assert entry["support/ratio"] < 0.97 and "support/kept" not in entry


SPLITS = {
    "iterations": {"num_iterations": 2, "max_steps": 4},
    "steps": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4},
    "both": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 4,
    },
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_keep_their_supports(kind, split, letter_model, tokenizer, tmp_path):
    """Through trl's shuffling and splitting: they are those of the sequence's own logits."""
    seen = Seen()
    changes = {"learning_rate": 0.0, "per_device_train_batch_size": 8, **split}
    trainer = make(kind, letter_model, tokenizer, tmp_path, seen, **changes)
    trainer.train()
    filters, order = Adaptor(top_p=FILTERS["top_p"]), []
    for inputs, logps in seen.losses:
        with torch.no_grad():
            z = _dense(trainer.model, inputs, FILTERS["temperature"])
        kept = filter_logits(z, filters) > -torch.inf
        mask = inputs["completion_mask"].bool()
        assert torch.equal(_masks(inputs, z.shape)[mask], kept[mask])
        assert (logps - inputs["sampler_logps"])[mask].abs().max() <= BOUND
        order += [tuple(ids.tolist()) for ids in inputs["completion_ids"]]
    drawn = [tuple(ids.tolist()) for output in seen.batches for ids in output["completion_ids"]]
    assert set(order) == set(drawn) and order[: len(drawn)] != drawn  # shuffled


def _trained(kind, letter_model, tokenizer, tmp_path, **changes):
    """A trainer, its policy moved away from the sampler's, and a batch of its sequences."""
    seen = Seen()
    changes = {"beta": 0.1, "num_iterations": 2, "max_steps": 1, **changes}
    trainer = make(kind, letter_model, tokenizer, tmp_path, seen, **changes)
    trainer.train()
    model = trainer.model
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return trainer, model, seen.losses[0][0]


def _gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_trls_own(kind, letter_model, tokenizer, tmp_path, monkeypatch):
    """Of the same rollouts: the loss and its gradients, to the bit."""
    off = {"named": {"support": "off"}}
    trainer, model, inputs = _trained(kind, letter_model, tokenizer, tmp_path, **off)
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    ours = _gradients(model)
    name = "_get_per_token_logps_and_entropies"
    monkeypatch.setattr(module._OnSupports, name, getattr(TRLS[kind], name))
    expected = TRLS[kind]._compute_loss(trainer, model, inputs)
    expected.backward()
    assert torch.equal(loss, expected)
    for at, gradient in _gradients(model).items():
        assert torch.equal(ours[at], gradient), at


GRADIENTS = {
    "grpo": ("grpo", {}),
    "grpo_entropy": ("grpo", {"entropy_coef": 0.3}),
    "grpo_full_rows": ("grpo", {"top_p": 1.0, "min_p": 2e-3, "entropy_coef": 0.3}),
    "rloo": ("rloo", {}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_masked_logits(name, letter_model, tokenizer, tmp_path, monkeypatch):
    kind, changes = GRADIENTS[name]
    trainer, model, inputs = _trained(kind, letter_model, tokenizer, tmp_path, **changes)
    full = torch.cat([s.full for s in inputs["supports"]])
    assert bool(full.any()) == ("full_rows" in name) and not bool(full.all())
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    ours = _gradients(model)

    def dense(self, model, input_ids, attention_mask, keep, *_, **named):
        z = _dense(model, inputs, FILTERS["temperature"])
        mask = _masks(inputs, z.shape)
        mask[~inputs["completion_mask"].bool()] = True
        logs = z.masked_fill(~mask, -torch.inf).log_softmax(-1)
        entropy = -(logs.exp() * logs.masked_fill(~mask, 0)).sum(-1)
        return logs.gather(-1, inputs["completion_ids"][..., None])[..., 0], entropy, None

    monkeypatch.setattr(module._OnSupports, "_get_per_token_logps_and_entropies", dense)
    expected = TRLS[kind]._compute_loss(trainer, model, inputs)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    theirs = _gradients(model)
    assert max(float(x.abs().max()) for x in theirs.values()) > 0.01
    for at, gradient in theirs.items():
        torch.testing.assert_close(ours[at], gradient, rtol=1e-5, atol=1e-5, msg=at)


def _problem(n=40, v=23, h=8, biased=True):
    torch.manual_seed(3)
    made = {
        "hidden": torch.randn(n, h, requires_grad=True),
        "weight": torch.randn(v, h, requires_grad=True),
        "bias": torch.randn(v, requires_grad=True) if biased else None,
    }
    mask = torch.rand(n, v) < 0.3
    mask[::5] = True
    mask[1] = torch.arange(v) == 4  # alone
    labels = torch.randint(v, (n,))
    labels[1] = 4
    mask.scatter_(1, labels[:, None], True)
    return made, mask, labels


@pytest.mark.parametrize("rows", ["some", "full", "few", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_scores_on_supports_are_those_of_masked_logits(rows, softcap, biased):
    """Log-probabilities, entropies, and the gradients of both."""
    made, mask, labels = _problem(biased=biased)
    if rows != "some":
        mask = {"full": torch.ones_like(mask), "few": mask & ~mask.all(1)[:, None]}.get(rows, mask)
        mask = mask.scatter(1, labels[:, None], True)
    if rows == "none":
        made["hidden"] = made["hidden"].detach()[:0].requires_grad_()
        mask, labels = mask[:0], labels[:0]
    head = Head(made["weight"], made["bias"], softcap, 1 / 0.7)
    given = (made["hidden"], labels, Support.from_mask(mask), head)
    log_odds, entropy = scored_on(*given, True)
    logps = torch.nn.functional.logsigmoid(log_odds)
    z = made["hidden"] @ made["weight"].t()
    z = (z if made["bias"] is None else z + made["bias"]) / 0.7
    z = z if softcap is None else softcap * (z / softcap).tanh()
    logs = z.masked_fill(~mask, -torch.inf).log_softmax(-1)
    wanted = logs.gather(1, labels[:, None])[:, 0]
    of = -(logs.exp() * logs.masked_fill(~mask, 0)).sum(-1)
    torch.testing.assert_close(logps, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, of, rtol=1e-5, atol=1e-5)
    gains = torch.randn(2, len(labels))
    leaves = [x for x in made.values() if x is not None]
    ours = torch.autograd.grad((gains[0] * logps + gains[1] * entropy).sum(), leaves)
    theirs = torch.autograd.grad((gains[0] * wanted + gains[1] * of).sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    _, alone = scored_on(*given, False)
    torch.testing.assert_close(alone, entropy.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_supports_are_decided_by_the_filters(softcap, monkeypatch):
    """In parts, with each row's own token; what the filters would have removed is told."""
    from fastadapt.trl import _support

    monkeypatch.setattr(_support, "_NUMBERS", 7 * 23)
    made, _, labels = _problem()
    head = Head(made["weight"], made["bias"], softcap, 1 / 0.7)
    filters = Adaptor(top_p=0.8, min_p=0.02)
    decided = Decided(filters, False)
    first = decided.of(made["hidden"][:25], labels[:25], head)
    second = decided.of(made["hidden"][25:], labels[25:], head)
    z = (made["hidden"] @ made["weight"].t() + made["bias"]).detach() / 0.7
    z = z if softcap is None else softcap * (z / softcap).tanh()
    kept = filter_logits(z, filters) > -torch.inf
    own = kept.gather(1, labels[:, None])[:, 0]
    assert bool(own.any()) and not bool(own.all())
    assert torch.equal(decided.removed, ~own)
    assert decided.support == Support.cat([first, second])
    assert decided.support == Support.from_mask(kept.scatter(1, labels[:, None], True))


def test_replayed_supports_are_of_these_tokens():
    _, mask, labels = _problem()
    support = Support.from_mask(mask)
    replayed = Replayed(support, labels, False)
    assert replayed.of(labels[:3]) == support[:3]
    assert replayed.of(labels[3:9]) == support[3:9]
    with pytest.raises(RuntimeError, match="labels: expected the sampled tokens in their order"):
        replayed.of(labels[3:9])
    outside = torch.where(mask.all(1), labels, mask.int().argmin(1))
    with pytest.raises(RuntimeError, match=f"each token in its own, got {int(outside[1])} outside"):
        Replayed(support, outside, False).of(outside)


def test_a_recorder_says_what_it_did_not_see():
    with pytest.raises(RuntimeError, match="custom_generate: expected to be called"):
        Recorder(True).logps([3])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("grpo", {"beta": 0.1}),  # the reference is scored first
        ("grpo", {"beta": 0.1, "num_iterations": 2}),
        ("grpo", {"top_k": 5}),
        ("grpo", {"mask_truncated_completions": True}),
        ("rloo", {"beta": 0.1, "mask_truncated_completions": True}),
    ],
)
def test_recomputed_supports_train_as_replayed_ones(
    kind, changes, letter_model, tokenizer, tmp_path
):
    """Where logits are made again by the same model: the same log, step by step."""
    logs = []
    for support in ("replay", "recompute"):
        given = {"named": {"support": support}, **changes}
        logs.append(_log(make(kind, letter_model, tokenizer, tmp_path, **given)))
    replayed, recomputed = logs
    known = 0
    for one, other in zip(replayed, recomputed, strict=True):
        known += one["support/ratio"] is not None  # of a step whose sequences count
        assert other["support/removed"] == (0 if one["support/ratio"] is not None else None)
        for name in ("loss", "grad_norm", "entropy", "support/kept", "support/ratio"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert known >= 1
    if "beta" in changes:
        assert replayed[-1]["kl"] == pytest.approx(recomputed[-1]["kl"], rel=1e-3, abs=1e-6)
        assert abs(replayed[-1]["kl"]) > 1e-6


@pytest.mark.parametrize("support", ["replay", "recompute"])
def test_rows_that_keep_everything_are_those_of_fused_log_probs(
    support, letter_model, tokenizer, tmp_path
):
    plain = {"top_p": 1.0, "temperature": 0.8, "beta": 0.1}
    off = make("grpo", letter_model, tokenizer, tmp_path, named={"support": "off"}, **plain)
    with fused_log_probs():
        wanted = _log(off)
    ours = _log(
        make("grpo", letter_model, tokenizer, tmp_path, named={"support": support}, **plain)
    )
    for one, other in zip(wanted, ours, strict=True):
        assert other["support/full"] == 1 and "support/full" not in one
        assert other["support/kept"] is None
        for name in ("loss", "grad_norm", "entropy", "kl", "support/ratio"):
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name


def test_an_adapter_is_trained_and_evaluated(letter_model, tokenizer, tmp_path):
    """The reference is the policy without it, on the policy's supports."""
    named = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    trainer = make("grpo", letter_model, tokenizer, tmp_path, None, named, beta=0.1)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    entries = _log(trainer)
    for entry in entries:
        assert entry["support/ratio"] == pytest.approx(1, abs=BOUND)
    assert entries[-1]["kl"] != 0
    found = trainer.evaluate()
    assert found["eval_support/ratio"] == pytest.approx(1, abs=BOUND)


def test_rollouts_of_others_are_scored_on_recomputed_supports(
    letter_model, tokenizer, tmp_path, monkeypatch
):
    """Tokens of an environment, which no filter would keep, stay out of loss and metrics."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    policy = AutoModelForCausalLM.from_pretrained(letter_model)

    def rollout(prompts, trainer):
        ids, logps, masks = [], [], []
        prompt_ids = tokenizer(prompts)["input_ids"]
        for given in prompt_ids:
            made, of, mask = list(given), [], [1, 1, 0, 0, 1, 1]
            for own in mask:
                with torch.no_grad():
                    z = policy(torch.tensor([made])).logits[0, -1] / FILTERS["temperature"]
                kept = filter_logits(z, Adaptor(top_p=FILTERS["top_p"]))
                made.append(int(kept.softmax(-1).multinomial(1)) if own else int(z.argmin()))
                of.append(float(kept.log_softmax(-1)[made[-1]]) if own else 0.0)
            ids, logps, masks = [*ids, made[len(given) :]], [*logps, of], [*masks, mask]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "logprobs": logps,
            "env_mask": masks,
        }

    seen, named = Seen(), {"support": "recompute", "rollout_func": rollout}
    trainer = make("grpo", letter_model, tokenizer, tmp_path, seen, named, beta=0.1, max_steps=1)
    (entry,) = _log(trainer)
    assert entry["support/ratio"] == pytest.approx(1, abs=BOUND)
    assert entry["support/ratio_far"] == entry["support/removed"] == 0
    assert entry["grad_norm"] > 0 and entry["entropy"] is not None
    inputs, logps = seen.losses[0]
    assert inputs["removed"].sum(0).tolist() == [0, 0, 4, 4, 0, 0] and logps.isfinite().all()
    assert torch.equal(inputs["sampler_logps"], inputs["sampling_per_token_logps"])


@pytest.mark.parametrize("support", ["replay", "recompute"])
def test_a_trainer_in_half_precision(support, letter_model, tokenizer, tmp_path):
    """Logits of another rounding than the sampler's leave each token in its support."""
    named = {"support": support}
    for entry in _log(make("grpo", letter_model, tokenizer, tmp_path, None, named, bf16=True)):
        assert entry["support/ratio"] == pytest.approx(1, abs=0.03)
        assert entry["grad_norm"] > 0


def test_a_compiled_policy(letter_model, tokenizer, tmp_path):
    """Its forward is cut where the head is scored; steps of one length share their graphs."""
    torch._dynamo.reset()
    counted, logs, graphs = torch._dynamo.utils.counters["stats"], [], []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        fixed = {"generation_kwargs": {"min_new_tokens": 8}, "max_steps": 3, **compiled}
        trainer = make("grpo", letter_model, tokenizer, tmp_path, **fixed)
        trainer.train_dataset = datasets.Dataset.from_dict({"prompt": ["a b c"] * 16})
        before = counted["unique_graphs"]
        logs.append(_log(trainer))
        graphs.append(counted["unique_graphs"] - before)
    assert graphs[0] == 0 < graphs[1]
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "entropy", "support/ratio"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_another_trl_does_not_train_as_ever(kind, letter_model, tokenizer, tmp_path, monkeypatch):
    """One that scores in another place, or with another function, fails at its first score."""
    trainer, model, inputs = _trained(kind, letter_model, tokenizer, tmp_path, beta=0.0)
    parent = TRLS[kind]

    def elsewhere(self, *_):
        return torch.zeros(())

    def otherwise(self, model, ids, mask, keep, *_, **__):
        zeros = torch.zeros(len(ids), keep)
        return zeros, zeros, None

    with monkeypatch.context() as patch:
        patch.setattr(parent, "_compute_loss", elsewhere)
        with pytest.raises(
            RuntimeError, match=r"trl 1\..*: expected a loss that scores its tokens"
        ):
            trainer.compute_loss(model, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(parent, "_get_per_token_logps_and_entropies", otherwise)
        with pytest.raises(RuntimeError, match=r"labels: expected \d+ to be scored, got 0"):
            trainer.compute_loss(model, inputs)
    with pytest.raises(RuntimeError, match="supports: expected those of a generation"):
        trainer.compute_loss(model, {k: v for k, v in inputs.items() if k != "supports"})


REFUSED = {
    "mode": ({"support": "maybe"}, {}, r"support: expected one of .* got 'maybe'"),
    "batching": ({}, {"use_transformers_continuous_batching": True}, "continuous_batching=True"),
    "paged": ({}, {"cache_implementation": "paged"}, 'cache_implementation="paged"'),
    "rollout": ({"rollout_func": lambda prompts, trainer: {}}, {}, "with a rollout_func, whose"),
    "penalty": ({}, {"repetition_penalty": 1.2}, "repetition_penalty: expected 1.0 .* got 1.2"),
    "bias": ({}, {"generation_kwargs": {"sequence_bias": [[[3], 1.0]]}}, "sequence_bias: expected"),
    "greedy": ({}, {"generation_kwargs": {"do_sample": False}}, "do_sample: expected True"),
    "cold": ({}, {"generation_kwargs": {"temperature": 0.1}}, "temperature: expected 0.7 .* 0.1"),
    "adapter": (
        {"support": "recompute", "peft_config": LoraConfig(r=4, target_modules=["q_proj"])},
        {"beta": 0.1},
        "expected 'replay', or beta=0",
    ),
}


@pytest.mark.parametrize(("named", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_replayed(
    named, changes, message, letter_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with pytest.raises(ValueError, match=message):
        make("grpo", letter_model, tokenizer, tmp_path, None, named, **changes)


def test_options_of_the_models_own_configuration_count(letter_model, tokenizer, tmp_path):
    """What transformers fills in where the trainer has no option."""
    model = AutoModelForCausalLM.from_pretrained(letter_model)
    model.generation_config.min_p = 0.3
    given = (model, tokenizer, tmp_path, None, {"support": "recompute"})
    assert make("grpo", *given)._adaptor.min_p == 0.3
    assert make("grpo", *given, min_p=0.1)._adaptor.min_p == 0.1
    model.generation_config.sequence_bias = [[[1], 5.0]]
    for named in ({}, {"support": "recompute"}):
        with pytest.raises(ValueError, match="sequence_bias: expected None"):
            make("grpo", model, tokenizer, tmp_path, None, named)
