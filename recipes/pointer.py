"""Hard attention with a categorical gate: a network learns to look at one place of a sequence, and at the right one.

    python recipes/pointer.py --length 12 --steps 400

Each sequence holds keys and values; the query names one key, and the target is that key's value. The network may read
one value only: the gate turns its scores into a one-hot pointer, in training too, and the straight-through gradient of
what it read tells the scores where to look instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegate


class Pointer(nn.Module):
    """Reads the one value whose key matches a query.

    Args:
        n_keys: Number of different keys.
        width: Width of the embeddings.
    """

    def __init__(self, n_keys: int, width: int = 32) -> None:
        super().__init__()
        self.keys = nn.Embedding(n_keys, width)
        self.queries = nn.Embedding(n_keys, width)
        self.gate = prunegate.Gate()

    def scores(self, keys: Tensor, query: Tensor) -> Tensor:
        """How well each place fits, ``[N, length]``, from int64 ``[N, length]`` and ``[N]``."""
        return torch.einsum("nlw,nw->nl", self.keys(keys), self.queries(query)) / self.keys.embedding_dim**0.5

    def forward(self, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        """What was read, ``[N, classes]``; ``values`` is ``[N, length, classes]``."""
        return torch.einsum("nl,nlc->nc", self.gate(self.scores(keys, query)), values)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains the pointer.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.

    Returns:
        ``right``: share of new sequences where the pointer stands on the right place; ``entropy``: mean entropy of
        where to look, in nats; ``chance``: the share that guessing would reach.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--keys", type=int, default=24, help="number of different keys")
    parser.add_argument("--classes", type=int, default=8, help="number of different values")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--tau", type=float, default=1.0)
    parser.add_argument("--estimator", default="st", choices=("st", "reinmax"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    model = Pointer(args.keys)
    model.gate.tau, model.gate.estimator = args.tau, args.estimator
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for _ in range(args.steps):
        keys, values, query, place = sequences(args)
        target = values[torch.arange(args.batch), place]
        loss = F.mse_loss(model(keys, values, query), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        keys, values, query, place = sequences(args)
        scores = model.scores(keys, query)
        result = {
            "right": float((model.gate.index(scores) == place).float().mean()),
            "entropy": float(model.gate.entropy(scores).mean()),
            "chance": 1 / args.length,
        }
    print(f"the pointer stands right in {result['right']:.1%} of new sequences (guessing: {result['chance']:.1%}); "
          f"entropy {result['entropy']:.3f} nats")  # fmt: skip
    return result


def sequences(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch: keys ``[N, length]``, values one-hot ``[N, length, classes]``, queries ``[N]``, right places ``[N]``."""
    keys = torch.rand(args.batch, args.keys).argsort(-1)[:, : args.length]  # all different
    values = F.one_hot(torch.randint(args.classes, keys.shape), args.classes).float()
    place = torch.randint(args.length, (args.batch,))
    return keys, values, keys[torch.arange(args.batch), place], place


if __name__ == "__main__":
    main()
