"""The tables behind ``tools/inspect.py``: gate groups, what is frozen and why, and what each part costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prunegate.cli.inspecting import describe
from prunegate.cli.main import main as command

__all__ = ["describe", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Does what ``prunegate inspect`` does.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.
    """
    code = command(["inspect", *(sys.argv[1:] if argv is None else argv)])
    if code:
        raise SystemExit(code)
