"""The Triton kernels that verify drafts under Triton's interpreter: the CPU's result to the bit."""

import os

import pytest
import torch

from bits import assert_same
from fastadapt import Adaptor, Edits, Support, Verified, verify
from fastadapt._ops.common import AS_THEY_ARE, RowEdits
from fastadapt._ops.verification import verification_outputs

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton import launch_scan  # noqa: E402  (the interpreter is chosen before)
from fastadapt._ops.triton.verification import launch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
PLAN = launch_scan.Plan(
    columns=16, group=8, ahead=4, supers=4, block=64, bins_step=64, bracket_step=32, bins=32,
    room=128, list_size=64, short_size=16,
)  # fmt: skip
SLICED = PLAN._replace(scratch_bytes=1)
V = 200
ADAPTORS = {
    "neutral": Adaptor(),
    "top_p": Adaptor(temperature=0.7, top_p=0.9),
    "top_k": Adaptor(top_k=7, min_p=0.05),
    "typical": Adaptor(temperature=1.3, typical_p=0.8, eta_cutoff=1e-3, order="vllm"),
    "greedy": Adaptor(temperature=0.0),
    "chain": Adaptor(temperature=0.7, min_k=3.0, xtc_probability=1.0, xtc_threshold=0.02),
    "temperature last": Adaptor(temperature=1.5, top_h=0.7, order=("top_h", "temperature")),
    "knobs": Adaptor(temperature=torch.tensor([0.0, 1.0, 0.5]), top_k=torch.tensor([0, 3, 50])),
}


def assert_the_cpus(x, draft, adaptor, seeds, *, plan=PLAN, changes=AS_THEY_ARE, **options):
    """Both results of the same drafts; outputs begin as nonsense, so that all must be written."""
    lengths, positions = options.get("draft_lengths"), options.get("positions")
    y, by = options.get("draft_logits"), options.get("draft_adaptor", adaptor)
    drafts = (None, None) if y is None else (y.reshape(-1, x.shape[2]), by.packed)
    out = [*verification_outputs(x, draft)]
    for t in out:
        t.fill_(77)
    launch.verify(
        x.view(-1, x.shape[2]), adaptor.packed, adaptor.filter_code, draft, lengths, *drafts,
        by.filter_code, seeds, positions, x.shape[2], *changes, out, plan=plan,
    )  # fmt: skip
    if changes.ids is not None:
        options["edits"] = Edits.__new__(Edits)._fill(changes.ids, changes.offsets, changes.columns)
    wanted = verify(x, draft, adaptor, seeds=seeds, support=True, **options)
    *tensors, ids, ends = out
    full = tensors[3].view(-1) == x.shape[2]
    assert_same(Verified(*tensors, Support(ids, ends, full)), wanted)
    return wanted


@pytest.mark.parametrize("name", ADAPTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cpus_result(name, dtype):
    adaptor, n, k = ADAPTORS[name], 3, 2
    x = (torch.randn(n, k + 1, V) * 3).to(dtype)
    seeds, counted = torch.randint(2**62, (n,)), 0
    for near in (0.0, 0.5, 5.0):
        y = (x[:, :k].float() + torch.randn(n, k, V) * near).to(dtype)
        by = adaptor if near == 0 else Adaptor(temperature=0.9)
        draft = y.float().argmax(-1) if near else x[:, :k].float().argmax(-1)
        known = {"draft_logits": y, "draft_adaptor": by, "positions": torch.arange(n)}
        counted += int(assert_the_cpus(x, draft, adaptor, seeds, **known).accepted.sum())
        assert_the_cpus(x, draft, adaptor, seeds, draft_lengths=torch.tensor([2, 1, 0]))
    assert counted > 0


def test_bad_rows_of_either_side():
    x = torch.randn(4, 3, V)
    y = x[:, :2].clone()
    draft = x[:, :2].argmax(-1)
    x[0, 1, 3], x[1, 2, 3], y[2, 0, 3] = float("nan"), float("inf"), float("nan")
    options = {"draft_logits": y, "draft_adaptor": ADAPTORS["greedy"]}
    wanted = assert_the_cpus(x, draft, ADAPTORS["greedy"], torch.arange(4), **options)
    assert wanted.status.tolist() == [[0, 1, 0], [0, 0, 2], [5, 0, 0], [0, 0, 0]]


def test_slices_of_sequences_and_edited_rows():
    x, seeds = torch.randn(3, 3, V), torch.arange(3)
    y = x[:, :2] + torch.randn(3, 2, V)
    ids, offsets = torch.arange(0, V, 10).int().repeat(9), torch.arange(10) * 20
    columns = torch.stack([torch.randn(180), torch.ones(180), torch.zeros(180), torch.zeros(180)])
    changes = RowEdits(ids, offsets, columns)
    draft = y.argmax(-1)
    for plan in (PLAN, SLICED):
        for known in ({}, {"draft_logits": y}):
            assert_the_cpus(x, draft, ADAPTORS["knobs"], seeds, plan=plan, changes=changes, **known)


def test_the_coins_of_rows():
    """A row throws the coin of its own draw, whether the law of its draft is known or not."""
    x, seeds, positions = torch.randn(4, 3, V), torch.randint(2**62, (4,)), torch.arange(4)
    adaptor = Adaptor(xtc_probability=0.5, xtc_threshold=0.01, temperature=0.5)
    draft, by = x[:, :2].argmax(-1), Adaptor(top_p=0.9)
    known = {"draft_logits": x[:, :2].contiguous(), "draft_adaptor": by}
    for plan in (PLAN, SLICED):
        for given in ({}, known):
            assert_the_cpus(x, draft, adaptor, seeds, plan=plan, positions=positions, **given)


def test_nothing_to_verify():
    for n, k in ((0, 2), (2, 0)):
        x, draft = torch.randn(n, k + 1, V), torch.zeros(n, k).long()
        known = {"draft_logits": x[:, :k]}
        assert_the_cpus(x, draft, Adaptor(top_p=0.9), torch.arange(n), **known)
