"""The ``Trainer`` of Hugging Face transformers: a callback that holds the budget.

python recipes/trainers/with_transformers.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from digits import data, network, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

import prunegate


class Pruning(TrainerCallback):
    """Searches for the whole of ``train()``; afterwards ``slim`` is the smaller model.

    Args:
        gated: The gated network that the trained model runs.
        **budget: What ``prunegate.Budget`` takes, but ``steps``.
    """

    def __init__(self, gated: prunegate.GatedModel, **budget: Any) -> None:
        self.gated = gated
        self.options = budget
        self.budget: prunegate.Budget | None = None
        self.slim: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The number of optimizer steps is known now."""
        self.budget = prunegate.Budget(self.gated, steps=state.max_steps, **self.options)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called once for each step of the optimizer, also where gradients are accumulated."""
        assert self.budget is not None
        if not self.budget.finished:
            self.budget.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Settles and cuts."""
        assert self.budget is not None
        self.budget.finish()
        self.slim = self.gated.export()


class WithLoss(nn.Module):
    """What ``Trainer`` wants of a model: keyword arguments, and the loss first in what it returns."""

    def __init__(self, gated: prunegate.GatedModel) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and scores of a batch."""
        scores = self.gated(images)
        return {"loss": cross_entropy(scores, labels), "logits": scores}


def main(epochs: int = 12) -> tuple[float, float]:
    """Searches from scratch and tests; returns accuracy and share of the FLOPs."""
    torch.manual_seed(0)
    train, test = data()
    gated = prunegate.attach(network(), torch.zeros(1, 1, 8, 8))
    pruning = Pruning(gated, flops=0.5)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=3e-3, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant",
            remove_unused_columns=False,
        )  # fmt: skip

        def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            images, labels = zip(*samples, strict=True)
            return {"images": torch.stack(images), "labels": torch.stack(labels)}

        Trainer(WithLoss(gated), arguments, data_collator=collate, train_dataset=train.dataset,
                callbacks=[pruning]).train()  # fmt: skip
    assert pruning.slim is not None
    return report(pruning.slim, test)


if __name__ == "__main__":
    main()
