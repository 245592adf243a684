"""Hugging Face ``accelerate``: the plain loop under ``prepare``; the budget belongs to the model inside the wrapper.

accelerate launch recipes/trainers/with_accelerate.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from digits import data, network, report
from torch.nn.functional import cross_entropy

import prunegate


def main(epochs: int = 12) -> tuple[float, float]:
    """Searches from scratch and tests; returns accuracy and share of the FLOPs."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    train, test = data()
    gated = prunegate.attach(network(), torch.zeros(1, 1, 8, 8))
    optimizer = torch.optim.AdamW(gated.parameters(), 3e-3)
    model, optimizer, train = accelerator.prepare(gated, optimizer, train)
    # After prepare: the model is on its device, and len(train) is what this process sees.
    budget = prunegate.Budget(accelerator.unwrap_model(model), flops=0.5, steps=epochs * len(train))
    model.train()
    for _ in range(epochs):
        for images, labels in train:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images), labels) + budget.loss()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:  # one step of the budget for each of the optimizer
                budget.step()
    return report(accelerator.unwrap_model(model).export(), test)


if __name__ == "__main__":
    main()
