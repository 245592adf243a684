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


def three_epochs(name: str, folder: Path) -> loggers.Logger:
    """What a run logs, up to its end."""
    (logger,) = loggers.create_loggers([name], {"model": "resnet18", "lr": 0.1}, folder)
    for epoch in range(3):
        loggers.log_row([logger], {"epoch": epoch, "phase": "search", "eval_top1": 10.0 * epoch})
    return logger


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = three_epochs("wandb", tmp_path)
    run = logger._run
    # The last step is on its way; the ones before it have arrived.
    assert (run.summary["eval_top1"] in (10.0, 20.0), run.config["model"]) == (True, "resnet18")
    logger.finish()
    assert [path.stat().st_size > 0 for path in tmp_path.rglob("*.wandb")] == [True]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_gives_back_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'runs.db'}")
    three_epochs("mlflow", tmp_path).finish()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.data.params == {"model": "resnet18", "lr": "0.1"}
    history = client.get_metric_history(run.info.run_id, "eval_top1")
    assert [(each.step, each.value) for each in history] == [(0, 0.0), (1, 10.0), (2, 20.0)]


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected some of tensorboard"):
        loggers.create_loggers(["paper"], {}, tmp_path)
