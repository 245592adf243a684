"""A plain loop: dense training, then the search, then an ordinary smaller model.

python recipes/trainers/plain.py
"""

from __future__ import annotations

import torch
from digits import data, network, report
from torch.nn.functional import cross_entropy

import prunegate


def main(epochs: int = 6) -> tuple[float, float]:
    """Trains, prunes and tests; returns accuracy and share of the FLOPs."""
    torch.manual_seed(0)
    train, test = data()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in train:
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    gated = prunegate.attach(model, torch.zeros(1, 1, 8, 8))
    budget = prunegate.Budget(gated, flops=0.5, steps=epochs * len(train))
    optimizer = torch.optim.AdamW(gated.parameters(), 3e-3)
    gated.train()
    for _ in range(epochs):
        for images, labels in train:
            loss = cross_entropy(gated(images), labels) + budget.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step()
    return report(gated.export(), test)


if __name__ == "__main__":
    main()
