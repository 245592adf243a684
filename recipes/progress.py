"""What a run says while it works: progress bars, a line for every epoch, and summary.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from loggers import Logger, log_row
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["COLUMNS", "RunLog", "compact"]

COLUMNS = (
    "epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr",
    "phase", "train_top1", "tau", "noise", "expected_flops", "target_flops",
)  # fmt: skip
"""timm's columns, then ours. ``epoch`` counts through all phases; gates have no values outside of the search."""

Item = TypeVar("Item")


def compact(number: float) -> str:
    """A count in three or four digits: ``1.82G``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


class RunLog:
    """The record of a run, on screen and in a file. Only the first process writes; in others all of it is silent.

    Args:
        folder: Where ``summary.csv`` goes.
        primary: Whether this process is the one that writes.

    Attributes:
        rows: One dict of :data:`COLUMNS` for every epoch.
        loggers: Where the numbers of every epoch go besides.
    """

    def __init__(self, folder: Path, primary: bool = True) -> None:
        self.console = Console(quiet=not primary)
        self.rows: list[dict[str, Any]] = []
        self.loggers: list[Logger] = []
        self._path = folder / "summary.csv" if primary else None

    def batches(self, items: Iterable[Item], total: int, title: str, state: dict[str, float]) -> Iterator[Item]:
        """Goes through ``items`` beside a bar that shows ``state``, which the caller keeps up to date.

        Args:
            items: What to go through.
            total: How many there are.
            title: Text before the bar.
            state: Numbers to show; names that end in ``flops`` are shown compactly.
        """
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(),
                   TextColumn("{task.fields[state]}"), TimeRemainingColumn())  # fmt: skip
        # The bar goes when the epoch is over: its line in the record says the same.
        hidden = not self.console.is_terminal  # a file gets the epochs' lines only
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            bar = progress.add_task(title, total=total, state="")
            for item in items:
                yield item
                progress.update(bar, advance=1, state=_describe(state))

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Goes on behind the epochs of a saved run; what the file has beyond them is dropped."""
        self.rows = [{name: row.get(name, "") for name in COLUMNS} for row in rows]
        if self._path is not None:
            with self._path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)

    def epoch(self, **values: Any) -> None:
        """Records one epoch: any of :data:`COLUMNS` but ``epoch``, which is counted here."""
        row = {name: values.get(name, "") for name in COLUMNS} | {"epoch": len(self.rows)}
        self.rows.append(row)
        log_row(self.loggers, row)
        shown = {name: row[name] for name in COLUMNS if isinstance(row[name], float | int) and name != "epoch"}
        self.say(f"{row['phase']:<8} epoch {row['epoch']:<3} {_describe(shown)}")
        if self._path is not None:
            with self._path.open("w" if len(self.rows) == 1 else "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if len(self.rows) == 1:
                    writer.writeheader()
                writer.writerow(row)

    def say(self, *what: Any) -> None:
        """Prints text or anything that rich can draw."""
        self.console.print(*what, highlight=False, soft_wrap=True)


def _describe(state: dict[str, float]) -> str:
    def show(name: str, value: float) -> str:
        if name.endswith("flops"):
            return compact(value)
        return f"{value:.2f}%" if "top" in name else f"{value:.3g}"

    return "  ".join(f"{name.replace('_', ' ')} {show(name, value)}" for name, value in state.items())
