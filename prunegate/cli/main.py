"""The command line, from arguments to exit codes.

0: done. 1: it could not be done, with one line that says why. 2: the arguments make no sense (argparse).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from prunegate.errors import PruneGateError

__all__ = ["main"]

_COMMANDS = {
    "inspect": ("inspecting", "show what can be pruned, what cannot and why, and what each part costs",
                "prunegate inspect MODEL\n  prunegate inspect MODEL --depth 3 --json"),
    "prune": ("pruning", "cut a trained model to a budget by a score, without training",
              "prunegate prune MODEL --pretrained --flops 0.7 --data pictures/ --refit --out slim.safetensors\n"
              "  prunegate prune MODEL --checkpoint mine.pth --num-classes 10 --params 0.5 --hub FOLDER"),
    "export": ("exporting", "write a model as ONNX, torch.export or int8, and run what was written",
               "prunegate export slim.safetensors --to onnx pt2 --check --bench\n"
               "  prunegate export slim.safetensors --to int8 --data pictures/"),
    "bench": ("timing", "time a slim model beside the dense one that it was cut from",
              "prunegate bench slim.safetensors --batch 1 32\n  prunegate bench slim.safetensors --threads 4 --json"),
    "report": ("reporting", "write one self-contained HTML page about a run of the recipe",
               "prunegate report runs/demo\n  prunegate report runs/demo --out page.html"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments without the program's name; ``None`` takes the process's own.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # Only the module of the command that runs is imported: --help and --version must not wait for torch.
    chosen = next((word for word in given if word in _COMMANDS), None)
    parser = _parser(chosen)
    args = parser.parse_args(given)
    from rich.console import Console

    console = Console()
    try:
        found = args.run(args, console)
    except (PruneGateError, FileNotFoundError) as error:
        if args.json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        else:
            print(f"prunegate {args.command}: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found, indent=2))
    return 0


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    examples = "\n".join(f"  {example}" for _, _, example in _COMMANDS.values())
    parser = argparse.ArgumentParser(
        prog="prunegate", description="Prunes PyTorch networks to a budget.",
        epilog=f"examples:\n{examples}\n\nexit codes: 0 done, 1 could not be done, 2 arguments make no sense",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what, example) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"examples:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if name == chosen:
            code: Any = importlib.import_module(f"prunegate.cli.{module}")
            code.add_arguments(command)
            command.add_argument("--json", action="store_true", help="print JSON instead of text")
            command.set_defaults(run=code.run)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"prunegate {version('prunegate')}"
    except PackageNotFoundError:
        return "prunegate (not installed)"
