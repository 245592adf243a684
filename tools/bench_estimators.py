"""How far each estimator of the sampler's gradient is from the exact one, and what that means for training.

    python tools/bench_estimators.py --draws 20000 --seeds 16

First part: a small network on the digits of scikit-learn, trained without gates. Twelve of its units get binary
gates, or six of them one of four operators each; either way there are 4096 configurations, so the gradient of the
expected loss is known by enumeration. For each estimator, over many draws: the bias and the standard deviation of one
draw, both in units of the exact gradient's length, and the mean cosine between one draw and the exact gradient.

Second part: a wider network is trained with gates on its units, whose expected number is pulled to a quarter; then the
quarter with the largest logits stays, and the test accuracy is measured. Another is trained with one of four operators
drawn at each unit; then each keeps its likeliest. Mean over seeds, with a 95% interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from prunegate.gumbel import gumbel_sigmoid, gumbel_softmax

GATES = 12
CHOICES = 6
OPERATORS: tuple[Callable[[Tensor], Tensor], ...] = (F.relu, torch.tanh, torch.zeros_like, torch.neg)

ESTIMATORS: dict[str, dict[str, Any]] = {
    "straight-through, tau 0.1": {"tau_backward": 0.1},
    "straight-through, tau 0.5": {"tau_backward": 0.5},
    "straight-through, tau 1": {},
    "straight-through, tau 2": {"tau_backward": 2.0},
    "10 conditional draws, tau 0.1": {"tau_backward": 0.1, "rao_samples": 10},
    "10 conditional draws, tau 0.5": {"tau_backward": 0.5, "rao_samples": 10},
    "10 conditional draws, tau 1": {"rao_samples": 10},
    "reinmax": {"estimator": "reinmax"},
}


class Digits(NamedTuple):
    """Images ``[n, 64]`` in (0, 1) and labels ``[n]``, split in two."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """The digits, in a fixed random order, 1297 to train and 500 to test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return Digits(images[500:], labels[500:], images[:500], labels[:500])


def train(digits: Digits, width: int) -> tuple[nn.Linear, nn.Linear]:
    """A network of one hidden layer, trained without gates."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, width), nn.Linear(width, 10)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], 1e-2)
    for _ in range(150):
        loss = F.cross_entropy(second(torch.relu(first(digits.images))), digits.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first.requires_grad_(False), second.requires_grad_(False)


class Problem(NamedTuple):
    """An expected loss whose gradient is known.

    Attributes:
        logits: Where the gradient is taken, ``[gates]`` or ``[choices, operators]``.
        losses: Maps samples ``[n, *logits.shape]`` to losses ``[n]``.
        exact: The gradient of the expected loss, the shape of ``logits``.
        sampler: What draws the samples.
    """

    logits: Tensor
    losses: Callable[[Tensor], Tensor]
    exact: Tensor
    sampler: Callable[..., Tensor]


def gates_problem(digits: Digits) -> Problem:
    """Binary gates on twelve hidden units."""
    first, second = train(digits, GATES)
    hidden = torch.relu(first(digits.images[:200]))

    def losses(gates: Tensor) -> Tensor:
        outputs = second(hidden * gates[:, None])
        return F.cross_entropy(
            outputs.transpose(1, 2), digits.labels[:200].expand(len(gates), -1), reduction="none"
        ).mean(1)

    logits = torch.linspace(-1, 2, GATES)
    configurations = torch.tensor(list(product([0.0, 1.0], repeat=GATES)))
    variable = logits.double().requires_grad_()
    chance = torch.where(configurations > 0, variable.sigmoid(), 1 - variable.sigmoid()).prod(1)
    return Problem(logits, losses, _exact(chance, losses, configurations, variable), gumbel_sigmoid)


def operators_problem(digits: Digits) -> Problem:
    """One of four operators at each of six hidden units."""
    first, second = train(digits, CHOICES)
    before = first(digits.images[:200])
    options = torch.stack([operator(before) for operator in OPERATORS], -1)

    def losses(choices: Tensor) -> Tensor:
        outputs = second(torch.einsum("bco,nco->nbc", options, choices))
        return F.cross_entropy(
            outputs.transpose(1, 2), digits.labels[:200].expand(len(choices), -1), reduction="none"
        ).mean(1)

    logits = torch.randn(CHOICES, len(OPERATORS), generator=torch.Generator().manual_seed(1))
    picked = torch.tensor(list(product(range(len(OPERATORS)), repeat=CHOICES)))
    configurations = F.one_hot(picked, len(OPERATORS)).float()
    variable = logits.double().requires_grad_()
    chance = (variable.softmax(-1) * configurations).sum(-1).prod(1)
    return Problem(logits, losses, _exact(chance, losses, configurations, variable), gumbel_softmax)


def _exact(chance: Tensor, losses: Callable[[Tensor], Tensor], configurations: Tensor, variable: Tensor) -> Tensor:
    assert abs(float(chance.detach().sum()) - 1) < 1e-9
    values = torch.cat([losses(part) for part in configurations.split(512)]).double()
    return torch.autograd.grad((chance * values).sum(), variable)[0]


def compare(problem: Problem, kind: dict[str, Any], draws: int) -> tuple[float, float, float, float]:
    """Bias and its standard error, standard deviation of one draw, and mean cosine, of one estimator."""
    gradients = []
    torch.manual_seed(2)
    for _ in range(0, draws, 500):
        logits = problem.logits.expand(500, *problem.logits.shape).clone().requires_grad_()
        loss = problem.losses(problem.sampler(logits, hard=True, **kind)).sum()
        gradients.append(torch.autograd.grad(loss, logits)[0].double())
    found, exact = torch.cat(gradients).flatten(1), problem.exact.flatten()
    length = float(exact.norm())
    error = float(found.var(0).sum().sqrt()) / len(found) ** 0.5
    cosine = float(F.cosine_similarity(found, exact.expand_as(found)).mean())
    # The length of a noisy mean's error is too long by the noise, whose square is known.
    bias = max(0.0, float((found.mean(0) - exact).norm()) ** 2 - error**2) ** 0.5
    return bias / length, error / length, error * len(found) ** 0.5 / length, cosine


def gates_task(digits: Digits, kind: dict[str, Any], seed: int) -> float:
    """Test accuracy, in percent, of a network trained with gates and cut to a quarter of its units."""
    torch.manual_seed(seed)
    width, kept = 48, 12
    first, second = nn.Linear(64, width), nn.Linear(width, 10)
    logits = torch.full((width,), 1.0, requires_grad=True)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], 1e-2)
    gate_optimizer = torch.optim.Adam([logits], 5e-2)
    steps = 300
    for step in range(steps):
        batch = torch.randint(len(digits.images), (128,))
        gates = gumbel_sigmoid(logits, hard=True, **kind)
        outputs = second(torch.relu(first(digits.images[batch])) * gates)
        target = width + (kept - width) * min(1.0, 1.5 * step / steps)
        excess = (logits.sigmoid().sum() - target) / width
        loss = F.cross_entropy(outputs, digits.labels[batch]) + 20 * excess.square()
        optimizer.zero_grad()
        gate_optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gate_optimizer.step()
    with torch.no_grad():
        mask = torch.zeros(width).scatter_(0, logits.topk(kept).indices, 1.0)
        outputs = second(torch.relu(first(digits.test_images)) * mask)
        return 100 * float((outputs.argmax(1) == digits.test_labels).double().mean())


def operators_task(digits: Digits, kind: dict[str, Any], seed: int) -> float:
    """Test accuracy, in percent, of a network whose units each choose one of four operators while it is trained."""
    torch.manual_seed(seed)
    width = 16
    first, second = nn.Linear(64, width), nn.Linear(width, 10)
    logits = torch.zeros(width, len(OPERATORS), requires_grad=True)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], 1e-2)
    choice_optimizer = torch.optim.Adam([logits], 5e-2)

    def outputs(images: Tensor, choices: Tensor) -> Tensor:
        options = torch.stack([operator(first(images)) for operator in OPERATORS], -1)
        return second((options * choices).sum(-1))

    for _ in range(300):
        batch = torch.randint(len(digits.images), (128,))
        choices = gumbel_softmax(logits, hard=True, **kind)
        loss = F.cross_entropy(outputs(digits.images[batch], choices), digits.labels[batch])
        optimizer.zero_grad()
        choice_optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        choice_optimizer.step()
    with torch.no_grad():
        chosen = F.one_hot(logits.argmax(-1), len(OPERATORS)).float()
        found = outputs(digits.test_images, chosen).argmax(1)
        return 100 * float((found == digits.test_labels).double().mean())


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        argv: Command line without the program's name; ``None`` takes it from ``sys.argv``.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20_000, help="draws of each estimator (default 20000)")
    parser.add_argument("--seeds", type=int, default=16, help="runs of the end task (default 16; 0 leaves it out)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    digits = load()
    console = Console(width=120)
    for title, problem in [
        ("12 gates", gates_problem(digits)),
        ("6 choices of 4 operators", operators_problem(digits)),
    ]:
        table = Table(
            "estimator", "bias", "std of one draw", "cosine of one draw", title=f"{title}, {options.draws} draws"
        )
        for name, kind in ESTIMATORS.items():
            bias, error, spread, cosine = compare(problem, kind, options.draws)
            table.add_row(name, f"{bias:.3f} ± {error:.3f}", f"{spread:.2f}", f"{cosine:.3f}")
        console.print(table)
    if not options.seeds:
        return
    title = f"test accuracy in percent, {options.seeds} seeds, 95% intervals"
    table = Table("estimator", "12 of 48 units stay", "16 units choose of 4 operators", title=title)
    for name, kind in ESTIMATORS.items():
        cells = []
        for task in (gates_task, operators_task):
            accuracy = torch.tensor([task(digits, kind, seed) for seed in range(options.seeds)])
            reach = float(stats.t.ppf(0.975, len(accuracy) - 1)) * float(accuracy.std()) / len(accuracy) ** 0.5
            cells.append(f"{float(accuracy.mean()):.1f} ± {reach:.1f}")
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
