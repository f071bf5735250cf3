"""Rows of `RewardPenalizeTrainer` that are packed, have images, or go through experts."""

import copy
import random

import pytest
import torch
import transformers
from transformers import AutoTokenizer

datasets = pytest.importorskip("datasets", reason="needs trl")
pytest.importorskip("trl")

from peft import LoraConfig, PromptTuningConfig  # noqa: E402
from trl import DPOConfig, DPOTrainer, KTOConfig  # noqa: E402

from fastadapt.trl import RewardPenalizeTrainer, UnpairedRewardPenalizeTrainer  # noqa: E402

STEPS = 5


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


def _model(name, **options):
    """A small random model of a class, whose attention moves its logits."""
    sizes = {
        "vocab_size": 19,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        **options,
    }
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _train(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def _assert_follows(ours, theirs, names):
    """Metrics of all steps and the parameters at the end, to roundings of float32."""
    logs = _train(ours), _train(theirs)
    assert len(logs[0]) == len(logs[1]) == STEPS
    for one, other in zip(*logs, strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=2e-6), name
    end = dict(theirs.model.named_parameters())
    for name, x in ours.model.named_parameters():
        torch.testing.assert_close(
            x, end[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


LOGGED = ("loss", "grad_norm", "logps/chosen", "entropy", "num_tokens", "mean_token_accuracy")
PACKED = {
    "Llama": ("Llama", {}, {"dpo": 1.0, "exmate": 0.5}, {}),
    "Llama, eager": ("Llama", {"attn_implementation": "eager"}, {"ipo": 1.0}, {}),
    "Llama, accumulated": (
        "Llama",
        {},
        {"dpo": 1.0, "mle": 1.0},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    "Llama, precomputed": ("Llama", {}, {"dpo": 1.0}, {"precompute_ref_log_probs": True}),
    "Llama, the chosen alone": ("Llama", {}, {"mle": 1.0}, {}),
    "Qwen2": ("Qwen2", {}, {"kto": 1.0, "orpo": 1.0}, {}),
    "Qwen3": ("Qwen3", {"head_dim": 8}, {"dpo": 1.0}, {"use_weighting": True}),
    "windows": ("Mistral", {"sliding_window": 3}, {"dpo": 1.0, "exmate": 0.5}, {}),
    "experts": ("Mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 0.1}, {"dpo": 1.0}, {}),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_rows_follow_padded_ones(tokenizer, tmp_path, case):
    name, options, loss, changes = PACKED[case]
    trainers, widths = [], []
    for packed in (True, False):
        model = _model(name, **options)
        asked = "orpo" in loss
        trainer = RewardPenalizeTrainer(
            model,
            _model(name, **options),
            DPOConfig(**_settings(tmp_path, **changes), padding_free=packed),
            train_dataset=_pairs(40),
            processing_class=tokenizer,
            loss=loss,
            nll_on_prompt=asked,
        )
        assert trainer.args.padding_free == packed
        if packed:
            model.get_input_embeddings().register_forward_hook(
                lambda module, ids, output: widths.append(ids[0].shape[0])
            )
        trainers.append(trainer)
    _assert_follows(*trainers, LOGGED)
    assert set(widths) == {1}  # rows


def test_unpaired_rows_have_no_packing(tokenizer, tmp_path):
    """Of trl's KTO there is no such argument."""
    assert not hasattr(KTOConfig(**_settings(tmp_path)), "padding_free")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("Bloom", {}),
        ("Mamba", {}),
        ("RecurrentGemma", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_mix_sequences_are_named(tokenizer, tmp_path, name, options, dtype):
    model = _model(name, **options).to(dtype)
    trainer = RewardPenalizeTrainer(
        model,
        args=DPOConfig(**_settings(tmp_path), padding_free=True),
        train_dataset=_pairs(4),
        processing_class=tokenizer,
        loss={"simpo": 1.0},
    )
    with pytest.raises(ValueError, match=f"args.padding_free: .* got {name}ForCausalLM with atten"):
        trainer.train()


def test_prompt_learning_is_not_packed(tokenizer, tmp_path, letter_model):
    """Its positions stand before each row."""
    adapters = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    make = lambda packed: RewardPenalizeTrainer(  # noqa: E731
        letter_model,
        args=DPOConfig(**_settings(tmp_path, max_steps=1), padding_free=packed),
        train_dataset=_pairs(4),
        processing_class=tokenizer,
        peft_config=adapters,
        loss={"simpo": 1.0},
    )
    with pytest.raises(ValueError, match="args.padding_free: expected"):
        make(True).train()
    assert _train(make(False))[0]["loss"] > 0


@pytest.mark.parametrize("loss", [{"dpo": 1.0}, {"dpo": 1.0, "exmate_penalty": 0.0}])
def test_routers_are_trained_as_by_trl(tokenizer, tmp_path, loss):
    options = {"num_local_experts": 4, "router_aux_loss_coef": 0.5}
    trainers = [
        kind(
            _model("Mixtral", **options),
            _model("Mixtral", **options),
            DPOConfig(**_settings(tmp_path)),
            train_dataset=_pairs(40),
            processing_class=tokenizer,
            **more,
        )
        for kind, more in ((RewardPenalizeTrainer, {"loss": loss}), (DPOTrainer, {}))
    ]
    assert trainers[0].aux_loss_enabled
    _assert_follows(*trainers, (*LOGGED, "aux_loss"))


def test_steps_with_routers_split(tokenizer, tmp_path):
    """The routers' loss is the mean of that of the micro-batches."""
    logs = []
    for kind in (1, 2):
        changes = {"per_device_train_batch_size": 4 // kind, "gradient_accumulation_steps": kind}
        trainer = RewardPenalizeTrainer(
            _model("Mixtral", num_local_experts=4, router_aux_loss_coef=0.5),
            args=DPOConfig(**_settings(tmp_path, max_steps=1, **changes)),
            train_dataset=_pairs(4),
            processing_class=tokenizer,
            loss={"simpo": 1.0},
        )
        logs.append(_train(trainer)[0])
        log = logs[-1]
        assert log["loss"] == pytest.approx(log["loss/simpo"] + 0.5 * log["aux_loss"], rel=1e-5)
    assert logs[0]["loss/simpo"] == pytest.approx(logs[1]["loss/simpo"], rel=1e-5)


IMAGE = "<image>"


def _vision(tmp_path):
    """A model that reads images, with its processor, of random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ("<pad>", "<unk>", "<end>", IMAGE, *"abcdefghijklmnop")
    ids = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4}
    text = transformers.LlamaConfig(vocab_size=len(words), initializer_range=0.3, **small, **heads)
    sight = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **small, **heads)
    config = transformers.LlavaConfig(
        vision_config=sight, text_config=text, image_token_index=ids[IMAGE]
    )

    def make():
        torch.manual_seed(0)
        return transformers.LlavaForConditionalGeneration(copy.deepcopy(config))

    return make, processor


def _images(columns, count=8):
    from PIL import Image

    rng = random.Random(0)
    rows = []
    for row in _pairs(count):
        picture = Image.new("RGB", (8, 8), tuple(rng.randrange(256) for _ in range(3)))
        rows.append({**row, "prompt": f"{IMAGE} {row['prompt']}", "image": picture})
    if columns == "pairs":
        return datasets.Dataset.from_list(rows)
    single = [
        {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen", "image": r["image"]}
        for r in rows
        for k in ("chosen", "rejected")
    ]
    return datasets.Dataset.from_list(single)


@pytest.mark.parametrize("loss", [{"dpo": 1.0}, {"dpo": 1.0, "exmate_penalty": 0.0}])
def test_pairs_with_images_follow_trl(tmp_path, loss):
    make, processor = _vision(tmp_path)
    trainers = [
        kind(
            make(),
            make(),
            DPOConfig(**_settings(tmp_path)),
            train_dataset=_images("pairs"),
            processing_class=processor,
            **more,
        )
        for kind, more in ((RewardPenalizeTrainer, {"loss": loss}), (DPOTrainer, {}))
    ]
    _assert_follows(*trainers, LOGGED)


@pytest.mark.parametrize("loss", [{"mle": 1.0}, {"simpo": 1.0}, {"kto": 1.0}], ids="+".join)
def test_images_with_other_losses(tmp_path, loss):
    """Without a reference where none is looked at; evaluation too."""
    make, processor = _vision(tmp_path)
    trainer = RewardPenalizeTrainer(
        make(),
        make() if "kto" in loss else None,
        DPOConfig(**_settings(tmp_path, max_steps=2)),
        train_dataset=_images("pairs"),
        eval_dataset=_images("pairs", 4),
        processing_class=processor,
        loss=loss,
    )
    log = _train(trainer)
    assert log[0]["grad_norm"] > 0 and (trainer.ref_model is None) == ("kto" not in loss)
    seen = trainer.evaluate()
    assert seen["eval_loss"] == pytest.approx(seen[f"eval_loss/{next(iter(loss))}"], rel=1e-6)


def test_images_are_not_packed_and_have_no_likelihood_of_the_prompt(tmp_path):
    make, processor = _vision(tmp_path)
    for loss, changes, named, message in (
        (
            {"simpo": 1.0},
            {"padding_free": True},
            {},
            "args.padding_free: expected False with images",
        ),
        ({"orpo": 1.0}, {}, {"nll_on_prompt": True}, "nll_on_prompt: expected False with images"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardPenalizeTrainer(
                make(),
                args=DPOConfig(**_settings(tmp_path), **changes),
                train_dataset=_images("pairs"),
                processing_class=processor,
                loss=loss,
                **named,
            ).train()


def test_single_responses_with_images(tmp_path):
    make, processor = _vision(tmp_path)
    trainer = UnpairedRewardPenalizeTrainer(
        make(),
        make(),
        KTOConfig(**_settings(tmp_path, max_steps=2)),
        train_dataset=_images("single"),
        processing_class=processor,
        loss={"kto": 1.0, "exmate_penalty": 0.5},
    )
    log = _train(trainer)
    assert log[0]["grad_norm"] > 0 and {"kl", "loss/kto", "rewards/margins"} <= log[0].keys()


def test_packing_with_adapters(tokenizer, tmp_path, letter_model):
    trainers = [
        RewardPenalizeTrainer(
            letter_model,
            args=DPOConfig(**_settings(tmp_path), padding_free=packed),
            train_dataset=_pairs(40),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            loss={"dpo": 1.0, "exmate": 0.5},
        )
        for packed in (True, False)
    ]
    _assert_follows(*trainers, LOGGED)
