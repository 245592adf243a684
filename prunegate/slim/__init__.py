"""Cutting a model along a plan, and deriving the plan from a traced forward."""
