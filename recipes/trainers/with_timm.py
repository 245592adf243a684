"""The training script of timm with three lines added: attach, a budget that steps with the optimizer, and the export.

    python recipes/trainers/with_timm.py pytorch-image-models/train.py --flops 0.5 -- DATA --model resnet50 --epochs 30

What is added to its ``main()``, and nothing else (``--show`` prints the result, to be pasted or kept as a file):

1. after ``model = create_model(...)``:
   ``import prunegate; model = gated = prunegate.attach(model)``
2. before the loop over epochs, where ``model`` may have been compiled, wrapped or taken into a task:
   ``budget = prunegate.Budget(gated, flops=0.5, steps=...); optimizer.register_step_post_hook(...)``
3. after it:
   ``budget.finish(); prunegate.save(gated.export(), ".../slim.safetensors")``

The script has to have the names that timm's has: ``optimizer``, ``start_epoch``, ``num_epochs``, ``updates_per_epoch``
and ``output_dir`` (``None`` on all ranks but one).

Checkpoints of the run are of the gated model; the slim one is ``slim.safetensors`` in its output folder. Averages of
weights (``--model-ema``) are of no use in a search: each step has another mask.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

__all__ = ["main", "with_pruning"]

_BUDGET = (
    "budget = prunegate.Budget(gated, {options}, "
    "steps=max(1, (num_epochs - start_epoch) * updates_per_epoch)); "
    "optimizer.register_step_post_hook(lambda *_: budget.finished or budget.step())"
)
_SAVE = (
    "budget.finish(); output_dir is None or "
    "prunegate.save(gated.export(), os.path.join(output_dir, 'slim.safetensors'))"
)


def with_pruning(source: str, options: str) -> str:
    """The script's source with the three lines.

    Args:
        source: Of timm's ``train.py``.
        options: Arguments of the budget, as source: ``"flops=0.5"``.

    Raises:
        SystemExit: The script has no ``main()`` that creates a model and loops over epochs.
    """
    tree = ast.parse(source)
    main = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"), None)
    body = main.body if main else []
    made = [node for node in body if isinstance(node, ast.Assign) and "create_model(" in ast.unparse(node)
            and ast.unparse(node.targets[0]) == "model"]  # fmt: skip
    loops = [node for node in body if any(isinstance(inner, ast.For) and "start_epoch" in ast.unparse(inner.iter)
                                          for inner in ast.walk(node))]  # fmt: skip
    if not made or not loops:
        raise SystemExit("this script has no main() with `model = create_model(...)` and a loop over epochs")
    lines = source.splitlines()
    additions = [
        (made[0].end_lineno, "import prunegate; model = gated = prunegate.attach(model)"),
        (loops[0].lineno - 1, _BUDGET.format(options=options)),
        (loops[0].end_lineno, _SAVE),
    ]
    for number, line in reversed(additions):
        lines.insert(number, " " * made[0].col_offset + line)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the script with the lines added, or shows it."""
    own, script = sys.argv[1:], []
    if "--" in own:
        own, script = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="timm's train.py")
    parser.add_argument("--flops", type=float, help="budget: share of the dense FLOPs")
    parser.add_argument("--params", type=float, help="budget: share of the dense parameters")
    parser.add_argument("--show", action="store_true", help="print the script instead of running it")
    args = parser.parse_args(own)
    budget = {name: getattr(args, name) for name in ("flops", "params") if getattr(args, name) is not None}
    options = ", ".join(f"{name}={value!r}" for name, value in (budget or {"flops": 0.5}).items())
    source = with_pruning(Path(args.script).read_text(), options)
    if args.show:
        print(source, end="")
        return
    sys.argv = [args.script, *script]
    sys.path.insert(0, str(Path(args.script).resolve().parent))
    exec(compile(source, args.script, "exec"), {"__name__": "__main__", "__file__": args.script})


if __name__ == "__main__":
    main()
