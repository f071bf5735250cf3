"""What is read of the GPU's code without a GPU: launches, specialisations, demands, comparisons.

Under pytest Triton interprets kernels, so what is launched is recorded in a process of its own.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

import gpu_static_check
import host
import statements
from fastadapt import label_log_odds

pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6, which is for Linux")

import gpu_model  # noqa: E402  (these need triton)
import machine_code  # noqa: E402

TOY = """
import json
import torch
import triton
import triton.language as tl
from no_gpu import compiled, recorded

@triton.jit
def toy_kernel(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, at < n) * 2.0, at < n)

def launch(x, n, block=128):
    toy_kernel[(n + 1, 2)](x, n, BLOCK=block, num_warps=2)

x = torch.empty(64)
with recorded(90) as got:
    for n in (1, 2, 3, 16, 32):  # of three classes: 1, multiples of 16, others
        launch(x, n)
    launch(x[1:], 3)  # of another alignment
    launch(x, 3, 64)
    torch.empty(2).add_(1)
with recorded(80) as other:
    launch(x, 3)
with recorded(90) as again:
    launch(x, 3)
"""
TOLD = """
from cases import GPU_ADAPTORS
from fastadapt._ops.triton.launch import compile_draws
from gpu_calls import DTYPES, OUTPUTS, draw
from gpu_static import BATCHES, PER_ROW, VOCABULARIES, _adaptor, calls_of, specialisations
from machine_code import code_of, demand_of

limited = [50_257], ["float32"], ["all outputs"], ["T+p"]
some, every = (
    specialisations(limited[0], batches, *limited[1:]) for batches in (BATCHES, range(1, 513))
)
warm, dtypes = [], [torch.float32, torch.bfloat16]
with recorded(100) as warmed:
    warm.append(compile_draws(torch.device("cpu"), 50_257, dtypes, 20, 2))
    warm.append(compile_draws(torch.device("cpu"), 50_257, dtypes, 20, 2))
with recorded(100) as after:
    for dtype in dtypes:
        rows = torch.empty(max(BATCHES), 50_257, dtype=dtype)
        for n in BATCHES:
            for name in (*GPU_ADAPTORS, PER_ROW):
                for asked in OUTPUTS.values():
                    draw(rows[:n], _adaptor(name, n), {**asked, "top_logprobs": 20})
                draw(rows[:n], _adaptor(name, n), {})
                draw(rows[:n], _adaptor(name, n), {}, torch.arange(n + 1)[1:])
    met = len(after.compiled)
    draw(torch.empty(2, 128_256), GPU_ADAPTORS["T"], {})
binary = compiled(got.launches[1].source)
early = {}
for target in (80, 90, 100):
    with recorded(target) as drawn:
        draw(torch.empty(2, 50_257), GPU_ADAPTORS["T+k+p"], {})
    sources = [x.source for x in drawn.launches]
    early[target] = [
        [bool(x.options["launch_pdl"]) for x in sources],
        ["griddepcontrol" in compiled(x).asm["ptx"] for x in sources[:1]],
    ]
print(json.dumps({
    "grids": [x.grid for x in got.launches],
    "keys": len({x.key for x in got.launches}),
    "operators": sum(got.operators.values()),
    "targets": [x.launches[0].source.target for x in (other, again)],
    "options": [x.launches[0].source.options["arch"] for x in (other, again)],
    "early": early,
    "warps": got.launches[0].source.options["num_warps"],
    "demand": demand_of(binary, code_of(binary.asm["cubin"]), 4)._asdict(),
    "some": some,
    "every": every,
    "warm": warm,
    "warmed": [x.kernel for x in warmed.compiled],
    "warmed_launches": len(warmed.launches),
    "after": [met, len(after.compiled)],
    "vocabularies": specialisations(VOCABULARIES, (1, 64), ["float32"]),
    "calls": calls_of(64, 128_256),
}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the script tells."""
    folder = tmp_path_factory.mktemp("no_gpu")
    (folder / "script.py").write_text(TOY + TOLD)
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    # after the benchmarks the paths of this process, which may say which package is tested
    paths = filter(None, (str(host.ROOT / "benchmarks"), os.environ.get("PYTHONPATH")))
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(folder)}
    run = [sys.executable, str(folder / "script.py")]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TOY_KERNEL = "90 toy_kernel float32"
RECORD = {
    "triton": "3.9.0",
    "settings": {"targets": [90], "scope": "usual"},
    "kernels": [
        {
            **{"target": 90, "kernel": "toy_kernel", "variant": "float32", "registers": 40},
            **{"stack": 0, "barriers": 2, "instructions": 1000},
        }
    ],
    "specialisations": [
        {
            "vocabulary": 9,
            "dtype": "a",
            "outputs": "b",
            "adaptor": "c",
            "kernels": {"toy_kernel": 3},
        }
    ],
    "calls": [
        {
            **{"batch": 1, "vocabulary": 9, "outputs": "b", "adaptor": "c", "launches": 2},
            **{"tensors": 4, "aten_calls": 5, "kernels": {"toy_kernel": 2}},
        }
    ],
}


@pytest.mark.parametrize(
    ("part", "field", "value", "line"),
    [
        ("kernels", "registers", 41, f"{TOY_KERNEL}: registers 40 before, 41 now"),
        ("kernels", "barriers", 3, f"{TOY_KERNEL}: barriers 2 before, 3 now"),
        (
            "kernels",
            "instructions",
            1031,
            f"{TOY_KERNEL}: instructions 1000 before, 1031 now",
        ),
        (
            "kernels",
            "instructions",
            969,
            f"{TOY_KERNEL}: instructions 1000 before, 969 now",
        ),
        ("kernels", "instructions", 1030, None),
        ("calls", "launches", 3, "1 9 b c: launches 2 before, 3 now"),
        ("calls", "aten_calls", 6, None),
        (
            "specialisations",
            "kernels",
            {"toy_kernel": 4},
            "9 a b c: kernels {'toy_kernel': 3} before, {'toy_kernel': 4} now",
        ),
    ],
)
def test_altered_numbers_are_found(part, field, value, line):
    now = copy.deepcopy(RECORD)
    now[part][0][field] = value
    expected = [f"{part}, {line}"] if line else []
    assert list(gpu_static_check.differences(RECORD, now)) == expected
    assert list(gpu_static_check.differences(RECORD, RECORD)) == []


def test_missing_and_new_kernels_are_found():
    now = copy.deepcopy(RECORD)
    now["kernels"][0]["kernel"] = "new_kernel"
    assert list(gpu_static_check.differences(RECORD, now)) == [
        "kernels, 90 toy_kernel float32: in the record, not there now",
        "kernels, 90 new_kernel float32: not in the record, there now",
    ]


def test_files_that_are_no_record_are_refused(tmp_path):
    path = tmp_path / "record.json"
    for text in (None, "# not JSON", "[]", '{"kernels": []}'):
        if text is not None:
            path.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match="check: expected a record of gpu_static.py"):
            gpu_static_check.read_record(path)
    path.write_text(json.dumps(RECORD), encoding="utf-8")
    assert gpu_static_check.read_record(path) == RECORD


@pytest.mark.parametrize(("name", "other"), [("triton", "3.6.0"), ("settings", {"targets": [80]})])
def test_records_of_another_version_are_refused(name, other):
    gpu_static_check.refuse_another(RECORD, RECORD)
    with pytest.raises(SystemExit, match=f"{name}: expected .* as in the record, got "):
        gpu_static_check.refuse_another(RECORD, {**RECORD, name: other})


def test_demands_that_must_not_be_are_told():
    """Fused float64 is that of CUDA's own functions, where arithmetic is not specified."""
    good = machine_code.Demand(40, 0, 0, 163 * 1024, 0, 3)
    assert list(good.complaints(80, exact=False)) == []
    assert list(good.complaints(80, exact=True)) == ["3 fused multiply-adds, expected none"]
    bad = good._replace(stack=8, spills=2, shared=163 * 1024 + 1, fused=1, fused_double=0)
    assert list(bad.complaints(80, exact=True)) == [
        "stack 8, expected none",
        "spills 2, expected none",
        "shared 166913, expected at most 166912",
        "1 fused multiply-adds, expected none",
    ]


LISTING = """
.text.toy_kernel:
\t//## File "a.py", line 3 inlined at "b.py", line 9
\t//## File "b.py", line 9
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.64 R8, desc[UR4][R2.64+0x800] ;
\t//## File "b.py", line 10
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
        /*0070*/                   NOP;
"""


def test_listings_are_read(monkeypatch):
    monkeypatch.setattr(machine_code, "_tool", lambda *_: LISTING)
    code = machine_code.code_of(b"")
    assert [x.name for x in code.instructions] == "LDC LDG LDG BAR BRA EXIT BRA".split()
    assert code.instructions[2].places == (("a.py", 3), ("b.py", 9))
    assert code.instructions[3].places == (("b.py", 10),)
    assert code.loops() == [range(1, 5)]
    assert machine_code._per_logit(code, 4) == round(4 / 6, 2)


def test_launches_and_specialisations_of_a_kernel(told):
    assert told["grids"] == [[n + 1, 2, 1] for n in (1, 2, 3, 16, 32, 3, 3)]
    assert told["keys"] == 3 + 1 + 1 and told["warps"] == 2
    assert told["operators"] == 3  # a slice, an empty tensor, a sum
    assert told["targets"] == [80, 90] and told["options"] == ["sm80", "sm90"]


def test_a_kernel_is_compiled_and_read(told):
    demand = told["demand"]
    assert demand["instructions"] > 10 and demand["registers"] > 4 and demand["shared"] == 0
    assert demand["stack"] == demand["local"] == demand["spills"] == demand["fused"] == 0


def test_kernels_are_compiled_as_they_are_launched(told):
    """Programs begin while the kernel before ends where the GPU can do that."""
    for target, (launched, waits) in told["early"].items():
        assert set(launched) == set(waits) == {int(target) >= 90}


def test_batches_cover_all_specialisations(told):
    """Those that are counted for the record meet what 1 to 512 rows meet."""
    assert told["some"] == told["every"] and len(told["some"]) == 3


def test_a_server_meets_few_specialisations_and_few_calls_of_pytorch(told):
    """12 with one vocabulary and dtype; of a kernel one for each size to which V is padded."""
    cells, calls = told["vocabularies"], told["calls"]
    assert list(gpu_static_check.too_many({"specialisations": cells, "calls": calls})) == []
    servers = [x for x in cells if x["adaptor"] == gpu_static_check.ALL]
    assert [sum(x["kernels"].values()) for x in servers] == [12] * 4
    assert {x["outputs"]: x["aten_calls"] for x in calls} == {
        **{"no outputs": 5, "base_logprobs": 6, "log_mass": 6, "all outputs": 7},
        **{"no outputs and top 20": 8, "base_logprobs and top 20": 9, "all outputs and top 20": 10},
        "no outputs, edits": 6,
    }
    over = [{**servers[0], "kernels": {"a": 4, "b": 9}}]
    over.append({**over[0], "vocabulary": gpu_static_check.ALL, "adaptor": "T"})
    found = gpu_static_check.too_many(
        {"specialisations": over, "calls": [{**calls[0], "aten_calls": 6}]}
    )
    assert [line.partition(": ")[2] for line in found] == [
        "13 specialisations, expected at most 12",
        "4 of a, expected at most 3",
        "9 of b, expected at most 3",
        "6 aten calls, expected at most 5",
    ]


def test_nothing_is_compiled_after_a_warm_up(told):
    """By any batch, adaptor, outputs and alignment of seeds; another vocabulary compiles."""
    assert told["warm"] == [2 * 14] * 2 == [len(told["warmed"])] * 2
    assert told["warmed_launches"] == 0
    assert told["warmed"].count("short_kernel") == 4 and told["warmed"].count("top_kernel") == 2
    met, with_another = told["after"]
    assert met == 0 and with_another > 0


def test_blocks_of_code_run_as_often_as_their_statements(monkeypatch):
    folder = statements.FOLDER
    first, second = (next(iter(sorted(folder.glob(name)))).name for name in ("rows.py", "scan.py"))
    listing = LISTING.replace("a.py", str(folder / first)).replace("b.py", str(folder / second))
    monkeypatch.setattr(machine_code, "_tool", lambda *_: listing)
    blocks = gpu_model.blocks_of(machine_code.code_of(b""))
    assert [block.instructions for block in blocks] == [1, 4, 1, 1]
    assert blocks[1].latency > gpu_model.LATENCIES["LDG"]
    (inner,), (both, outer) = blocks[0].stacks, blocks[1].stacks
    assert inner == both and inner.endswith(f" {second}:9") and inner.startswith(first)
    assert blocks[1].stacks == {both: 2, outer: 2}
    assert gpu_model.executed(blocks[1], {both: 8.0, outer: 4.0}) == 6
    assert gpu_model.executed(blocks[1], {}) == 0
    demand = machine_code.Demand(32, 0, 0, 0, 0, 0)
    kernel = gpu_model.Kernel([gpu_model.Block(280, 1700, {inner: 280})], demand, 4)
    time = gpu_model.time_of(kernel, 132 * 16 + 1, 3e6, {inner: 10.0}, {inner: 20.0})
    assert time.bytes == pytest.approx(1) and time.latency == pytest.approx(20)
    assert time.issue == pytest.approx(2 * 2800 * 16 * 4 / (4 * 0.7) / 1700)


def test_statements_of_the_kernels_are_known():
    for path in statements.FOLDER.glob("*.py"):
        known = statements.statements_of(path.name)
        lines = path.read_text(encoding="utf-8").splitlines()
        assert all(lines[line - 1].lstrip().startswith("def ") for line in known.functions)
        for line, loops in known.unrolled.items():
            assert all(head < line and head < body for head, body in loops)
            assert all("static_range" in lines[head - 1] for head, _ in loops)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU")
def test_interpreted_statements_are_counted():
    import gpu_trace

    labels = torch.zeros(3, dtype=torch.int64)
    row = torch.randn(1, 5000)
    launches = gpu_trace.trace(lambda rows: label_log_odds(rows, labels), row, 3)
    assert launches[0]["grid"] == [3, 2] and launches[0]["logit_bytes"] == row.nbytes
    for launch in launches:
        assert launch["mean"] and set(launch["mean"]) >= set(launch["longest"])
        assert all(number > 0 for number in launch["mean"].values())
