"""`UnpairedRewardPenalizeTrainer` beside trl's `KTOTrainer`, and on losses that trl has not."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

datasets = pytest.importorskip("datasets", reason="needs trl")
pytest.importorskip("trl")

from peft import LoraConfig  # noqa: E402
from trl import DPOConfig, KTOConfig, KTOTrainer  # noqa: E402

from fastadapt import label_log_odds  # noqa: E402
from fastadapt.losses import CATALOGUE, Responses, RewardPenalizeLoss  # noqa: E402
from fastadapt.trl import RewardPenalizeTrainer, UnpairedRewardPenalizeTrainer  # noqa: E402

SHARED = (
    *("loss", "grad_norm", "entropy", "num_tokens", "logps/chosen", "logps/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "logits/chosen", "logits/rejected"),
)


@pytest.fixture(scope="module")
def folder(letter_model):
    return letter_model


@pytest.fixture(scope="module")
def tokenizer(letter_model):
    return AutoTokenizer.from_pretrained(letter_model)


def _rows(count, seed=0):
    """Completions with labels, of which two of three are True, so that sides differ in size."""
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choices("abcdefghijklmnop", k=rng.randint(low, high)))

    rows = [
        {"prompt": text(1, 4), "completion": " " + text(1, 6), "label": rng.random() < 2 / 3}
        for _ in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def _settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 5,
        **changes,
    }


def _trainer(kind, folder, tokenizer, arguments, **named):
    return kind(
        folder,
        args=KTOConfig(**arguments),
        train_dataset=named.pop("train_dataset", _rows(40)),
        processing_class=tokenizer,
        **named,
    )


def _train(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def _state(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.named_parameters() if v.requires_grad}


KINDS = {
    "kto": {},
    "kto, weighted": {"desirable_weight": 0.7, "undesirable_weight": 1.4, "beta": 0.4},
    "kto, precomputed": {"precompute_ref_log_probs": True},
    "kto, lora": {},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}


@pytest.mark.parametrize("case", KINDS)
def test_follows_trl(folder, tokenizer, tmp_path, case):
    loss, changes = case.split(",")[0], KINDS[case]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if "lora" in case else None
    arguments = _settings(tmp_path, **changes)
    theirs = _trainer(KTOTrainer, folder, tokenizer, arguments, peft_config=lora)
    arguments.pop("loss_type", None)
    ours = _trainer(
        UnpairedRewardPenalizeTrainer,
        folder,
        tokenizer,
        arguments,
        loss={loss: 1.0},
        peft_config=lora,
    )
    logs = _train(theirs), _train(ours)
    assert len(logs[0]) == len(logs[1]) == 10
    names = (*SHARED, "kl") if loss == "kto" else SHARED
    for one, other in zip(*logs, strict=True):
        for name in names:
            assert (name in one) == (name in other), name
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-4, abs=2e-6), name
        assert not {"pairs/margins", "rewards/accuracies"} & other.keys()
    if loss == "kto":
        assert max(entry["kl"] for entry in logs[1]) > 1e-3  # the reference point is looked at
    for name, x in _state(ours).items():
        torch.testing.assert_close(x, _state(theirs)[name], rtol=1e-4, atol=1e-5, msg=name)


MIXTURES = [
    {"mle": 1.0},
    {"mle": 1.0, "exmate_penalty": 0.5},
    {"unlikelihood": 1.0, "apo_zero_unpaired": 0.3},
    {"exmate": 1.0},
    {"mate": 1.0},
]


@pytest.mark.parametrize("loss", MIXTURES, ids="+".join)
def test_first_loss_is_that_of_the_logits(folder, tokenizer, tmp_path, loss):
    """And steps do not depend on how their rows are split over micro-batches."""
    logs = []
    for size, parts in ((8, 1), (2, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        arguments = _settings(tmp_path, max_steps=3, learning_rate=1e-2, **changes)
        trainer = _trainer(UnpairedRewardPenalizeTrainer, folder, tokenizer, arguments, loss=loss)
        logs.append(_train(trainer))
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    model = AutoModelForCausalLM.from_pretrained(folder)
    sides: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}
    for row in _rows(40).select(range(8)):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor(tokenizer(row["prompt"] + row["completion"] + "<end>").input_ids)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        rows = slice(len(prompt) - 1, len(ids) - 1)
        sides[row["label"]].append((logits[rows], ids[len(prompt) :]))
    responses = [
        Responses(
            torch.cat([label_log_odds(z, y) for z, y in sides[label]]),
            segments=torch.cat([torch.full((len(y),), i) for i, (_, y) in enumerate(sides[label])]),
        )
        for label in (True, False)
    ]
    references = [
        torch.stack([-torch.nn.functional.cross_entropy(z, y, reduction="sum") for z, y in side])
        for side in sides.values()
    ]
    expected, _ = RewardPenalizeLoss(loss)(*responses, *references)
    assert logs[0][0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_bco_compares_with_the_mean_reward_of_the_run(folder, tokenizer, tmp_path):
    """The mean is that of all rewards so far; a run that is resumed goes on with it."""
    ends, shifts = [], []
    for resumed in (False, True):
        path = tmp_path / str(resumed)
        changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        make = lambda path=path, changes=changes: _trainer(  # noqa: E731
            UnpairedRewardPenalizeTrainer,
            folder,
            tokenizer,
            _settings(path, **changes),
            loss={"bco": 1.0},
        )
        trainer = make()
        log = _train(trainer)
        if resumed:
            trainer = make()
            trainer.train(resume_from_checkpoint=str(path / "checkpoint-3"))
            log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        ends.append(_state(trainer))
        shifts.append([entry["rewards/shift"] for entry in log])
    assert shifts[0] == shifts[1] and len(shifts[0]) == 6
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    seen, total = 0, 0.0
    sizes = [_rows(40)["label"][4 * i : 4 * i + 4] for i in range(6)]
    for entry, labels, shift in zip(log, sizes, shifts[1], strict=True):
        for side, count in (("chosen", sum(labels)), ("rejected", 4 - sum(labels))):
            total += entry.get(f"rewards/{side}", 0.0) * count
        seen += 4
        assert shift == pytest.approx(total / seen, rel=1e-5, abs=1e-7)
    assert abs(shifts[0][-1]) > 1e-4


def test_evaluation_and_pairs(folder, tokenizer, tmp_path):
    """Pairs become rows with labels; what is evaluated has both sides."""
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": " a"} for r in _rows(12)
    ]
    held_out = datasets.Dataset.from_list(pairs)
    trainer = _trainer(
        UnpairedRewardPenalizeTrainer,
        folder,
        tokenizer,
        _settings(tmp_path, max_steps=2),
        loss={"kto": 1.0, "unlikelihood_penalty": 0.5},
        train_dataset=held_out,
        eval_dataset=held_out,
    )
    trainer.train()
    seen = trainer.evaluate()
    expected = seen["eval_loss/kto"] + 0.5 * seen["eval_loss/unlikelihood_penalty"]
    assert seen["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert {"eval_rewards/margins", "eval_logps/rejected", "eval_kl"} <= seen.keys()


def test_there_is_no_reference_where_none_is_looked_at(folder, tokenizer, tmp_path):
    arguments = _settings(tmp_path, max_steps=1, train_sampling_strategy="random")
    trainer = _trainer(
        UnpairedRewardPenalizeTrainer, folder, tokenizer, arguments, loss={"mle": 1.0}
    )
    log = _train(trainer)
    assert trainer.ref_model is None and "KL_completion_ids" not in trainer.train_dataset[0]
    assert not {"rewards/chosen", "kl"} & log[0].keys()


PAIRED = [name for name, entry in CATALOGUE.items() if "pairs" in entry.needs]


@pytest.mark.parametrize("name", PAIRED)
def test_losses_of_pairs_name_the_other_trainer(folder, tokenizer, tmp_path, name):
    with pytest.raises(ValueError, match="RewardPenalizeTrainer takes|loss: expected losses"):
        _trainer(
            UnpairedRewardPenalizeTrainer,
            folder,
            tokenizer,
            _settings(tmp_path),
            loss={name: 1.0},
        )


@pytest.mark.parametrize(
    ("changes", "named", "message"),
    [
        ({"loss_type": "apo_zero_unpaired"}, {}, r"args.loss_type: expected 'kto' \(loss= here\)"),
        ({"beta": 0.3}, {"loss": {"mle": 1.0}}, "args.beta: expected 0.1, or a loss whose beta"),
        (
            {"desirable_weight": 2.0},
            {"loss": {"mle": 1.0}},
            "args.desirable_weight: expected 1.0, or a loss whose desirable_weight",
        ),
        (
            {"beta": 0.3},
            {"loss_options": {"beta": 0.2}},
            "args.beta: expected 0.1, or a loss whose beta it is, got 0.3 for kto",
        ),
    ],
)
def test_what_is_not_supported(folder, tokenizer, tmp_path, changes, named, message):
    with pytest.raises(ValueError, match=message):
        _trainer(
            UnpairedRewardPenalizeTrainer,
            folder,
            tokenizer,
            _settings(tmp_path, **changes),
            **{"loss": {"kto": 1.0}, **named},
        )


def test_rows_with_labels_name_this_trainer(folder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="UnpairedRewardPenalizeTrainer takes completions"):
        RewardPenalizeTrainer(
            folder,
            args=DPOConfig(**_settings(tmp_path)),
            train_dataset=_rows(4),
            processing_class=tokenizer,
            loss={"dpo": 1.0},
        )


@pytest.mark.parametrize("labels", [[-1, 1], [0.5, 0.5], ["yes", "no"]], ids=str)
def test_labels_are_true_or_false(folder, tokenizer, tmp_path, labels):
    rows = [{**row, "label": labels[i % 2]} for i, row in enumerate(_rows(8))]
    with pytest.raises(ValueError, match="train_dataset: expected labels of True or False, got"):
        _trainer(
            UnpairedRewardPenalizeTrainer,
            folder,
            tokenizer,
            _settings(tmp_path),
            train_dataset=datasets.Dataset.from_list(rows),
            loss={"bco": 1.0},
        )


def test_labels_of_numbers_are_those_of_flags(folder, tokenizer, tmp_path):
    ends = []
    for kind in (bool, int, float):
        rows = [{**row, "label": kind(row["label"])} for row in _rows(8)]
        trainer = _trainer(
            UnpairedRewardPenalizeTrainer,
            folder,
            tokenizer,
            _settings(tmp_path, max_steps=1),
            train_dataset=datasets.Dataset.from_list(rows),
            loss={"exmate": 1.0},
        )
        trainer.train()
        ends.append(trainer.state.log_history[0]["loss"])
    assert ends[0] == ends[1] == ends[2]


def test_a_row_alone_is_no_reference_point(folder, tokenizer, tmp_path):
    """trl pairs the last of five rows with itself; here its batch has z = 0."""
    trainer = _trainer(
        UnpairedRewardPenalizeTrainer,
        folder,
        tokenizer,
        _settings(tmp_path, max_steps=2, learning_rate=1.0),
        train_dataset=_rows(5),
        loss={"kto": 1.0},
    )
    trainer.train()
    logs = trainer.state.log_history
    rewards = [logs[1].get(f"rewards/{side}", 0.0) for side in ("chosen", "rejected")]
    assert logs[1]["kl"] == 0 and any(rewards)


@pytest.mark.parametrize("kind", [RewardPenalizeTrainer, UnpairedRewardPenalizeTrainer])
def test_a_loss_that_is_not_finite_stops_the_run(folder, tokenizer, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    rows = _rows(8)
    config = KTOConfig
    if kind is RewardPenalizeTrainer:
        pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " a"} for r in rows]
        rows, config = datasets.Dataset.from_list(pairs), DPOConfig
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = kind(
        model,
        args=config(**_settings(tmp_path, max_steps=1)),
        train_dataset=rows,
        processing_class=tokenizer,
        loss={"exmate": 1.0},
    )
    with pytest.raises(FloatingPointError, match="loss: expected a finite number in step 1"):
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[k].isnan(), v.isnan()) for k, v in before.items())
