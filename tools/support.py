"""The README's table of what is supported, made from the numbers of a sweep.

``python tools/coverage.py --readme README.md --from runs/coverage/coverage.json`` writes it between two marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

__all__ = ["Support", "parse", "rewrite", "table"]

BEGIN = "<!-- support: made by tools/coverage.py, do not edit -->"
END = "<!-- support ends -->"
_COLUMNS = (
    "models", "equal, costs exact", "of", "95% of parameters prunable", "least prunable",
    "half-mask leaves under half of the FLOPs", "compute in float32 inside",
)  # fmt: skip


@dataclass(frozen=True)
class Support:
    """One package's line.

    Attributes:
        models: Which models, with the package's version.
        passed: How many are equal, with exact costs.
        total: How many were tried.
        prunable: How many have at least 95% of their parameters prunable on at least one side.
        least: The least share of prunable parameters, in percent.
        halved: Of how many a random half-mask leaves under half of the FLOPs.
        single: How many compute something in float32 whatever their weights are in, and agree to less.
    """

    models: str
    passed: int
    total: int
    prunable: int
    least: int
    halved: int
    single: int

    @classmethod
    def of(cls, models: str, rows: Sequence[Mapping[str, Any]], passed: int) -> Support:
        """Sums up the rows of a ``coverage.json`` of one package.

        Args:
            models: What to call them.
            rows: The rows.
            passed: How many of them pass, as the sweep judges.
        """
        return cls(
            models,
            passed,
            len(rows),
            sum(row["prunable"] >= 0.95 for row in rows),
            int(100 * min(row["prunable"] for row in rows)),
            sum(row["flops_left"] < 0.5 for row in rows),
            sum(row["precision"] == "float32" for row in rows),
        )


def table(lines: Sequence[Support]) -> str:
    """The table in Markdown."""
    head = ["| " + " | ".join(_COLUMNS) + " |", "|---|" + "--:|" * (len(_COLUMNS) - 1)]
    body = [
        f"| {each.models} | {each.passed} | {each.total} | {each.prunable} | {each.least}% | {each.halved} | "
        f"{each.single} |"
        for each in lines
    ]
    return "\n".join([*head, *body])


def parse(text: str) -> list[Support]:
    """The numbers of a table that :func:`table` made."""
    lines = []
    for line in text.strip().splitlines()[2:]:
        models, *numbers = (cell.strip().rstrip("%") for cell in line.strip("|").split(" | "))
        lines.append(Support(models, *map(int, numbers)))
    assert all(len(astuple(line)) == len(_COLUMNS) for line in lines)
    return lines


def section(text: str) -> str:
    """What stands between the marks.

    Raises:
        ValueError: The marks are missing.
    """
    found = re.search(re.escape(BEGIN) + r"\n(.*?)\n" + re.escape(END), text, re.DOTALL)
    if found is None:
        raise ValueError(f"the text has no section between the lines {BEGIN!r} and {END!r}; add the two lines")
    return found[1]


def rewrite(text: str, lines: Sequence[Support]) -> str:
    """The text with a new table between the marks.

    Raises:
        ValueError: The marks are missing.
    """
    return text.replace(f"{BEGIN}\n{section(text)}\n{END}", f"{BEGIN}\n{table(lines)}\n{END}")
