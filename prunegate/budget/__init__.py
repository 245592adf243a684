"""Holding a search to its budgets: what they are, how they are approached, and the final choice."""

from prunegate.budget.budget import Budget

__all__ = ["Budget"]
