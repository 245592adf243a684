"""Numbers arrive at loggers, and in TensorBoard's files."""

from __future__ import annotations

from pathlib import Path

import loggers
import pytest


def test_numbers_arrive_and_text_does_not() -> None:
    seen = []

    class Mine:
        def start(self, arguments: dict, folder: Path) -> None: ...

        def scalars(self, values: dict, step: int) -> None:
            seen.append((values, step))

        def finish(self) -> None: ...

    loggers.log_row([Mine()], {"epoch": 3, "phase": "search", "train_loss": 0.5, "tau": "", "lr": 1})
    assert seen == [({"train_loss": 0.5, "lr": 1.0}, 3)]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (logger,) = loggers.create_loggers(["tensorboard"], {"model": "resnet18"}, tmp_path)
    for epoch in range(3):
        loggers.log_row([logger], {"epoch": epoch, "eval_top1": 10.0 * epoch})
    logger.finish()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/top1")] == [(0, 0.0), (1, 10.0), (2, 20.0)]


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected some of tensorboard"):
        loggers.create_loggers(["paper"], {}, tmp_path)
