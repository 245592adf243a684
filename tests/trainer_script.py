"""A training script of the shape that timm's has, for the test that adds pruning to it."""

import os
import sys

import torch
from timm import create_model


def main() -> None:
    torch.manual_seed(0)
    output_dir, model_name = sys.argv[1:]
    model = create_model(
        model_name,
        num_classes=3,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader_train = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1])) for _ in range(4)]
    updates_per_epoch = len(loader_train)
    start_epoch, num_epochs = 0, 3
    os.makedirs(output_dir, exist_ok=True)
    try:
        for _epoch in range(start_epoch, num_epochs):
            for images, labels in loader_train[:updates_per_epoch]:
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    except KeyboardInterrupt:
        pass
    print("done")


if __name__ == "__main__":
    main()
