"""Where a run's numbers go besides ``summary.csv``: TensorBoard, wandb, mlflow, or anything with three methods.

python recipes/prune.py ... --log tensorboard
python recipes/prune.py ... --log wandb mlflow
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["LOGGERS", "Logger", "TensorBoard", "create_loggers", "log_row"]


class Logger(Protocol):
    """What a logger must do."""

    def start(self, arguments: Mapping[str, Any], folder: Path) -> None:
        """Called once, before the first numbers, with the run's arguments and output folder."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Called after every epoch with numbers by name."""

    def finish(self) -> None:
        """Called once, at the end."""


class TensorBoard:
    """Scalars in the run's folder; needs the package ``tensorboard``."""

    def start(self, arguments: Mapping[str, Any], folder: Path) -> None:
        """Opens the file of events."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("arguments", "\n".join(f"    {k}: {v}" for k, v in sorted(arguments.items())))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes numbers, grouped by what stands before the first underscore."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace("_", "/", 1), value, step)

    def finish(self) -> None:
        """Closes the file."""
        self._writer.close()


class Wandb:
    """Weights & Biases; needs the package ``wandb``."""

    def start(self, arguments: Mapping[str, Any], folder: Path) -> None:
        """Begins a run named after the folder."""
        import wandb

        self._run = wandb.init(project="prunegate", name=folder.name, dir=str(folder), config=dict(arguments))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers."""
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """Ends the run."""
        self._run.finish()


class MLflow:
    """MLflow; needs the package ``mlflow``."""

    def start(self, arguments: Mapping[str, Any], folder: Path) -> None:
        """Begins a run named after the folder."""
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=folder.name)
        mlflow.log_params({name: str(value)[:250] for name, value in arguments.items()})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers."""
        self._mlflow.log_metrics(dict(values), step=step)

    def finish(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
"""By the names that ``--log`` takes."""


def create_loggers(names: Sequence[str], arguments: Mapping[str, Any], folder: Path) -> list[Logger]:
    """Starts the loggers that are asked for.

    Raises:
        SystemExit: One is not known, or its package is not installed.
    """
    loggers = []
    for name in names:
        if name not in LOGGERS:
            raise SystemExit(f"--log {name} was given; expected some of {', '.join(LOGGERS)}")
        logger = LOGGERS[name]()
        try:
            logger.start(arguments, folder)
        except ImportError as error:
            raise SystemExit(f"--log {name} needs a package that is not here ({error}); pip install {name}") from error
        loggers.append(logger)
    return loggers


def log_row(loggers: Sequence[Logger], row: Mapping[str, Any]) -> None:
    """Passes the numbers of one epoch on; text and what has no value stay out."""
    values = {name: float(value) for name, value in row.items()
              if isinstance(value, int | float) and not isinstance(value, bool) and name != "epoch"}  # fmt: skip
    for logger in loggers:
        logger.scalars(values, int(row["epoch"]))
