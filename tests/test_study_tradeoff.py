"""The trade-off study on tiny models: sampling, resuming, analysis, the command, bad input."""

import errno
import gzip
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastadapt import Adaptor, score
from fastadapt._cli import main as cli
from fastadapt.study import files, markdown
from fastadapt.study.tradeoff import command as tradeoff_command
from fastadapt.study.tradeoff import (
    contexts,
    corpora,
    correlations,
    decoding,
    grids,
    normalisation,
    rewards,
    statistics,
)
from fastadapt.study.tradeoff import plots as tradeoff_plots
from fastadapt.study.tradeoff import report as tradeoff_report
from fastadapt.study.tradeoff import study as tradeoff
from fastadapt.study.tradeoff.pool import pool_of

WORDS = ("<pad>", "<unk>", "<end>", *(f"w{i}" for i in range(57)))
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}w0 w1 {% endif %}"
    "{% if m['role'] == 'system' %}w2 {{ m['content'] }} w3 {% else %}w4 {{ m['content'] }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
)
PROMPTS = contexts.Prompts([f"w{10 + i} w{20 + i}" for i in range(6)], 6, 0, 0, 0)
CELLS = [
    grids.Cell("ancestral", Adaptor()),
    grids.Cell("top-k 5", Adaptor(top_k=5)),
    grids.Cell("nucleus 0.90", Adaptor(top_p=0.9)),
    grids.Cell("nucleus 0.90", Adaptor(top_p=0.9, temperature=1.5)),
]
NAMES = {"model": "m", "prior": "m", "system": "w6 w7", "prior_system": None, "reward": None}


def make_tokenizer(words=WORDS):
    """Words by blanks, with a chat template that has a system turn of its own."""
    level = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=level, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed=0, kind=LlamaForCausalLM, **changes):
    """A random model of one layer."""
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "initializer_range": 0.6,
    }
    torch.manual_seed(seed)
    return kind(LlamaConfig(**{**sizes, **changes})).eval()


@pytest.fixture(scope="module")
def sides():
    """The two sides of one model."""
    model, tokenizer = make_model(), make_tokenizer()
    return contexts.Side(model, tokenizer, "w6 w7"), contexts.Side(model, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same model in a folder."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def settings(**changes):
    """Few and short strings."""
    base = {"cells": CELLS, "strings": 3, "max_new_tokens": 6, "replicates": 50}
    return tradeoff.Settings(**{**base, **changes})


def plan(prompts=PROMPTS.texts, cells=CELLS, **changes):
    """The same for the corpora alone."""
    base = {"strings": 3, "max_new_tokens": 6, "seed": 0, "without_prompt": True}
    return corpora.Plan(prompts, cells, **{**base, **changes})


@pytest.fixture(scope="module")
def table(sides, tmp_path_factory):
    """The strings of a study that is never interrupted."""
    place = corpora.Corpora(tmp_path_factory.mktemp("whole"), plan(), NAMES)
    place.fill(*sides, lambda prompt, texts: [float(len(text)) for text in texts])
    return place.table()


def _texts_of(side, prompt):
    return side.tokenizer.decode(contexts.context_ids(side, prompt)[0])


def test_contexts(sides):
    aligned, prior = sides
    assert _texts_of(aligned, "w9") == "w2 w6 w7 w3 w4 w9 w5"
    assert _texts_of(prior, "w9") == "w4 w9 w5", "without the template's own system turn"
    merging = make_tokenizer()  # puts the system prompt into the user's turn, as some do
    merging.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + ' ' %}"
        "{% else %}{% set s = '' %}{% endif %}w4 {{ s }}{{ messages[-1]['content'] }}"
    )
    assert _texts_of(aligned._replace(tokenizer=merging), "w9") == "w4 w6 w7 w9"
    assert _texts_of(prior._replace(tokenizer=merging), "w9") == "w4 w9"
    strict = make_tokenizer()
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "w4 {{ messages[0]['content'] }}"
    )
    assert _texts_of(prior._replace(tokenizer=strict), "w9") == "w4 w9"
    with pytest.raises(ValueError, match="expected one that takes a system prompt, got: no system"):
        contexts.context_ids(aligned._replace(tokenizer=strict), "w9")
    bare = make_tokenizer()
    bare.chat_template = None
    assert _texts_of(aligned._replace(tokenizer=bare), "w9") == "w6 w7 w9"
    assert _texts_of(prior._replace(tokenizer=bare), "w9") == "w9"
    with pytest.raises(ValueError, match="expected one with at least one token, got ''"):
        contexts.context_ids(prior._replace(tokenizer=bare), "")


def test_strings_are_scored_as_a_plain_forward_scores_them(sides, table):
    """Both sides, whole strings, every adaptor; and each string follows from its seed alone."""
    aligned, prior = sides
    adaptors = [cell.adaptor for cell in CELLS]
    for row in table.to_pylist()[::5]:
        prompt, tokens = PROMPTS.texts[row["prompt"]], torch.tensor(row["tokens"])
        assert row["length"] == len(tokens) and row["finished"] == (row["tokens"][-1] == 2)
        for side, column in ((aligned, "log_aligned"), (prior, "log_prior")):
            ids = torch.cat([contexts.context_ids(side, prompt)[0], tokens])
            with torch.inference_mode():
                logits = side.model(ids[None]).logits[0, -len(tokens) - 1 : -1]
            found = score(logits, tokens, adaptors)
            assert row[column] == pytest.approx(found.base_logprobs.sum().item(), abs=1e-4)
            if side is aligned:
                assert row["log_q"] == pytest.approx(found.logprobs.sum(0).tolist(), abs=1e-4)
                assert row["log_norm"] == pytest.approx(found.log_norm.sum(0).tolist(), abs=1e-4)
        ids = torch.cat([torch.tensor([2]), tokens])
        with torch.inference_mode():
            distribution = prior.model(ids[None]).logits[0, :-1].log_softmax(-1)
        alone = distribution.gather(1, tokens[:, None]).sum().item()
        assert row["log_alone"] == pytest.approx(alone, abs=1e-4)
    row = table.to_pylist()[7]
    again = decoding.draw_strings(
        aligned.model,
        contexts.context_ids(aligned, PROMPTS.texts[0]),
        [row["cell"]],
        adaptors,
        torch.tensor([row["seed"]]),
        ends=torch.tensor([2]),
        max_new_tokens=6,
    )
    assert again.tokens[0, : row["length"]].tolist() == row["tokens"]


def test_every_token_is_in_its_support(table):
    assert table["violations"].to_numpy().sum() == 0
    own = [row["log_q"][row["cell"]] for row in table.to_pylist()]
    assert np.isfinite(own).all()
    others = np.array(table["log_q"].to_pylist())
    assert np.isneginf(others).any(), "no string leaves another adaptor's support"


def test_a_killed_study_resumes_to_the_same_table(folder, start_python, tmp_path, sides, table):
    """SIGKILL in the middle of a run; a part that is damaged afterwards is sampled again."""
    program = tmp_path / "run.py"
    program.write_text(
        "import sys, time; sys.path.insert(0, sys.argv[2]); from pathlib import Path; "
        "import test_study_tradeoff as t; t.torch.set_num_threads(int(sys.argv[3])); "
        "place = t.corpora.Corpora(Path(sys.argv[1]), t.plan(), t.NAMES); "
        "m, k = t.make_model(), t.make_tokenizer(); "
        "reward = lambda prompt, texts: [float(len(text)) for text in texts]; "
        "place.fill(t.contexts.Side(m, k, 'w6 w7'), t.contexts.Side(m, k), reward, "
        "on_part=lambda: time.sleep(0.4))"
    )
    threads = str(torch.get_num_threads())  # products of others have other bits
    words = (str(tmp_path), os.path.dirname(__file__), threads)
    output = tmp_path / "output"
    child = start_python(program, *words, folder=tmp_path, output=output)
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("parts/*.parquet"))) < 2 and child.is_alive():
        assert time.monotonic() < end, "the child sampled nothing"
        time.sleep(0.02)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL, output.read_text()
    place = corpora.Corpora(tmp_path, plan(), NAMES)
    missing = place.missing()
    assert 0 < len(missing) < len(PROMPTS.texts)
    kept = tmp_path / "parts" / "00000.parquet"
    kept.write_bytes(kept.read_bytes()[:1000])
    assert place.missing() == [0, *missing]
    done = []
    reward = lambda prompt, texts: [float(len(text)) for text in texts]  # noqa: E731
    place.fill(*sides, reward, on_part=lambda: done.append(1))
    assert len(done) == len(missing) + 1
    assert place.table().equals(table)


def test_full_disk(sides, tmp_path, monkeypatch):
    """The part in flight is lost, those before it stay, and nothing else is left behind."""
    place, write = corpora.Corpora(tmp_path, plan(), NAMES), pq.write_table

    def fill_up(table, where, **kwargs):
        write(table, where, **kwargs)
        if table["prompt"][0].as_py() == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", fill_up)
    message = r"cannot write .*00002.parquet: .*No space left.* MiB free.*same command resumes"
    with pytest.raises(corpora.StorageError, match=message):
        place.fill(*sides)
    assert place.missing() == [2, 3, 4, 5]
    assert sorted(os.listdir(tmp_path / "parts")) == ["00000.parquet", "00001.parquet"]
    monkeypatch.undo()
    place.fill(*sides)
    assert place.missing() == []


def test_a_folder_of_another_study_is_refused(tmp_path):
    corpora.Corpora(tmp_path, plan(), NAMES)
    corpora.Corpora(tmp_path, plan(), NAMES)
    with pytest.raises(corpora.OtherStudyError, match="expected seed = 1, got 0"):
        corpora.Corpora(tmp_path, plan(seed=1), NAMES)
    with pytest.raises(corpora.OtherStudyError, match="prompts, prompts_sha256"):
        corpora.Corpora(tmp_path, plan(PROMPTS.texts[:3]), NAMES)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(corpora.OtherStudyError, match="expected the manifest of a study"):
        corpora.Corpora(tmp_path, plan(), NAMES)


@pytest.fixture(scope="module")
def pool(table):
    return pool_of(table, CELLS)


def test_correlations_are_those_of_scipy(pool):
    """Sums over prompts give what the strings themselves give; N = 1 is the pooled r."""
    from scipy import stats

    x, y = pool.log_prior, pool.implicit_reward
    counts = statistics.prompt_counts(pool.prompts, 200, np.random.default_rng(0))
    found = correlations.correlate(pool, x, y, counts)
    pooled = found["string"]["pooled"]
    assert pooled["pearson"][0] == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-10)
    assert pooled["spearman"][0] == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-10)
    assert found["identity_at_1"] < 1e-12
    assert found["curve"]["pearson"][0] == pytest.approx(pooled["pearson"][0], abs=1e-12)
    means = np.array([[v[pool.cell == c].mean() for v in (x, y)] for c in range(len(CELLS))])
    between = found["adaptors"]["pooled"]
    assert between["pearson"][0] == pytest.approx(stats.pearsonr(*means.T)[0], abs=1e-10)
    assert between["spearman"][0] == pytest.approx(stats.spearmanr(*means.T)[0], abs=1e-10)
    assert between["slope"][0] == pytest.approx(stats.linregress(*means.T).slope, abs=1e-10)
    assert found["curve"]["pearson"][-1] == pytest.approx(between["pearson"][0], abs=1e-3)
    hot = pool.temperatures[pool.cell] == 1.5
    by_temperature = found["string"]["by_temperature"]["1.5"]["pearson"][0]
    assert by_temperature == pytest.approx(stats.pearsonr(x[hot], y[hot])[0], abs=1e-10)
    z = pool.length.astype(float)
    assert found["string"]["per_token"][0] == pytest.approx(stats.pearsonr(x / z, y / z)[0])
    rest = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    held = stats.pearsonr(*rest)[0]
    assert found["string"]["length_partialled"][0] == pytest.approx(held, abs=1e-8)
    for value, low, high in (pooled["pearson"], between["pearson"]):
        assert -1 <= low <= value <= high <= 1 and low < high


def test_bootstrap_is_that_of_resampled_tables(pool):
    """Multinomial counts of prompts give what copying their strings gives."""
    counts = statistics.prompt_counts(pool.prompts, 3, np.random.default_rng(1))
    assert (counts.sum(-1) == pool.prompts).all()
    x, y = pool.log_prior, pool.implicit_reward
    shape = (pool.prompts, len(CELLS))
    found = statistics.resample(counts, statistics.moments(x, y, pool.prompt, pool.cell, shape))
    for replicate, row in enumerate(counts):
        copies = np.concatenate(
            [np.flatnonzero(pool.prompt == p) for p, n in enumerate(row) for _ in range(int(n))]
        )
        expected = statistics.pearson(x[copies], y[copies])
        assert statistics.string_pearson(found)[replicate] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("which", ["all", "1.5", "adaptor"])
@pytest.mark.parametrize("ties", [False, True])
def test_strings_are_ranked_among_those_in_question(pool, which, ties):
    """rho of a temperature or an adaptor, and its interval, as scipy's of these strings alone."""
    from scipy import stats

    x, y = pool.log_prior, pool.implicit_reward
    if ties:
        x, y = np.round(x), np.round(y)
    counts = statistics.prompt_counts(pool.prompts, 40, np.random.default_rng(2))
    found = correlations.correlate(pool, x, y, counts)["string"]
    mine, ours = {
        "all": (np.full(len(x), True), found["pooled"]["spearman"]),
        "1.5": (pool.temperatures[pool.cell] == 1.5, found["by_temperature"]["1.5"]["spearman"]),
        "adaptor": (pool.cell == 2, found["within_adaptors_spearman"][2]),
    }[which]
    assert ours[0] == pytest.approx(stats.spearmanr(x[mine], y[mine])[0], abs=1e-12)
    replicates = []
    for row in counts:
        copies = np.concatenate(
            [np.flatnonzero(mine & (pool.prompt == p)).repeat(int(n)) for p, n in enumerate(row)]
        )
        replicates.append(stats.spearmanr(x[copies], y[copies])[0])
    assert ours[1:] == pytest.approx(np.quantile(replicates, [0.025, 0.975]), abs=1e-12)


def test_restricting_first_is_not_ranking_first():
    """Two temperatures of opposite signs, far apart: rho is -1 and 1, whatever the pool's ranks."""
    x = np.array([0.0, 1.0, 2.0, 100.0, 101.0, 102.0])
    y = np.array([2.0, 1.0, 0.0, 0.5, 1.5, 50.0])
    prompt, counts = np.array([0, 0, 1, 0, 1, 1]), np.ones((1, 2))
    for mine, wanted in ((slice(0, 3), -1.0), (slice(3, 6), 1.0)):
        found = statistics.resampled_spearman(x[mine], y[mine], prompt[mine], counts)
        assert found == pytest.approx([wanted])
    nothing = statistics.resampled_spearman(x[:2], y[:2], prompt[:2], np.array([[0.0, 2.0]]))
    assert np.isnan(nothing).all()


def test_interval_covers():
    """95 % intervals of a mean over prompts hold the truth in about 95 % of 300 samples."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(300):
        shared = rng.normal(size=40)
        counts = statistics.prompt_counts(40, 300, rng)
        low, high = statistics.interval(counts @ shared / 40)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_local_and_global_means(pool):
    """From all strings of a prompt; without truncation at T = 1 the two distributions are one."""
    counts = statistics.prompt_counts(pool.prompts, 100, np.random.default_rng(0))
    found = normalisation.compare(pool, counts, 0)
    plain = found["adaptors"][0]
    assert plain["global"] == pytest.approx(plain["local"]) and plain["spread"] == 0
    assert plain["own_acceptance"] == 1 and plain["fixed_target"] == pytest.approx(plain["local"])
    for one in found["adaptors"]:
        assert 1 <= one["effective"] <= found["pool"]
        assert one["chain"][0] == pytest.approx(one["global"][0], abs=0.35)
        assert 0 < one["own_acceptance"] <= 1 and 0 < one["acceptance"] <= 1
        low, high = one["shift"][0][1:]
        assert low <= one["shift"][0][0] <= high


@pytest.fixture(scope="module")
def results(sides, tmp_path_factory):
    """A whole study with its folder."""
    place = tmp_path_factory.mktemp("study")
    found = tradeoff.run_study(*sides, PROMPTS, settings(), place, names=NAMES)
    names = tradeoff_plots.draw_figures(found, place)
    tradeoff_report.write_report(found, place, names)
    return found, place


def test_study_writes_everything(results):
    found, place = results
    grid = len(CELLS) * 3 * len(PROMPTS.texts)
    # one of the two nucleus cells, the hottest, has a copy with the hidden top-k
    assert found["counts"]["of the grid"] == grid
    assert found["counts"]["strings"] == grid + 3 * len(PROMPTS.texts)
    assert found["counts"]["violations"] == 0 and set(found["counts"]["excluded"].values()) == {0}
    assert found["identity"]["error"] < 1e-12
    assert set(found["correlations"]) == {"implicit", "flipped", "released"}
    for level in ("string", "adaptors"):
        ours, flipped = (
            found["correlations"][name][level]["pooled"]["pearson"]
            for name in ("implicit", "flipped")
        )
        assert ours == pytest.approx([-flipped[0], -flipped[2], -flipped[1]], abs=1e-12)
    assert [one["name"] for one in found["hidden_top_k"]] == ["nucleus 0.90 + top-k 50, T=1.5"]
    kept = tradeoff.read_results(place / "results.json")
    assert kept.keys() == found.keys() and "NaN" not in (place / "results.json").read_text()
    assert kept["counts"]["excluded"] == found["counts"]["excluded"]
    for name in ("strings_and_corpora", "corpus_size", "local_and_global"):
        assert (place / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (place / f"{name}.svg").read_text()


def test_report_says_what_was_measured(results):
    found, place = results
    text = (place / "report.md").read_text()
    assert "scored under: 0.**" in " ".join(text.split())
    implicit = found["correlations"]["implicit"]
    assert tradeoff_report.shown(implicit["string"]["pooled"]["pearson"]) in text
    assert all(cell.name in text for cell in CELLS)
    assert (
        "nan" not in text and max(len(line) for line in text.splitlines() if "|" not in line) < 110
    )


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ([0.3, 0.1, 0.5], "positive"),
        ([-0.3, -0.5, -0.1], "negative"),
        ([0.3, -0.1, 0.5], "of undecided sign"),
        ([None, None, None], "not defined"),
    ],
)
def test_signs_come_from_the_interval(found, word):
    assert tradeoff_report.sign(found) == word


def test_report_follows_the_results(results, tmp_path):
    """With the reward's sign turned in the results the sentences turn too."""
    found, _ = results
    turned = json.loads(json.dumps(found))
    for name, value in (("implicit", [0.9, 0.8, 0.95]), ("flipped", [-0.9, -0.95, -0.8])):
        turned["correlations"][name]["string"]["pooled"]["pearson"] = value
    text = tradeoff_report.write_report(turned, tmp_path, []).read_text()
    assert "Over all strings r is positive: 0.90 [0.80, 0.95]" in " ".join(text.split())
    rows = [line for line in text.splitlines() if line.startswith("| Strings")]
    assert [row.split("|")[-2].strip() for row in rows][:2] == ["agrees", "differs"]


def test_typical_corpora_fall_towards_minus_one(pool):
    found = correlations.typical_corpora(pool, 0)
    assert [one["width"] for one in found] == [None, *correlations.WIDTHS]
    assert found[-1]["pearson"] < -0.9 and found[-1]["pearson"] < found[0]["pearson"]
    for one in found:
        assert one["pearson"] == pytest.approx(one["predicted"], abs=0.15)


def test_nan_rewards_are_left_out_and_counted(sides, tmp_path):
    def reward(prompt, texts):
        return [math.nan if i % 4 == 0 else float(len(text)) for i, text in enumerate(texts)]

    found = tradeoff.run_study(*sides, PROMPTS, settings(), tmp_path, names=NAMES, reward=reward)
    # every fourth of 15 strings a prompt, of which the first 12 are of the grid
    assert found["counts"]["reward not finite"] == 3 * len(PROMPTS.texts)
    assert found["counts"]["of the grid"] == 12 * len(PROMPTS.texts)
    assert math.isfinite(found["correlations"]["user"]["string"]["pooled"]["pearson"][0])
    report = tradeoff_report.write_report(found, tmp_path, []).read_text()
    assert "reward not finite 18" in " ".join(report.split())


def test_a_reward_without_any_number_is_an_error(sides, tmp_path):
    with pytest.raises(ValueError, match="expected finite values for two adaptors or more, got 0"):
        tradeoff.run_study(
            *sides, PROMPTS, settings(), tmp_path, names=NAMES,
            reward=lambda prompt, texts: [math.nan] * len(texts),
        )  # fmt: skip


def test_a_reward_of_the_wrong_length_is_an_error(sides, tmp_path):
    with pytest.raises(ValueError, match=r"expected one number for each of 15 strings, .*\(2,\)"):
        tradeoff.run_study(
            *sides, PROMPTS, settings(), tmp_path, names=NAMES,
            reward=lambda prompt, texts: [1.0, 2.0],
        )  # fmt: skip


def test_a_model_that_leaves_nothing_is_counted(tmp_path):
    """An adaptor always keeps a token of finite logits; of NaN none can be drawn."""
    model, tokenizer = make_model(), make_tokenizer()
    with torch.no_grad():
        # the embedding of one prompt's word: only that prompt's logits are NaN
        model.get_input_embeddings().weight[WORDS.index("w10")] = math.nan
        model.lm_head.weight[:] = make_model(1).lm_head.weight
    aligned = contexts.Side(model, tokenizer, "w6 w7")
    whole = make_model()
    prior = contexts.Side(whole, tokenizer)
    found = tradeoff.run_study(aligned, prior, PROMPTS, settings(), tmp_path, names=NAMES)
    excluded = found["counts"]["excluded"]
    assert excluded["no token could be drawn"] >= 15
    assert found["counts"]["strings"] == 15 * 6 - sum(excluded.values())
    report = tradeoff_report.write_report(found, tmp_path, []).read_text()
    count = excluded["no token could be drawn"]
    assert f"no token could be drawn {count}" in " ".join(report.split())
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(ValueError, match="ancestral, T=1: expected at least 2 usable strings, got"):
        tradeoff.run_study(aligned, prior, PROMPTS, settings(), tmp_path / "b", names=NAMES)


def test_tokens_outside_their_support_are_left_out(table):
    """The count of violations is not there for show."""
    values = table["violations"].to_numpy().copy()
    values[3] = 2
    place = table.column_names.index("violations")
    broken = pool_of(table.set_column(place, "violations", pa.array(values, pa.int32())), CELLS)
    assert broken.violations == 2 and broken.excluded["token outside its support"] == 1
    assert len(broken.cell) == table.num_rows - 1


def test_models_of_different_vocabularies(sides, tmp_path):
    aligned, prior = sides
    other = make_tokenizer((*WORDS[:-1], "another"))
    with pytest.raises(ValueError, match=r"60 and 60 tokens, 2 with different ids, such as 'anot"):
        tradeoff.run_study(
            aligned, prior._replace(tokenizer=other), PROMPTS, settings(), tmp_path, names=NAMES
        )
    larger = make_model(vocab_size=64)
    with pytest.raises(ValueError, match="expected heads of one size, got 60 and 64"):
        tradeoff.run_study(
            aligned, prior._replace(model=larger), PROMPTS, settings(), tmp_path, names=NAMES
        )
    assert not os.listdir(tmp_path)


def test_prompts_that_do_not_fit(sides, tmp_path):
    long = PROMPTS._replace(texts=["w10", "w11 " * 60])
    message = "prompt 2: expected at most 58 tokens, .* beside 6 new ones, .* 64 positions; got 66"
    with pytest.raises(ValueError, match=message):
        tradeoff.run_study(*sides, long, settings(), tmp_path, names=NAMES)
    with pytest.raises(ValueError, match="prompts: expected at least 2, got 1"):
        one = PROMPTS._replace(texts=["w10"])
        tradeoff.run_study(*sides, one, settings(), tmp_path, names=NAMES)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (CELLS[:1], "adaptors: expected 2 to 256, got 1"),
        ([*CELLS, CELLS[1]], "expected each adaptor once, got .* 2 times"),
        ([*CELLS, grids.Cell("cold", Adaptor(temperature=0))], "temperature > 0, got 0 in 'cold"),
        ([CELLS[0], grids.Cell("rows", Adaptor(top_k=torch.tensor([1, 2])))], "numbers as knobs"),
    ],
)
def test_grids_that_no_study_can_be_made_on(cells, message):
    with pytest.raises(ValueError, match=message):
        settings(cells=cells)


@pytest.mark.parametrize("change", [{"strings": 0}, {"max_new_tokens": 0}, {"replicates": 1}])
def test_settings_out_of_range(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected at least"):
        settings(**change)


def test_paper_grid():
    cells = grids.paper_grid()
    assert len(cells) == len({cell.name for cell in cells}) == 31
    assert {cell.temperature for cell in cells} == {0.5, 0.75, 1.0, 1.25, 1.5}
    small = grids.small_grid()
    assert len(small) == 15 and {c.family for c in small} == {c.family for c in cells}
    assert {cell.adaptor for cell in small} <= {cell.adaptor for cell in cells}
    hidden = grids.hidden_cells(cells)
    assert len(hidden) == 4
    assert {(c.adaptor.top_k, c.temperature, c.hidden_top_k) for c in hidden} == {(50, 1.5, True)}
    grids.check_grid([*cells, *hidden])


def test_grid_from_a_file(tmp_path):
    path = tmp_path / "grid.json"
    path.write_text('[{"top_k": 3, "family": "mine"}, {"min_p": 0.1, "temperature": 0.7}]')
    cells = grids.read_grid(path)
    assert [cell.name for cell in cells] == ["mine, T=1", "min_p=0.1, T=0.7"]
    for text, message in [
        ("{", "grid.json: expected JSON"),
        ("[]", "expected a list of adaptors"),
        ("[3]", "entry 1: expected an object, got 3"),
        ('[{"top_q": 3}]', "entry 1: .*top_q"),
        ('[{"top_p": 3}]', r"entry 1: top_p: expected a value in \[0, 1\]"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            grids.read_grid(path)


def test_prompts_from_files(tmp_path):
    dialogue = "\n\nHuman: {} \n\nAssistant: yes\n\nHuman: more\n\nAssistant: no"
    lines = [json.dumps({"chosen": dialogue.format(x)}) for x in ("one", "two", "one", "x" * 256)]
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = contexts.read_prompts(path)
    assert sorted(found.texts) == ["one", "two"]
    assert found[1:] == (4, 1, 1, 0)
    assert contexts.read_prompts(path).texts == found.texts
    plain = tmp_path / "prompts.txt"
    plain.write_text("one\n\n two \n")
    assert sorted(contexts.read_prompts(plain).texts) == ["one", "two"]
    mixed = tmp_path / "prompts.jsonl"
    mixed.write_text('"one"\n{"prompt": "two"}\n{"prompt": " "}\n')
    assert contexts.read_prompts(mixed)[1:] == (3, 0, 0, 1)
    mixed.write_text('"one"\n{"text": "two"}\n')
    with pytest.raises(ValueError, match="prompts.jsonl, line 2: expected a string"):
        contexts.read_prompts(mixed)
    plain.write_text("\n")
    with pytest.raises(ValueError, match="expected prompts of 1 to 255 characters, got none"):
        contexts.read_prompts(plain)


def test_reward_functions_and_models(tmp_path):
    assert rewards.reward_function("math:sqrt")(4) == 2
    for name, message in [
        ("math", "expected MODULE:FUNCTION, got 'math'"),
        ("nowhere_at_all:f", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        ("math:pi", "expected a function, got 3.14"),
    ]:
        with pytest.raises(ValueError, match=message):
            rewards.reward_function(name)
    make_model(kind=LlamaForSequenceClassification, num_labels=1).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    values = rewards.reward_model(str(tmp_path))("w10", ["w11", "w12 w13"])
    assert len(values) == 2 and all(map(math.isfinite, values)) and values[0] != values[1]
    make_model(kind=LlamaForSequenceClassification, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reward model: expected one output, got 2"):
        rewards.reward_model(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be loaded"):
        rewards.reward_model(str(tmp_path / "none"))


@pytest.mark.parametrize(("system", "count"), [("Be brief.", 2), ("Don't say --no, " * 8, 3)])
def test_commands_are_broken_before_options(system, count):
    """So that a page shows them, and never within quotes."""
    words = ["fastadapt", "tradeoff", "--out", "x" * 40, "--system", system, "--seed", "0"]
    words += ["--prompts", "y" * 40, "--quick"]
    start, *lines, end = markdown.shell(shlex.join(words)).split("\n")
    assert start == end == "```" and len(lines) == count
    assert all(len(line) <= 92 for line in lines if "no," not in line)
    assert all(line.startswith("    --") for line in lines[1:])
    assert [line.endswith(" \\") for line in lines] == [True] * (count - 1) + [False]
    assert [word for line in lines for word in shlex.split(line.removesuffix("\\"))] == words
    assert markdown.shell("study --x") == "```\nstudy --x\n```"


@pytest.fixture
def plain_layout(monkeypatch):
    """Pictures as they are before axes are moved apart, which takes half of their time."""
    engine = "matplotlib.layout_engine.ConstrainedLayoutEngine.execute"
    monkeypatch.setattr(engine, lambda self, figure: None)


@pytest.mark.usefixtures("plain_layout")
def test_command(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS.texts))
    grid = tmp_path / "grid.json"
    grid.write_text('[{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.7}]')
    out = tmp_path / "study"
    words = ["--model", str(folder), "--prompts", str(prompts), "--grid", str(grid), "--quick"]
    words += ["--count", "4", "--max-new-tokens", "5", "--threads", str(torch.get_num_threads())]
    assert cli.main(["tradeoff", "--out", str(out), *words]) == 0
    assert "report.md" in capsys.readouterr().out
    report = (out / "report.md").read_text()
    command = re.search(r"^fastadapt tradeoff (.*\\\n)*.*$", report, re.MULTILINE)[0]
    assert "--prompts prompts.txt" in command and "--quick" in command
    assert len(list((out / "corpora" / "parts").glob("*.parquet"))) == 4
    assert cli.main(["tradeoff", "--out", str(out), *words, "--seed", "4"]) == 2
    assert "expected seed = 4, got 0" in capsys.readouterr().err
    before = (out / "results.json").read_bytes()
    assert cli.main(["tradeoff", "--out", str(out), *words]) == 0
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "1"], "count: expected at least 2, got 1"),
        (["--strings", "0"], "strings: expected at least 1, got 0"),
        (["--grid", "none.json"], "none.json"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--reward", "a:b", "--reward-model", "c"], "not allowed with argument"),
    ],
)
def test_command_refuses_bad_arguments_before_loading(
    words, message, tmp_path, capsys, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(tradeoff_command, "load_model", load)
    with pytest.raises(SystemExit) as left:
        cli.main(["tradeoff", "--out", str(tmp_path / "study"), *words])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_command_reports_what_it_cannot_do(folder, tmp_path, capsys):
    out = ["tradeoff", "--out", str(tmp_path / "study")]
    assert cli.main([*out, "--model", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    model = ["--model", str(folder)]
    assert cli.main([*out, *model, "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert cli.main([*out, *model, "--count", "1000"]) == 2
    assert "count: expected at most" in capsys.readouterr().err
    assert cli.main([*out, *model, "--reward", "math"]) == 2
    assert "expected MODULE:FUNCTION" in capsys.readouterr().err


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module with rewards in the current folder, which is on no path."""
    text = """
        import math
        def score(prompt, texts):
            from neighbour_of_rewards import length  # while it runs, too
            return [length(t) if t else math.nan for t in texts]
        def crash(prompt, texts):
            raise KeyError("x\\ny")
        def words(prompt, texts):
            return ["0.5" for _ in texts]
        def few(prompt, texts):
            return [1.0]
        def one(prompt, texts):
            return 1.0
        def nothing(prompt, texts):
            return [None for _ in texts]
        class Judge:
            @staticmethod
            def score(prompt, texts):
                return [1.0 for _ in texts]
        number = 3
    """
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(text))
    (tmp_path / "neighbour_of_rewards.py").write_text("def length(text): return float(len(text))")
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('at import')")
    (tmp_path / "leaving_rewards.py").write_text("raise SystemExit(3)")
    (tmp_path / "needy_rewards.py").write_text("import not_there_at_all")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in [n for n in sys.modules if n.endswith("_rewards")]:
        del sys.modules[name]


def test_rewards_of_the_current_folder(user_module, tmp_path_factory, monkeypatch):
    """As the console script, which has no current folder on its path, and while it runs."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(user_module))])
    reward = rewards.reward_function("my_rewards:score")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert corpora.reward_values(reward, "p", ["ab", "c"]).tolist() == [2.0, 1.0]
    assert rewards.reward_function("my_rewards:Judge.score")("p", ["ab"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards.py:score", "expected MODULE:FUNCTION, got 'my_rewards.py:score'"),
        ("./my_rewards:score", "expected MODULE:FUNCTION"),
        ("my_rewards:", "expected MODULE:FUNCTION"),
        ("my_reward:score", "cannot be imported, from .*: ModuleNotFoundError: No module named"),
        ("needy_rewards:f", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("broken_rewards:f", "'broken_rewards:f' cannot be imported, .*RuntimeError: at import"),
        ("leaving_rewards:f", "cannot be imported, .*SystemExit: 3"),
        ("my_rewards:scor", "AttributeError: module 'my_rewards' has no attribute 'scor'"),
        ("my_rewards:number", "expected a function, got 3"),
        ("my_rewards:crash", r"my_rewards:crash raised KeyError: 'x\\ny', for the prompt 'Hello'"),
        ("my_rewards:words", r"one number for each of 2 strings, got \['0.5', '0.5'\]"),
        ("my_rewards:few", r"one number for each of 2 strings, got shape \(1,\)"),
        ("my_rewards:one", "one number for each of 2 strings, got 1.0"),
        ("my_rewards:nothing", r"got \[None, None\]"),
    ],
)
def test_rewards_that_are_none(name, message, user_module):
    with pytest.raises(ValueError, match=message) as found:
        corpora.reward_values(rewards.reward_function(name), "Hello", ["a", "b"])
    assert "\n" not in str(found.value)


@pytest.fixture
def judged(sides, user_module):
    """A study with a reward of the user's, not finite for a whole adaptor and some strings."""

    def reward(prompt, texts):
        values = [float(len(text)) for text in texts]
        values[3:6] = [math.nan] * 3  # the second adaptor's
        values[0] = math.inf
        return values

    names = {**NAMES, "reward": "the function my_rewards:score"}
    found = tradeoff.run_study(*sides, PROMPTS, settings(), user_module, names=names, reward=reward)
    return found, user_module


def test_report_is_about_the_reward_that_was_given(judged):
    """Its findings by its name, each section that is about the other one says so, figures too."""
    found, place = judged
    assert found["adaptors"][1]["user"] is None and found["counts"]["reward not finite"] == 24
    grid = found["strings"]["cell"]
    mine = np.array(grid) == 0
    user, log_p = (np.array(found["strings"][k])[mine] for k in ("user", "log_prior"))
    kept = np.isfinite(user)
    wanted = [log_p[kept].mean(), user[kept].mean()]
    assert found["adaptors"][0]["user"] == pytest.approx(wanted, abs=0.01)
    names = tradeoff_plots.draw_figures(found, place)
    assert names == [*tradeoff_plots.FIGURES, tradeoff_plots.USER]
    # what is read back from JSON gives the same page
    tradeoff.write_results(place / "results.json", found)
    found = tradeoff.read_results(place / "results.json")
    text = tradeoff_report.write_report(found, place, names).read_text()
    flat = " ".join(text.split())
    name = "the function my_rewards:score"
    assert f"The reward is {name}. Beside it stands the implicit reward, log p₊ − log p" in flat
    user = found["correlations"]["user"]
    assert f"### {name}" in text and "the user's reward" not in text
    first = text.index(tradeoff_report.shown(user["string"]["pooled"]["pearson"]))
    assert first < text.index("### log p₊ − log p")
    assert flat.count(f"This section is about the implicit reward, not about {name}.") == 3
    assert f"How well {name} measures the quality" in flat
    assert "optimal for the reward used here by definition" not in flat
    rows = [line for line in text.splitlines() if line.startswith("| Strings, RLHF pair")]
    assert len(rows) == 1 and name in rows[0]
    of_second = [line for line in text.splitlines() if line.startswith("| top-k 5, T=1 |")]
    assert len(of_second) == 2 and of_second[0].endswith("| – | – |")
    assert max(line.count("|") for line in text.splitlines()) == 1 + 9  # columns that a page shows
    assert text.index("user reward") < text.index("strings and corpora")
    assert tradeoff_plots.reward_label(found, "user") == f"reward, {name}"
    assert tradeoff_plots.reward_label(found, "implicit").startswith("implicit reward")


def test_report_draws_no_conclusion_that_its_numbers_do_not(results, tmp_path):
    """Sentences that hold for the committed study alone are written where they hold."""
    found, _ = results
    changed = json.loads(json.dumps(found))
    changed["counts"]["finished"] = 0.6
    changed["typical"][-1]["predicted"] = changed["typical"][-1]["pearson"] + 0.4
    for one in changed["adaptors"]:
        one["effective"] = 9.0
    changed["correlations"]["implicit"]["adaptors"]["pooled"]["pearson"] = [None] * 3
    flat = " ".join(tradeoff_report.write_report(changed, tmp_path, []).read_text().split())
    assert "40 % of these are cut." in flat and "length hardly varies" not in flat
    assert "predicts that to 0.4" in flat and "it is the selection" not in flat
    assert "few effective strings" not in flat
    assert "between them is undecided" in flat
    changed["counts"]["finished"] = 1.0
    flat = " ".join(tradeoff_report.write_report(changed, tmp_path, []).read_text().split())
    assert "What longer strings give" not in flat


@pytest.mark.usefixtures("plain_layout")
def test_command_with_a_reward(folder, user_module, capsys):
    words = ["tradeoff", "--out", "study", "--model", str(folder), "--quick", "--count", "3"]
    grid = user_module / "grid.json"
    grid.write_text('[{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.7}]')
    words += ["--grid", "grid.json", "--max-new-tokens", "4"]
    assert cli.main([*words, "--reward", "my_rewards:crash"]) == 2
    assert _one_line(capsys).startswith("fastadapt: reward: my_rewards:crash raised KeyError")
    assert cli.main([*words, "--reward", "my_rewards:score"]) == 0
    text = Path("study/report.md").read_text()
    assert "The reward is the function my_rewards:score" in " ".join(text.split())
    assert json.loads(Path("study/results.json").read_text())["names"]["dtype"] == "float32"


def _one_line(capsys):
    """What stands on the error output; one line, no traceback."""
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fastadapt:")]
    return line


def test_what_people_do_every_day_is_one_line(folder, user_module, capsys, monkeypatch):
    Path("file").write_text("")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'"one"\n"two"\n' * 99)[:-20])
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("bad.gz").write_bytes(b"no gzip")
    Path("other").mkdir()
    Path("other/corpora").mkdir()
    Path("other/corpora/manifest.json").write_text("[]")
    Path("empty").mkdir()
    run = ["tradeoff", "--out", "study", "--model", str(folder)]
    for words, message in [
        ([*run[:2], "file/study", *run[3:]], "file"),
        ([*run, "--prompts", "none.txt"], "No such file or directory: 'none.txt'"),
        ([*run, "--prompts", "other"], "Is a directory: 'other'"),
        ([*run, "--prompts", "cut.jsonl.gz"], "cut.jsonl.gz: expected text in UTF-8, gzipped"),
        ([*run, "--prompts", "bad.gz"], "bad.gz: expected text in UTF-8, gzipped"),
        ([*run, "--prompts", "binary.txt"], "binary.txt: expected text in UTF-8"),
        (
            [*run[:2], "other", *run[3:]],
            "manifest.json: expected the manifest of a study, got '[]'",
        ),
        ([*run[:4], "empty"], "empty"),
        ([*run, "--prior", "nowhere/at/all"], "nowhere"),
        ([*run, "--reward-model", "empty"], "reward model: 'empty' cannot be loaded"),
    ]:
        assert cli.main(words) == 2, words
        assert message in _one_line(capsys), words

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tradeoff_command, "run", interrupt)
    assert cli.main(run) == 130
    assert "interrupted; what was sampled is kept in study" in _one_line(capsys)


def test_prompts_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\ntwo\n".encode("utf-8-sig"))
    assert sorted(contexts.read_prompts(path).texts) == ["one", "two"]


def test_interrupted_writing_leaves_what_was_there(tmp_path):
    """Ctrl-C or a full disk in the middle of a file: the old one stays, and nothing else."""
    path = tmp_path / "results.json"
    tradeoff.write_results(path, {"a": 1})
    for error in (KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")):

        def write(place, error=error):
            place.write_text("half")
            raise error

        with pytest.raises((KeyboardInterrupt, files.StorageError)):
            files.write_whole(path, write)
        assert tradeoff.read_results(path) == {"a": 1} and os.listdir(tmp_path) == [path.name]


def test_benchmark_scores_the_same_strings_both_ways(folder, tmp_path, monkeypatch):
    # not above: a child of another test imports this file without the folder of benchmarks
    import bench_tradeoff
    import report as benchmark_report

    path = tmp_path / "tradeoff.json"
    words = ["--model", str(folder), "--prompts", "2", "--rounds", "2", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["bench_tradeoff.py", *words, "--out", str(path)])
    bench_tradeoff.main()
    record = json.loads(path.read_text())
    assert max(record["agreement"].values()) < 1e-3
    assert record["tokens"] == 2 * 15 * 2 * 4
    assert record["violations"]["fastadapt"] == 0
    for way in ("fastadapt", "stock"):
        low, middle, high = record["seconds"][way]["all"]
        assert 0 < low <= middle <= high
    table = benchmark_report.TABLES["tradeoff"](record)
    assert f"{record['seconds']['stock']['all'][1]:.1f}" in table
    assert "| transformers' time to ours, end to end |" in table


def test_published_report_is_what_its_results_say(tmp_path):
    """docs/tradeoff: a whole study, of the size that was asked for, and nothing typed by hand."""
    place = Path(__file__).resolve().parents[1] / "docs" / "tradeoff"
    found = tradeoff.read_results(place / "results.json")
    names = [name for name in tradeoff_plots.FIGURES if (place / f"{name}.png").exists()]
    assert names == list(tradeoff_plots.FIGURES)
    report = tradeoff_report.write_report(found, tmp_path, names)
    assert report.read_text() == (place / "report.md").read_text()
    assert found["prompts"]["used"] >= 100 and len(found["adaptors"]) >= 15
    assert found["settings"]["strings"] >= 2 and found["counts"]["violations"] == 0
