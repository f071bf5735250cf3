"""`warm_up`: what it refuses, and what it hands to the compiler.

That no draw compiles after it is tested in test_benchmarks_gpu_static.py.
"""

import re

import pytest
import torch

from fastadapt import WarmUp, warm_up

BF16 = [torch.bfloat16]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("cpu", 8, BF16), {}, ValueError, "device: expected a CUDA device, got cpu"),
        ((0, 8, BF16), {}, TypeError, "device: expected a torch.device or its name, got int"),
        (("cuda", 0, BF16), {}, ValueError, "vocabulary: expected 1 to 4194304, got 0"),
        (("cuda", 2.0, BF16), {}, TypeError, "vocabulary: expected an integer, got 2.0"),
        (("cuda", 8, []), {}, ValueError, "dtypes: expected at least one, got none"),
        (
            ("cuda", 8, torch.bfloat16),
            {},
            TypeError,
            "dtypes: expected a sequence of dtypes, got dtype",
        ),
        (
            ("cuda", 8, [torch.float64]),
            {},
            TypeError,
            "dtypes: expected float32, bfloat16 or float16, got torch.float64",
        ),
        (
            ("cuda", 8, BF16),
            {"top_logprobs": 9},
            ValueError,
            "top_logprobs: expected 0 to 8, got 9",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        warm_up(*arguments, **options)


def test_what_is_asked_for_is_compiled(monkeypatch):
    launch = pytest.importorskip("fastadapt._ops.triton.launch", reason="needs triton")
    given = []

    def compile_draws(*arguments):
        given.append(arguments)
        return 28

    monkeypatch.setattr(launch, "compile_draws", compile_draws)
    dtypes = [torch.float32, torch.float16]
    ready = warm_up("cuda", 50_257, dtypes, top_logprobs=20)
    assert isinstance(ready, WarmUp) and ready.kernels == 28 and 0 <= ready.seconds < 60
    *first, threads = given.pop()
    assert first == [torch.device("cuda"), 50_257, dtypes, 20] and threads >= 1
