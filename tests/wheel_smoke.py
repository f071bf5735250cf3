"""Tries an installed wheel: what is in it, and one call of each kind, with no more than torch.

python tests/wheel_smoke.py
"""

import sys
from importlib.metadata import entry_points, files, version
from pathlib import PurePosixPath

import torch

import fastadapt
import fastadapt.reference
import fastadapt.sglang
from fastadapt import Adaptor, filter_logits, label_log_odds, linear_log_odds, sample

ENTRY_POINTS = {
    "console_scripts": "fastadapt._cli.main:main",
    "sglang.srt.plugins": "fastadapt.sglang:register",
}


def contents():
    """The package and its metadata; one extension; no sources in C++, tests or documents."""
    listed = [PurePosixPath(path.as_posix()) for path in files("fastadapt")]
    inside = [p for p in listed if p.parts[0] == "fastadapt" and p.suffix != ".pyc"]
    beside = {p.parts[0] for p in listed} - {"fastadapt", ".."}
    assert beside == {f"fastadapt-{version('fastadapt')}.dist-info"}, beside
    assert {p.name.removesuffix(".exe") for p in listed if p.parts[0] == ".."} <= {"fastadapt"}
    kinds = {p.suffix for p in inside}
    assert kinds - {".so", ".pyd"} == {".py", ".pyi", ".typed", ".jsonl"}, kinds
    extensions = [p.name for p in inside if p.suffix in (".so", ".pyd")]
    assert len(extensions) == 1 and extensions[0].startswith("_C."), extensions
    for group, value in ENTRY_POINTS.items():
        found = {point.value for point in entry_points(group=group, name="fastadapt")}
        assert found == {value}, (group, found)
    return len(inside)


def draws():
    """The compiled kernels draw the reference's tokens, under every instruction set there is."""
    logits = torch.randn(16, 5000) * 3
    adaptor = Adaptor(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01)
    seeds, positions = torch.arange(16), torch.arange(16) * 7
    expected = fastadapt.reference.sample(logits, adaptor, seeds=seeds, positions=positions)
    for name in fastadapt._C.cpu_capabilities():
        fastadapt._C.set_cpu_capability(name)
        drawn = sample(logits, adaptor, seeds=seeds, positions=positions)
        assert torch.equal(drawn.tokens, expected.tokens), name
        kept = filter_logits(logits, adaptor) > float("-inf")
        assert torch.equal(kept.sum(-1).int(), drawn.kept), name


def gradients():
    """Log-odds of labels, from logits and from hidden states, with the gradients of plain torch."""
    hidden = torch.randn(6, 32, requires_grad=True)
    weight = torch.randn(500, 32, requires_grad=True)
    labels = torch.randint(500, (6,))
    logits = hidden @ weight.T
    others = logits.masked_fill(torch.nn.functional.one_hot(labels, 500).bool(), -torch.inf)
    expected = logits.gather(1, labels[:, None])[:, 0] - others.logsumexp(-1)
    for got in (label_log_odds(logits, labels), linear_log_odds(hidden, weight, labels)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for x in (hidden, weight):
            slope = torch.autograd.grad(got.sum(), x, retain_graph=True)[0]
            wanted = torch.autograd.grad(expected.sum(), x, retain_graph=True)[0]
            torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-4)


def main():
    """Runs all of it."""
    torch.manual_seed(0)
    count = contents()
    draws()
    gradients()
    isas = ", ".join(fastadapt._C.cpu_capabilities())
    sys.stdout.write(
        f"fastadapt {fastadapt.__version__}, {count} files, kernels {isas}, torch "
        f"{torch.__version__}, Python {sys.version.split()[0]}: fine\n"
    )


if __name__ == "__main__":
    main()
