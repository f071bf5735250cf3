"""The sampling kernels as they are launched, at vocabularies of models: the CPU's bits.

Sizes are those of a GPU, where `test_kernels.py` shrinks them. Each kind of rows is drawn from with
each adaptor in each dtype once, at one of the vocabularies; with --every-vocabulary at all, with
two seeds. Half types, which differ in their loads alone, are looked at in wider blocks then.
"""

import itertools
import os

import pytest
import torch

from fastadapt import Adaptor, sample
from fastadapt._ops.sampling import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton import launch, launch_scan  # noqa: E402  (the interpreter is chosen)

# of rows that hold NaN or infinities, where the interpreter is NumPy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
INF = float("inf")
VOCABULARIES = (50_257, 128_256, 262_144)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAN = launch_scan.PLAN
WIDE = PLAN._replace(
    columns=512, block=8192, bins_step=4096
)  # the interpreter's time goes by blocks
KINDS = {
    "normal": lambda v: torch.randn(1, v) * 3,
    "narrow": lambda v: torch.randn(1, v),
    "all equal": lambda v: torch.full((1, v), 1.5),
    "two levels": lambda v: torch.randint(2, (1, v)) * 1.5,
    "one for all": lambda v: torch.zeros(1, v).index_fill_(1, torch.tensor([v // 2]), 40.0),
    "holes": lambda v: torch.randn(1, v).masked_fill_(torch.rand(1, v) < 0.9, -INF),
    "ties": lambda v: (torch.randn(1, v) * 3).bfloat16().float(),
    "NaN": lambda v: torch.randn(1, v).index_fill_(1, torch.tensor([v - 1]), float("nan")),
}
LONG = {"all equal", "two levels", "one for all"}  # no list decides: the row is searched, often
KNOBS = {
    "T+k+p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "T": {"temperature": 0.8},
    "T+p": {"temperature": 0.8, "top_p": 0.9},
    "min-p": {"min_p": 0.02},
    "typical": {"typical_p": 0.9},
    "epsilon": {"epsilon_cutoff": 3e-4},
    "eta": {"eta_cutoff": 9e-4},
    "everything": {
        **{"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.02},
        **{"typical_p": 0.95, "epsilon_cutoff": 3e-4, "eta_cutoff": 9e-4},
    },
}


def assert_drawn(
    kind: str, name: str, dtype: torch.dtype, v: int, seed: int, plan: launch_scan.Plan = PLAN
) -> None:
    """The four fields, to the last bit."""
    torch.manual_seed(seed)
    x, adaptor, seeds = KINDS[kind](v).to(dtype), Adaptor(**KNOBS[name]), torch.tensor([seed])
    arguments = x, adaptor.packed, adaptor.filter_code, seeds, None, False, False, 0
    ours = OPERATORS["sample"][1](*arguments)
    launch.sample(*arguments, ours, plan)
    for a, b in zip(ours, sample(x, adaptor, seeds=seeds)[:4], strict=True):
        assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9)), (kind, name, dtype, v, seed, a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KNOBS)
def test_rows_of_a_model_are_drawn_from_as_on_a_cpu(request, kind, name):
    place = list(KINDS).index(kind) + list(KNOBS).index(name)
    if request.config.getoption("--every-vocabulary"):
        for dtype, v, seed in itertools.product(DTYPES, VOCABULARIES, (5, 6)):
            assert_drawn(kind, name, dtype, v, seed)
        return
    assert_drawn(kind, name, DTYPES[0], VOCABULARIES[0], 5)
    for i, dtype in enumerate(DTYPES[1:]):
        larger = 0 if kind in LONG else max(0, (place + i) % 4 - 1)
        assert_drawn(kind, name, dtype, VOCABULARIES[larger], 5, WIDE)
