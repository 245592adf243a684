"""Lightning: a callback that holds the budget; the module knows nothing of pruning.

python recipes/trainers/with_lightning.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from digits import data, network, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunegate


class Pruning(lightning.Callback):
    """Searches for the whole of a ``fit``; afterwards ``slim`` is the smaller model.

    Args:
        attribute: Where the module keeps its network, which must be gated.
        **budget: What ``prunegate.Budget`` takes, but ``steps``.
    """

    def __init__(self, attribute: str = "net", **budget: Any) -> None:
        self.attribute = attribute
        self.options = budget
        self.budget: prunegate.Budget | None = None
        self.slim: nn.Module | None = None
        self._steps = 0

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The number of optimizer steps is known now."""
        gated = getattr(module, self.attribute)
        self.budget = prunegate.Budget(gated, steps=int(trainer.estimated_stepping_batches), **self.options)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any) -> None:
        """One step of the budget for each of the optimizer, also where gradients are accumulated."""
        assert self.budget is not None
        if trainer.global_step > self._steps and not self.budget.finished:
            self.budget.step()
        self._steps = trainer.global_step

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Settles and cuts."""
        assert self.budget is not None
        self.budget.finish()
        self.slim = self.budget.gated.export()


class Classifier(lightning.LightningModule):
    """Any module of the user's; its network is gated."""

    def __init__(self) -> None:
        super().__init__()
        self.net = prunegate.attach(network(), torch.zeros(1, 1, 8, 8))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer over everything: the budget keeps the gates' logits to itself."""
        return torch.optim.AdamW(self.net.parameters(), 3e-3)


def main(epochs: int = 12) -> tuple[float, float]:
    """Searches from scratch and tests; returns accuracy and share of the FLOPs."""
    lightning.seed_everything(0, verbose=False)
    train, test = data()
    pruning = Pruning(flops=0.5)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[pruning], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), train)
    assert pruning.slim is not None
    return report(pruning.slim, test)


if __name__ == "__main__":
    main()
