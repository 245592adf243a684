"""A contextual bandit with a categorical gate: the hard index explores while it is unsure and exploits afterwards.

    python recipes/bandit.py --contexts 8 --arms 5 --steps 1500

Each round shows a context; the gate pulls one arm for it and sees the noisy reward of that arm alone. The policy is a
table of logits, one row for each context. Nothing but the reward of the arm that was pulled reaches it: the gradient is
that of log p(arm) times the reward above its running mean (Williams, 1992). As the rows become sure the draws stop
exploring by themselves; there is no epsilon to anneal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import prunegate


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the bandit.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.

    Returns:
        ``right``: share of contexts for which the best arm is the most likely one; ``regret_first`` and
        ``regret_last``: mean regret a pull in the first and in the last tenth; ``entropy``: mean, in nats, at the end.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--arms", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="pulls in each step")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--gap", type=float, default=0.1, help="how far the best arm is above the second at least")
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation of a reward")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    means = torch.rand(args.contexts, args.arms)
    means.scatter_add_(1, means.argmax(-1, keepdim=True), torch.full((args.contexts, 1), args.gap))
    best = means.max(-1)
    gate = prunegate.Gate(args.arms, shape=(args.contexts,))
    optimizer = torch.optim.Adam(gate.parameters(), lr=args.lr)
    baseline = torch.zeros(args.contexts)
    regrets: list[float] = []
    for _ in range(args.steps):
        contexts = torch.randint(args.contexts, (args.batch,))
        arms, log_prob = pull(gate, contexts)
        rewards = means[contexts, arms] + args.noise * torch.randn(args.batch)
        loss = -((rewards - baseline[contexts]) * log_prob).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline.index_put_((contexts,), 0.9 * baseline[contexts] + 0.1 * rewards)
        regrets.append(float((best.values[contexts] - means[contexts, arms]).mean()))

    tenth = max(1, args.steps // 10)
    result = {
        "right": float((gate.index() == best.indices).float().mean()),
        "regret_first": sum(regrets[:tenth]) / tenth,
        "regret_last": sum(regrets[-tenth:]) / tenth,
        "entropy": float(gate.entropy().detach().mean()),
    }
    print(f"best arm found for {result['right']:.0%} of {args.contexts} contexts; regret a pull "
          f"{result['regret_first']:.3f} at first, {result['regret_last']:.3f} at the end; "
          f"entropy {result['entropy']:.3f} nats")  # fmt: skip
    return result


def pull(gate: prunegate.Gate, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """An arm for each context, int64 ``[n]``, and the logarithm of its chance."""
    assert gate.logits is not None
    rows = gate.logits[contexts]
    policy = prunegate.Gate()  # without logits of its own: it draws from the rows it is given
    arms = policy.sample(rows)
    return arms, policy.log_prob(arms, rows)


if __name__ == "__main__":
    main()
