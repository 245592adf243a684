"""The one family of exceptions that this library raises on bad input."""

__all__ = [
    "AttachError",
    "BudgetError",
    "CheckpointError",
    "ExportError",
    "MaskError",
    "PlanError",
    "PruneGateError",
    "SamplerError",
]


class PruneGateError(Exception):
    """Base of every error that PruneGate raises on purpose: what was given, what was expected, what to do."""


class AttachError(PruneGateError):
    """The model or its example input cannot be traced, or nothing in it can be pruned."""


class MaskError(PruneGateError):
    """A mask has the wrong length or type, or would empty a layer that must live."""


class BudgetError(PruneGateError):
    """A budget is malformed, out of reach, or used after its end."""


class PlanError(PruneGateError):
    """A plan is malformed, or does not fit the model that it is applied to."""


class ExportError(PruneGateError):
    """A slim model could not be made, or does not compute what the masked model does."""


class CheckpointError(PruneGateError):
    """A file is not one of ours, is truncated or altered, or names something that may not be built."""


class SamplerError(PruneGateError):
    """The arguments of a sampler are out of range, or the asked-for backend is not available here."""
