"""A part of what `python tests/architectures.py` tries, and what the table of the whole says."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the architectures are those of transformers")

_spec = importlib.util.spec_from_file_location(
    "architectures", Path(__file__).with_name("architectures.py")
)
assert _spec is not None and _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)

TABLE = json.loads(architectures.TABLE.read_text())
# What is special to each: heads that scale, cap, cut, transform or add; bodies and wrappers.
SUBSET = """
LlamaForCausalLM GPT2LMHeadModel GPTJForCausalLM CodeGenForCausalLM BloomForCausalLM MptForCausalLM
CohereForCausalLM Cohere2ForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
HyperCLOVAXForCausalLM MiniCPM3ForCausalLM FalconH1ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
RecurrentGemmaForCausalLM InklingForCausalLM BertLMHeadModel RobertaForCausalLM ElectraForCausalLM
RemBertForCausalLM
ModernBertDecoderForCausalLM OPTForCausalLM MambaForCausalLM Mamba2ForCausalLM RwkvForCausalLM
DeepseekV3ForCausalLM MixtralForCausalLM Qwen3MoeForCausalLM GptOssForCausalLM XLNetLMHeadModel
CTRLLMHeadModel MusicgenForCausalLM ProphetNetForCausalLM
LlavaForConditionalGeneration Qwen2_5_VLForConditionalGeneration Idefics3ForConditionalGeneration
GraniteDoclingForConditionalGeneration Gemma3ForConditionalGeneration
BartForConditionalGeneration MarianMTModel T5ForConditionalGeneration FSMTForConditionalGeneration
PegasusForConditionalGeneration WhisperForConditionalGeneration
""".split()
SUBSET += [
    "PaliGemmaForConditionalGeneration (gemma2)",
    "LlavaForConditionalGeneration (cohere)",
    "T5ForConditionalGeneration (untied)",
]


@pytest.mark.parametrize("name", SUBSET)
def test_architecture_is_as_the_table_says(name, num_threads):
    num_threads(1)
    row = architectures.check(name)
    kinds, told = ({k: architectures.kind(v) for k, v in r.items()} for r in (row, TABLE[name]))
    assert kinds == told, row


def test_table_has_nothing_wrong_and_little_refused():
    built = [row for row in TABLE.values() if "built" not in row]
    assert len(built) >= 230
    assert not [row for row in TABLE.values() if "WRONG" in str(row)]
    for column in architectures.CHECKS:
        refused = [row for row in built if row[column].startswith("refused")]
        assert len(refused) <= 0.05 * len(built), column


def test_subset_is_large():
    assert len(set(SUBSET)) >= 40 and set(SUBSET) <= set(TABLE)
