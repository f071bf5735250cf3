"""Every architecture of transformers that can be built tiny: is what we make of it right?

    python tests/architectures.py [--check] [--write] [NAME ...]

builds the causal, multimodal and encoder-decoder classes of the installed transformers with small
random weights and compares, in float32 on the CPU,

- "forward": the log-odds of `forward_log_odds` with those of the model's own logits;
- "body": those of `response_log_odds`, where the model takes text alone and has no encoder;
- "generation": the scores of `hf.generate`, step by step, with those of the processors that
  transformers prepared, applied to the model's logits; and that seeds alone decide the tokens.

It prints right, refused (with the reason), WRONG and not built for each and the counts, and exits
with 1 where anything is wrong; with --check also where a class that is right in
tests/architectures.json is no longer. --write makes that file anew.

A config class is instantiated with small numbers wherever a field's name says that it is a size
(`SIZES`); what else a model type needs stands in tests/tiny_configs.json.
"""

# ruff: noqa: T201, it prints its report

from __future__ import annotations

import argparse
import collections
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastadapt import hf
from fastadapt.log_odds import label_log_odds
from fastadapt.training import forward_log_odds, response_log_odds
from fastadapt.training.pairs import IGNORED, PairBatch

TABLE = Path(__file__).with_suffix(".json")
CHECKS = ("forward", "body", "generation")
MAPPINGS = (
    *("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "SPEECH_SEQ_2_SEQ",
)
VOCAB = 128
FIRST_SPECIAL = 90  # ids from here on are those of images, turns and the like; text is below
LENGTH = 6
STEPS = 3
SECONDS = 60  # of the processor, for one class
SPREAD = 40.0  # max|z| before a cap: one of 30 then shows
TOLERANCE = 1e-4  # of max|z|
TOP_P = 0.9
BAND = 1e-5  # how near top_p a token's fate may depend on rounding


def _at_most(most: int) -> Callable[[int], int]:
    """A rule that leaves smaller numbers as they are."""
    return lambda value: min(value, most)


# Field names, whole, by the first pattern that fits: the small value, or what makes it.
SIZES: dict[str, int | Callable[[int], int]] = {
    "type_vocab_size": _at_most(2),
    "unpadded_vocab_size": 120,
    "(.*_)?vocab_size|n_vocab|vocab_size_per_layer_input|num_embeddings|codebook_size": VOCAB,
    ".*num_(hidden_)?layers|n_layers?|.*(en|de)coder_layers|depth|layers|num_blocks": 2,
    "(.*_)?num_(key_value|kv)_heads|kv_n_heads": 2,
    "(.*_)?attention_heads|(index_)?n_heads?|num_heads|linear_num_(key|value)_heads": 4,
    "qk_head_dim": 16,
    "(.*_)?head_dim|d_kv": 8,
    "rotary_dim": 4,
    "word_embed_proj_dim": 32,
    "(.*_)?(hidden_size|d_model|n_embd|hidden_dim|embed_dim)|dim_model|emb_dim": 32,
    "(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|dim_ff|dff|n_inner)": 48,
    "num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts": _at_most(2),
    "(moe_)?num_(local_)?experts|n_routed_experts": 4,
    "n_group|topk_group|num_expert_group": 1,
    "(kv|q|o)_lora_rank": 16,
    "first_k_dense_replace|num_dense_layers": _at_most(1),
    "(.*_)?max_(position_embeddings|(source|target)_positions)|n_positions|n_ctx": 64,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim|out_hidden_size|output_dim|qformer_hidden_size": 32,
}
SIZES_WHERE_NONE = {"head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2}
# What a model may do to its logits, where its default is to do nothing.
SCALES = {
    **dict.fromkeys(("logits_scaling", "logit_scale", "lm_head_multiplier"), 0.3),
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 30.0),
}
# By model type: "config" has fields. By that or by class: "inputs" has the shapes of inputs that
# are no text, "integers" those of ones, "images" an id's field and how many stand in the text,
# "ids" another shape of the text; "text" says that there is text beside the inputs.
TINY: dict[str, dict[str, Any]] = json.loads(TABLE.with_name("tiny_configs.json").read_text())
# Classes with other configs than their default, by "Class (what is other)".
VARIANTS: dict[str, dict[str, Any]] = TINY.pop("variants")


class NotBuiltError(Exception):
    """A class that cannot be tried here; the message says why."""


def class_names() -> list[str]:
    """The classes of the mappings, each once."""
    names: dict[str, None] = {}
    for mapping in MAPPINGS:
        for entry in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            names |= dict.fromkeys([entry] if isinstance(entry, str) else entry)
    return [*names, *VARIANTS]


def tiny_config(config_class: Any, special: Iterator[int], **given: Any) -> Any:
    """A config with small numbers; `given` fields are taken, a dictionary for a config below."""
    extra = TINY.get(config_class.model_type, {}).get("config", {}) | given
    try:
        default = config_class()
    except Exception:  # some have no default that is whole
        default = config_class(**extra)
    fields: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name not in config_class.__dataclass_fields__:
            continue  # made from the others
        if isinstance(value, transformers.PreTrainedConfig):
            below = extra.pop(name, {})
            kind = CONFIG_MAPPING[below["model_type"]] if "model_type" in below else type(value)
            fields[name] = tiny_config(kind, special, **below)
        elif name in SCALES and value in (None, 1.0):
            fields[name] = SCALES[name]
        elif name in SIZES_WHERE_NONE and value is None:
            fields[name] = SIZES_WHERE_NONE[name]
        elif name.startswith("_") or isinstance(value, bool) or not isinstance(value, int):
            continue
        elif re.search(r"token_(id|index)$", name):
            if value >= FIRST_SPECIAL:
                fields[name] = next(special)
        else:
            fields[name] = _small(name, value)
    if isinstance(rope := getattr(default, "rope_parameters", None), dict):
        fields["rope_parameters"] = _small_rope(rope, fields.get("head_dim", 8))
    fields |= extra
    if fields.get("kv_lora_rank"):  # latent attention: one key for each query
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return config_class(**fields)


def _small_rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary parameters whose sections have the sizes of small heads."""
    out = {k: _small_rope(v, head_dim) if isinstance(v, dict) else v for k, v in rope.items()}
    if out.get("mrope_section"):
        half = int(head_dim * out.get("partial_rotary_factor", 1.0)) // 2
        third = half // 3
        out["mrope_section"] = [half - 2 * third, third, third]
    return out


def _small(name: str, value: int) -> int:
    """The small value of a field, or the one it has."""
    for pattern, small in SIZES.items():
        if re.fullmatch(pattern, name):
            return small(value) if callable(small) else small
    return value


def build(name: str) -> Any:
    """A tiny random model of a class, in eval mode, with logits that are spread widely."""
    model_class: Any = getattr(transformers, name.partition(" ")[0])
    torch.manual_seed(zlib.crc32(name.encode()))
    try:
        special = iter(range(FIRST_SPECIAL, VOCAB))
        config = tiny_config(model_class.config_class, special, **VARIANTS.get(name, {}))
        if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
            config.is_decoder = True
        model = model_class(config).eval()
        generation = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1, "num_beams": 1}
        if config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
            generation["decoder_start_token_id"] = 1
        for part in model.modules():
            if getattr(part, "generation_config", None) is not None:
                vars(part.generation_config).update(generation)
        with torch.no_grad():
            spread(model)
    except Exception as error:
        raise NotBuiltError(_line(error)) from error
    return model


def spread(model: Any) -> None:
    """Scales the head so that a cap shows, and gives it a bias where it has room for one."""
    logits = logits_of(model, inputs_of(model))
    head = model.get_output_embeddings()
    biases = [*model.named_parameters(), *model.named_buffers()]
    if isinstance(getattr(head, "weight", None), Tensor):
        head.weight.mul_(SPREAD / logits.abs().max())
    for name, bias in biases:
        if name.endswith("bias") and bias.numel() == logits.shape[-1] and not bias.any():
            bias.normal_()


def inputs_of(model: Any) -> dict[str, Any]:
    """Keyword arguments of a forward: two sequences, and a beginning for a decoder."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    ids = torch.randint(5, FIRST_SPECIAL, (2, LENGTH), generator=generator)
    inputs: dict[str, Any] = {}
    tiny = TINY.get(type(model).__name__, {}) or TINY.get(config.model_type, {})
    for name, shape in tiny.get("inputs", {}).items():
        inputs[name] = torch.rand(shape, generator=generator)
    for name, shape in tiny.get("integers", {}).items():
        inputs[name] = torch.ones(shape, dtype=torch.int64)
    if "images" in tiny:  # their places among the text
        field, count = tiny["images"]
        ids[:, 1 : 1 + count] = getattr(config, field)
    if "ids" in tiny:
        ids = torch.randint(5, FIRST_SPECIAL, tiny["ids"], generator=generator)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    if not config.is_encoder_decoder or not tiny.get("inputs") or tiny.get("text"):
        inputs["input_ids"] = ids
    return inputs


def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The model's own logits, float32."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()


def _line(error: BaseException) -> str:
    """An error in one line; with its place where it does not say what it expected."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return text if ": expected " in text else f"{text} ({Path(last.filename).name}:{last.lineno})"


def verdict(check: Callable[[], str]) -> str:
    """What a check says; our own errors are refusals, whatever else is raised is wrong."""
    try:
        return check()
    except NotBuiltError as error:
        return f"not built: {error}"
    except (ValueError, TypeError, RuntimeError) as error:
        refused = re.match(r"[\w.]+: expected ", str(error))
        return f"{'refused' if refused else 'WRONG'}: {_line(error)}"
    except Exception as error:
        return f"WRONG: {_line(error)}"


def compared(ours: Tensor, labels: Tensor, logits: Tensor) -> str:
    """Right where log-odds are those of the logits."""
    if not torch.isfinite(logits).all():
        raise NotBuiltError("logits that are not finite")
    right = label_log_odds(logits, labels, ignore_index=IGNORED)
    off, size = (ours - right).abs().max().item(), logits.abs().max().item()
    return (
        "right" if off <= TOLERANCE * size else f"WRONG: off by {off:.3g} where max|z| = {size:.3g}"
    )


@torch.no_grad()
def check_forward(model: Any) -> str:
    """`forward_log_odds` against the logits."""
    inputs = inputs_of(model)
    logits = logits_of(model, inputs)
    labels = torch.randint(logits.shape[-1], logits.shape[:-1])
    labels.view(-1)[::5] = IGNORED
    return compared(forward_log_odds(model, inputs, labels), labels, logits)


@torch.no_grad()
def check_body(model: Any) -> str:
    """`response_log_odds` against the logits."""
    inputs = inputs_of(model)
    if list(inputs) != ["input_ids"]:
        return "none: not text alone"
    tokens = inputs["input_ids"]
    logits = logits_of(model, inputs)
    if logits.shape[:2] != tokens.shape:
        return "none: not a position for each token"
    batch = PairBatch(tokens, torch.ones_like(tokens), tokens[:, 1:])
    return compared(response_log_odds(model, batch), tokens[:, 1:], logits[:, :-1].contiguous())


def check_generation(model: Any) -> str:
    """`hf.generate` against the processors that transformers prepared."""
    chain: list[Any] = []
    prompts: list[int] = []

    def recorded(model: Any, input_ids: Tensor, *, seeds: Any = None, **rest: Any) -> Any:
        chain[:] = rest["logits_processor"]
        prompts.append(input_ids.shape[1])
        return hf.generate(model, input_ids, seeds=seeds, **rest)

    def run(custom_generate: Any, **more: Any) -> Any:
        return model.generate(
            **_prompt(model),
            custom_generate=custom_generate,
            do_sample=True,
            top_k=0,
            top_p=TOP_P,
            max_new_tokens=STEPS,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **more,
        )

    try:
        run(None)
    except Exception as error:
        raise NotBuiltError(f"transformers' own generate raises {_line(error)}") from error
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outs.append(run(recorded, seeds=[5, 6]))
        if not prompts:
            return "none: its own generate does not pass custom_generate on"
    out, again = outs
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        ids = out.sequences[:, : prompts[0] + step]
        if different := _differ(chain, ids, logits, scores):
            return f"WRONG: step {step}: {different}"
        token = out.sequences[:, prompts[0] + step, None]
        if not (scores.gather(1, token) > -torch.inf).all():
            return f"WRONG: step {step}: a removed token was drawn"
    if not torch.equal(out.sequences, again.sequences):
        ours = [str(w.message) for w in caught if str(w.message).startswith("seeds: ")]
        return f"right, with a warning: {ours[0]}" if ours else "WRONG: seeds do not decide"
    return "right"


def _prompt(model: Any) -> dict[str, Any]:
    """What `generate` takes of the inputs."""
    return {k: v for k, v in inputs_of(model).items() if k != "decoder_input_ids"}


def _differ(chain: list[Any], ids: Tensor, logits: Tensor, scores: Tensor) -> str:
    """Where scores are not those of the chain, away from the threshold; empty where they are."""
    stock = transformers.LogitsProcessorList(chain)(ids, logits.clone())
    settled = torch.ones_like(stock, dtype=torch.bool)
    for nudge in (-BAND, BAND):
        nudged = [
            transformers.TopPLogitsWarper(TOP_P + nudge)
            if type(p) is transformers.TopPLogitsWarper
            else p
            for p in chain
        ]
        other = transformers.LogitsProcessorList(nudged)(ids, logits.clone())
        settled &= (other > -torch.inf) == (stock > -torch.inf)
    kept, right = scores > -torch.inf, stock > -torch.inf
    if not torch.equal(kept & settled, right & settled):
        return f"{int(kept.sum())} scores kept, {int(right.sum())} by transformers"
    off = (scores - stock)[kept & right].abs().max().item()
    return "" if off <= 1e-4 else f"scores off by {off:.3g}"


def check(name: str) -> dict[str, str]:
    """The three verdicts of a class."""
    try:
        model = build(name)
        return {
            "forward": verdict(lambda: check_forward(model)),
            "body": verdict(lambda: check_body(model)),
            "generation": verdict(lambda: check_generation(model)),
        }
    except NotBuiltError as error:
        return {"built": f"not built: {error}"}


def work() -> None:
    """Reads names from standard input and answers each with a line of JSON."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
    answers, sys.stdout = sys.stdout, sys.stderr

    def late(*_: Any) -> None:
        raise NotBuiltError(f"takes more than {SECONDS} s of the processor")

    signal.signal(signal.SIGPROF, late)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        print(json.dumps(check(line.strip())), file=answers, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _drive(names: Iterator[str], results: dict[str, dict[str, str]]) -> None:
    """Gives names to a process of its own, and to a new one where that ends."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker"]
    process = None
    for name in names:
        if process is None:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert process.stdin is not None and process.stdout is not None
        print(name, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            code = process.wait()
            results[name] = {"built": f"WRONG: its process ended with {code}"}
            process = None
            continue
        results[name] = json.loads(answer)
        print(name, *(f"{k}: {v}" for k, v in results[name].items()), sep="\n    ", flush=True)
    if process is not None:
        process.communicate()


def check_all(names: list[str], processes: int) -> dict[str, dict[str, str]]:
    """The verdicts of all classes, in a few processes that may end without harm."""
    results: dict[str, dict[str, str]] = {}
    left = iter(names)
    lock = threading.Lock()

    def take() -> Iterator[str]:
        while True:
            with lock:
                name = next(left, None)
            if name is None:
                return
            yield name

    threads = [threading.Thread(target=_drive, args=(take(), results)) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: results[name] for name in names}


def kind(text: str) -> str:
    """The first word or two of a verdict."""
    return re.split(r"[:,]", text)[0]


def main() -> int:
    """Prints all verdicts and the counts; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="classes; all by default")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--write", type=Path, nargs="?", const=TABLE, help="write the table")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    results = check_all(options.names or class_names(), options.processes)
    built = {name: r for name, r in results.items() if "built" not in r}
    print(f"\n{len(built)} of {len(results)} classes built")
    failed = any("WRONG" in text for r in results.values() for text in r.values())
    for column in CHECKS:
        counts = collections.Counter(kind(r[column]) for r in built.values())
        print(f"{column:12}", ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    if options.check:
        before = json.loads(TABLE.read_text())
        for name, row in results.items():
            for column, text in before.get(name, {}).items():
                if kind(text) == "right" and kind(row.get(column, "not built")) != "right":
                    print(f"{name}: {column} was right and is not: {row}")
                    failed = True
    if options.write:
        options.write.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
