"""Which latency table a budget has, and whether what it predicts can be checked."""

from __future__ import annotations

import warnings
from pathlib import Path

from prunegate.budget import ranks
from prunegate.budget.latency import LatencyTable
from prunegate.budget.stopwatch import Timer
from prunegate.budget.whole import Trial
from prunegate.errors import BudgetError
from prunegate.gated import GatedModel

__all__ = ["make_trial", "table_for"]


def table_for(gated: GatedModel, given: LatencyTable | str | Path | None) -> LatencyTable:
    """The table that a budget is given; without one, what the first process measures now.

    Raises:
        BudgetError: It is malformed, or of another device.
    """
    if given is None:
        table = _measured(gated)
    else:
        table = given if isinstance(given, LatencyTable) else LatencyTable.load(given)
    table.check(gated.logits.device)
    doubt = table.doubt(gated)
    if doubt is not None:
        warnings.warn(doubt, stacklevel=3)
    return table


def _measured(gated: GatedModel) -> LatencyTable:
    """Two processes never measure the same, and predictions that differ would let them choose different masks."""
    written = ""
    try:
        if ranks.is_first():
            written = LatencyTable.measure(gated).to_json()
    finally:  # the others wait, and must hear of a failure too
        text = ranks.text_from_first(written, gated.logits.device)
    if not text:
        raise BudgetError("the first process could not measure the model's operators; its own error says why")
    return LatencyTable.from_json(text, "what the first process measured")


def make_trial(gated: GatedModel, table: LatencyTable, check: bool | Timer,
               whole: int | None) -> tuple[Trial | None, str]:  # fmt: skip
    """What measures the final cut, or why nothing does.

    Args:
        gated: The gated model.
        table: Predicts its times.
        check: What the user passed as ``latency_check=``.
        whole: The dense model's time in picoseconds, of which a share is asked for; ``None`` if milliseconds are.

    Raises:
        BudgetError: ``check`` is neither a bool nor a timer, or a timer that gives no time.
    """
    if callable(check):
        return Trial(gated, table.device, check, whole), ""
    if not isinstance(check, bool):
        raise BudgetError(
            f"latency_check={check!r} was given; expected True, False, or a function timer(module, args, kwargs) that "
            "gives milliseconds of one call"
        )
    if not check:
        return None, "latency_check=False was given"
    if not table.of_this_engine:
        return None, ("the table holds another engine's times; pass that engine's timer of whole models as "
                      "latency_check= to have the final cut measured")  # fmt: skip
    return Trial(gated, table.device, None, whole), ""
