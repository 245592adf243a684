"""Prune PyTorch models with learnable gates: attach, train a little, export an ordinary smaller model.

Names are imported when they are first used, so that a process that only loads a slim model never imports gates,
samplers or kernels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prunegate.after_timm import when_timm_is_imported

if TYPE_CHECKING:
    from prunegate.attaching import attach as attach
    from prunegate.budget import Budget as Budget
    from prunegate.budget.latency import LatencyTable as LatencyTable
    from prunegate.checkpoint import load as load
    from prunegate.checkpoint import save as save
    from prunegate.choice import Choice as Choice
    from prunegate.elastic_kernel import Kernel as Kernel
    from prunegate.errors import AttachError as AttachError
    from prunegate.errors import BudgetError as BudgetError
    from prunegate.errors import CheckpointError as CheckpointError
    from prunegate.errors import ExportError as ExportError
    from prunegate.errors import MaskError as MaskError
    from prunegate.errors import PlanError as PlanError
    from prunegate.errors import PruneGateError as PruneGateError
    from prunegate.errors import SamplerError as SamplerError
    from prunegate.flops import count_flops as count_flops
    from prunegate.gated import GatedModel as GatedModel
    from prunegate.gumbel import gumbel_sigmoid as gumbel_sigmoid
    from prunegate.gumbel import gumbel_softmax as gumbel_softmax
    from prunegate.hub import save_for_hub as save_for_hub
    from prunegate.oneshot import one_shot as one_shot
    from prunegate.plan import Plan as Plan
    from prunegate.refitting import refit as refit
    from prunegate.resolution import Resolution as Resolution
    from prunegate.slim.apply import apply_plan as apply_plan
    from prunegate.stand_alone import Gate as Gate
    from prunegate.streaming import cut_files as cut_files
    from prunegate.transfer import transfer_optimizer as transfer_optimizer

_HOME = {
    "attach": "attaching",
    "Budget": "budget",
    "LatencyTable": "budget.latency",
    "load": "checkpoint",
    "save": "checkpoint",
    "AttachError": "errors",
    "Choice": "choice",
    "BudgetError": "errors",
    "CheckpointError": "errors",
    "ExportError": "errors",
    "MaskError": "errors",
    "PlanError": "errors",
    "PruneGateError": "errors",
    "SamplerError": "errors",
    "count_flops": "flops",
    "Gate": "stand_alone",
    "Kernel": "elastic_kernel",
    "GatedModel": "gated",
    "gumbel_sigmoid": "gumbel",
    "gumbel_softmax": "gumbel",
    "save_for_hub": "hub",
    "one_shot": "oneshot",
    "Plan": "plan",
    "refit": "refitting",
    "Resolution": "resolution",
    "apply_plan": "slim.apply",
    "cut_files": "streaming",
    "transfer_optimizer": "transfer",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunegate' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prunegate.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


when_timm_is_imported()
