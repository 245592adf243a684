"""Costs as polynomials in the gates: exact for hard masks, in closed form in expectation.

A counted operation costs a constant times the live lengths of its labelled dimensions, and a live length is the number
of positions that are always there plus one for each position whose gate is open. Gates that enter every length alike
(those of one layer, say) cannot be told apart by a cost, so everything here works on *classes* of gates: a cost depends
only on how many gates of each class are open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Polynomial", "PolynomialBuilder"]


@dataclass(frozen=True)
class _Length:
    """``constant + sum_c weights[c] * (number of open gates of class c)``."""

    constant: int
    weights: tuple[tuple[int, int], ...]


class PolynomialBuilder:
    """Collects terms; like terms are merged and identical lengths are stored once.

    Args:
        n_gates: Number of gates.
        start: bool ``[n_gates]``, the mask of what is called dense; every gate open if left out.
    """

    def __init__(self, n_gates: int, start: Tensor | None = None) -> None:
        self._n = n_gates
        self._start = start
        self._terms: dict[tuple[int, ...], int] = {}
        self._lengths: list[tuple[int, Tensor, Tensor]] = []
        self._index: dict[tuple[int, bytes, bytes], int] = {}
        # Tensors that were seen are kept, so that an id stands for one tensor as long as the builder lives.
        self._seen: dict[int, tuple[Tensor, int | None]] = {}

    def add(self, coefficient: int, factors: Sequence[int | Tensor]) -> None:
        """Adds ``coefficient`` times the product of the factors.

        Args:
            coefficient: An integer.
            factors: Each an integer, or the live length of a dimension: int64 ``[size]``, the gate of each position,
                -1 where the position is always there. One gate may stand at several positions.
        """
        powers: list[int] = []
        for factor in factors:
            if isinstance(factor, Tensor):
                length = self._length_of(factor)
                if length is None:
                    coefficient *= factor.numel()
                else:
                    powers.append(length)
            else:
                coefficient *= int(factor)
        key = tuple(sorted(powers))
        self._terms[key] = self._terms.get(key, 0) + int(coefficient)

    def _length_of(self, gates: Tensor) -> int | None:
        """The number under which a length is stored, ``None`` if no gate is in it."""
        known = self._seen.get(id(gates))
        if known is not None:
            return known[1]
        flat = gates.detach().cpu().flatten()
        live = flat[flat >= 0]
        number = None
        if live.numel():
            indices, counts = torch.unique(live, return_counts=True)
            constant = flat.numel() - live.numel()
            key = (constant, indices.numpy().tobytes(), counts.numpy().tobytes())
            number = self._index.setdefault(key, len(self._lengths))
            if number == len(self._lengths):
                self._lengths.append((constant, indices, counts))
        self._seen[id(gates)] = (gates, number)
        return number

    def build(self) -> Polynomial:
        """The polynomial of all terms added so far."""
        used = sorted({length for key in self._terms for length in key})
        number = {length: i for i, length in enumerate(used)}
        # Gates with equal columns in the matrix of lengths share a class; a random word per length, summed over the
        # column, stands for the column (equal words of unequal columns: about n_gates**2 / 2**64).
        words = np.random.default_rng(0).integers(1, 2**63, size=len(used), dtype=np.uint64)
        column = np.zeros(self._n, dtype=np.uint64)
        for word, length in zip(words, used, strict=True):
            _, indices, counts = self._lengths[length]
            column[indices.numpy()] += word * counts.numpy().astype(np.uint64)
        _, first, classes = np.unique(column, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))
        classes = order[classes.reshape(-1)]
        lengths = []
        for length in used:
            constant, indices, counts = self._lengths[length]
            found, at = np.unique(classes[indices.numpy()], return_index=True)
            weights = counts.numpy()[at]
            pairs = zip(found.tolist(), weights.tolist(), strict=True)
            lengths.append(_Length(constant, tuple(pairs)))
        terms = [(c, tuple(number[i] for i in key)) for key, c in self._terms.items() if c]
        return Polynomial(torch.from_numpy(classes), lengths, terms, self._start)


class Polynomial:
    """``sum_t coefficient_t * prod_j length_j``, each length an affine function of the gates. Made by a builder.

    Attributes:
        n_gates: Number of gates.
        classes: int64 ``[n_gates]``, the class of each gate: gates of one class enter every length alike.
        sizes: int64 ``[n_classes]``, number of gates of each class.
        dense: The value with every gate open (or those that the builder was told), an exact integer.
        start: bool ``[n_gates]``, the mask whose value that is.
        n_terms: Number of terms.
    """

    def __init__(self, classes: Tensor, lengths: Sequence[_Length], terms: Sequence[tuple[int, tuple[int, ...]]],
                 start: Tensor | None = None) -> None:  # fmt: skip
        self.n_gates = classes.numel()
        self.classes = classes
        n_classes = int(classes.max()) + 1 if classes.numel() else 0
        self.sizes = torch.bincount(classes, minlength=n_classes)
        self.n_terms = len(terms)
        self._lengths = tuple(lengths)
        self._terms = tuple(terms)
        self._constants = np.array([length.constant for length in lengths], dtype=np.float64)
        self._matrix = np.zeros((len(lengths), n_classes))
        for row, length in enumerate(lengths):
            for gate_class, weight in length.weights:
                self._matrix[row, gate_class] = weight
        self._factors, self._coefficients = _pad(terms, len(lengths))
        self._moments = _Moments.of(lengths, terms, n_classes, classes)
        self.start = torch.ones(self.n_gates, dtype=torch.bool) if start is None else start
        self.dense = self.exact(self.start)

    def _value(self, counts: Sequence[int]) -> int:
        lengths = [length.constant + sum(w * counts[c] for c, w in length.weights) for length in self._lengths]
        return sum(coefficient * math.prod(lengths[i] for i in key) for coefficient, key in self._terms)

    def exact(self, mask: Tensor) -> int:
        """The value for a hard mask, in integer arithmetic.

        Args:
            mask: bool ``[n_gates]``, True where the unit stays.

        Raises:
            ValueError: The mask is of another shape or type.
        """
        if mask.dtype != torch.bool or mask.shape != (self.n_gates,):
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} and type {mask.dtype} was given; expected bool ({self.n_gates},)"
            )
        counts = torch.bincount(self.classes[mask.cpu()], minlength=self.sizes.numel())
        return self._value(counts.tolist())

    def expected(self, p: Tensor) -> Tensor:
        """The expectation if gate ``i`` is open with probability ``p[i]``, all independent; differentiable.

        A gate that enters several lengths of one term is accounted for by joint cumulants, so the result is exact. It
        is linear in each single ``p[i]``: its gradient is what opening one gate adds.

        Args:
            p: Floating point ``[n_gates]``.

        Returns:
            A scalar of ``p``'s type, computed in float64.
        """
        return self._moments.on(p.device).expected(p).to(p.dtype)

    def gradient(self, p: Tensor) -> Tensor:
        """What opening each gate adds to the expectation, float64 ``[n_gates]``; ``p`` may be a hard mask.

        Args:
            p: ``[n_gates]``, probabilities or a boolean mask.
        """
        with torch.enable_grad():
            leaf = p.detach().double().requires_grad_()
            (gradient,) = torch.autograd.grad(self.expected(leaf), leaf)
        return gradient

    def positions(self) -> Tensor:
        """How many positions each gate opens: the greatest common divisor over all lengths, int64 ``[n_gates]``.

        0 for a gate that enters no length.
        """
        divisors = np.gcd.reduce(self._matrix.astype(np.int64), axis=0)
        return torch.from_numpy(divisors)[self.classes]

    def at(self, counts: NDArray) -> NDArray[np.float64]:
        """Values as a function of how many gates of each class are open.

        Args:
            counts: ``[..., n_classes]``; fractions are allowed.

        Returns:
            float64 ``[...]``; exact for whole counts while the value is below 2**53.
        """
        factors = self._padded_lengths(counts)[..., self._factors]
        return np.asarray(factors.prod(axis=-1) @ self._coefficients)

    def slope(self, counts: NDArray) -> NDArray[np.float64]:
        """Partial derivatives of :meth:`at` by the counts, float64 ``[n_classes]``."""
        lengths = self._padded_lengths(counts)
        by_length = np.zeros(len(lengths))
        width = self._factors.shape[1]
        for j in range(width):
            others = self._coefficients.copy()
            for i in range(width):
                if i != j:
                    others *= lengths[self._factors[:, i]]
            np.add.at(by_length, self._factors[:, j], others)
        return np.asarray(by_length[:-1] @ self._matrix)

    def _padded_lengths(self, counts: NDArray) -> NDArray[np.float64]:
        lengths = counts @ self._matrix.T + self._constants
        return np.concatenate([lengths, np.ones((*lengths.shape[:-1], 1))], axis=-1)


def _pad(terms: Sequence[tuple[int, tuple[int, ...]]], one: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Terms as a rectangle of factor numbers, filled up with the number of the factor that is 1, and coefficients."""
    width = max((len(key) for _, key in terms), default=1) or 1
    factors = np.full((len(terms), width), one, dtype=np.int64)
    for row, (_, key) in enumerate(terms):
        factors[row, : len(key)] = key
    return factors, np.array([coefficient for coefficient, _ in terms], dtype=np.float64)


@dataclass(eq=False)
class _Moments:
    """The expectation as a polynomial in joint cumulants.

    The expectation of a product of random variables is the sum over the partitions of its factors of the products of
    the blocks' joint cumulants. For affine functions of independent gates, a block's joint cumulant is a weighted sum,
    over the gates that all its factors share, of the gate's own cumulant of that order.
    """

    orders: int
    constants: Tensor  # float64 [n_cumulants + 1]; the last is the factor 1
    rows: Tensor  # int64 [nnz], cumulant
    columns: Tensor  # int64 [nnz], class + n_classes * (order - 1)
    weights: Tensor  # float64 [nnz]
    factors: Tensor  # int64 [n_products, width]
    coefficients: Tensor  # float64 [n_products]
    run_classes: Tensor  # int64 [n_runs]; neighbouring gates of one class are a run, and few runs make a network
    run_lengths: Tensor  # int64 [n_runs]
    n_classes: int

    @classmethod
    def of(cls, lengths: Sequence[_Length], terms: Sequence[tuple[int, tuple[int, ...]]], n_classes: int,
           classes: Tensor) -> _Moments:  # fmt: skip
        number: dict[tuple[int, ...], int | None] = {}
        constants: list[float] = []
        entries: list[tuple[int, int, int]] = []
        weights = [dict(length.weights) for length in lengths]
        orders = 1

        def cumulant(block: tuple[int, ...]) -> int | None:
            """Number of the block's joint cumulant, ``None`` if it vanishes because no gate is in all factors."""
            if block not in number:
                shared = set(weights[block[0]]).intersection(*(weights[j] for j in block[1:]))
                if shared:
                    number[block] = row = len(constants)
                    constants.append(lengths[block[0]].constant if len(block) == 1 else 0)
                    for c in sorted(shared):
                        weight = math.prod(weights[j][c] for j in block)
                        entries.append((row, c + n_classes * (len(block) - 1), weight))
                else:
                    number[block] = None
            return number[block]

        products: dict[tuple[int, ...], int] = {}
        for coefficient, key in terms:
            for partition in _partitions(key):
                blocks = [cumulant(tuple(sorted(block))) for block in partition]
                if None not in blocks:
                    orders = max([orders, *(len(block) for block in partition)])
                    product = tuple(sorted(block for block in blocks if block is not None))
                    products[product] = products.get(product, 0) + coefficient
        factors, coefficients = _pad([(c, key) for key, c in products.items()], len(constants))
        table = np.array(entries, dtype=np.int64).reshape(-1, 3)
        run_classes, run_lengths = torch.unique_consecutive(classes, return_counts=True)
        return cls(
            orders,
            torch.tensor([*constants, 1.0], dtype=torch.float64),
            torch.from_numpy(table[:, 0].copy()),
            torch.from_numpy(table[:, 1].copy()),
            torch.from_numpy(table[:, 2].astype(np.float64)),
            torch.from_numpy(factors),
            torch.from_numpy(coefficients),
            run_classes,
            run_lengths,
            n_classes,
        )

    def on(self, device: torch.device) -> _Moments:
        """The same tables on ``device``."""
        if self.constants.device == device:
            return self
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def expected(self, p: Tensor) -> Tensor:
        sums = [self._by_class(k) for k in _bernoulli_cumulants(p.double(), self.orders)]
        picked = torch.cat(sums)[self.columns] * self.weights
        cumulants = self.constants.index_add(0, self.rows, picked)
        value = self.coefficients
        for column in self.factors.unbind(1):
            value = value * cumulants[column]
        return value.sum()


    def _by_class(self, values: Tensor) -> Tensor:
        """Sums of ``values`` (float64 ``[n_gates]``) over the gates of each class."""
        if not values.numel():
            return values.new_zeros(self.n_classes)
        runs = torch.segment_reduce(values, "sum", lengths=self.run_lengths, unsafe=True)
        return values.new_zeros(self.n_classes).index_add(0, self.run_classes, runs)


def _partitions(items: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """All ways to split the items into blocks; equal items are told apart by position."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for chosen in combinations(range(len(rest)), size):
            block = (first, *(rest[i] for i in chosen))
            left = tuple(rest[i] for i in range(len(rest)) if i not in chosen)
            for others in _partitions(left):
                yield [block, *others]


def _bernoulli_cumulants(p: Tensor, orders: int) -> list[Tensor]:
    """Cumulants 1 to ``orders`` of a gate that is open with probability ``p``: k[n+1] = p (1 - p) dk[n]/dp."""
    powers = [0.0, 1.0]  # the current cumulant's coefficients by power of p
    found = [p]
    while len(found) < orders:
        slope = [i * c for i, c in enumerate(powers)][1:]
        powers = [0.0, *slope, 0.0]
        for i, c in enumerate(slope):
            powers[i + 2] -= c
        value = p * powers[-1]
        for c in reversed(powers[1:-1]):
            value = (value + c) * p
        found.append(value)
    return found
