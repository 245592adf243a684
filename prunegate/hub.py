"""Folders that a model hub, timm and :func:`prunegate.load` can read: weights, configuration and a model card."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunegate.checkpoint import WEIGHTS, load, load_dense, save
from prunegate.errors import CheckpointError
from prunegate.plan import Plan
from prunegate.slim.apply import apply_plan, plan_of

__all__ = ["ARCHITECTURE", "register_with_timm", "save_for_hub"]

ARCHITECTURE = "prunegate_slim"
"""The name under which timm finds the constructor of slim models."""


def save_for_hub(model: nn.Module, folder: str | os.PathLike[str],
                 measured: Mapping[str, Sequence[Any]] | None = None, *, name: str | None = None,
                 license: str | None = None, builder: Callable[..., nn.Module] | None = None) -> None:  # fmt: skip
    """Writes ``model.safetensors``, ``config.json`` and a model card, ``README.md``, ready to be uploaded.

    ``prunegate.load(folder)`` opens it; for a timm model so does ``timm.create_model("local-dir:FOLDER",
    pretrained=True)`` in a process that has imported prunegate.

    Args:
        model: The slim model.
        folder: Made where it is missing. Files of the three names are replaced.
        measured: Rows of the card's table: what was measured, to its values for the dense and the slim model, as in
            ``{"top-1 on the test split": ("78.1%", "77.5%")}``.
        name: The card's title; the folder's own name by default.
        license: The weights' licence, as the hub names it (``"apache-2.0"``), for the card's header.
        builder: As for :func:`prunegate.save`.

    Raises:
        CheckpointError: The folder cannot be written, or the model does not say how it is built.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error}") from error
    for what, values in (measured or {}).items():
        if isinstance(values, str) or len(values) != 2:
            raise CheckpointError(f"measured[{what!r}] is {values!r}; expected the dense and the slim model's values")
    save(model, folder / WEIGHTS, builder)
    config = _config(model)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(_card(model, name or folder.resolve().name, config, measured or {}, license))


def _is_timm(model: nn.Module) -> bool:
    return type(model).__module__.startswith("timm.") and isinstance(getattr(model, "pretrained_cfg", None), Mapping)


def _config(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"architecture": type(model).__name__, "library_name": "prunegate"}
    if _is_timm(model):
        own: Any = model.pretrained_cfg
        plain = {k: v for k, v in own.items() if isinstance(v, (str, int, float, bool, list, tuple)) and k not in (
            "url", "file", "hf_hub_id", "source", "state_dict")}  # fmt: skip
        found |= {
            "architecture": ARCHITECTURE,
            "pruned_architecture": plain.get("architecture"),
            "num_classes": getattr(model, "num_classes", None),
            "num_features": getattr(model, "num_features", None),
            "pretrained_cfg": plain | {"architecture": ARCHITECTURE},
        }
    return found


def _card(model: nn.Module, name: str, config: Mapping[str, Any], measured: Mapping[str, Sequence[Any]],
          license: str | None) -> str:  # fmt: skip
    plan = plan_of(model)
    slim = sum(parameter.numel() for parameter in model.parameters())
    dense = slim + _removed(model, plan)
    header = ["---", "tags:", "- pruning", "- prunegate", *(["- image-classification", "- timm"] if _is_timm(model)
              else []), "library_name: prunegate", *([f"license: {license}"] if license else []), "---"]  # fmt: skip
    lines = [*header, f"# {name}", ""]
    was = config.get("pruned_architecture") or config["architecture"]
    lines += [
        f"`{was}`, cut to {slim / max(dense, 1):.1%} of its parameters with PruneGate.", "",
        "| | dense | slim |", "|---|---|---|", f"| parameters | {dense:,} | {slim:,} |",
        *(f"| {what} | {before} | {after} |" for what, (before, after) in measured.items()), "",
        "## Use", "", "```python", "import prunegate", "", 'model = prunegate.load("FOLDER")',
    ]  # fmt: skip
    if _is_timm(model):
        lines += ["# or", "import timm", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)']
    lines += ["```", "", "## What was pruned", ""]
    shapes = [(each, plan.dense[each], plan.shape(each)) for each in plan.dense if len(plan.dense[each]) > 1]
    if shapes:
        lines += ["| weight | dense | slim |", "|---|---|---|"]
        lines += [f"| `{each}` | {_shape(before)} | {_shape(after)} |" for each, before, after in shapes]
    else:
        lines += ["Nothing: this is the dense model."]
    return "\n".join(lines) + "\n"


def _removed(model: nn.Module, plan: Plan) -> int:
    """Parameters that the cut took, tied ones once."""
    total = 0
    for each, parameter in model.named_parameters():
        if each in plan.dense:
            size = 1
            for length in plan.dense[each]:
                size *= length
            total += size - parameter.numel()
    return total


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


# ---------------------------------------------------------------------- timm


def prunegate_slim(pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None,
                   cache_dir: Any = None, features_only: bool = False, out_indices: Sequence[int] | None = None,
                   num_classes: int | None = None, **options: Any) -> nn.Module:  # fmt: skip
    """What timm calls for ``timm.create_model("local-dir:FOLDER")``, where a slim model is in the folder.

    Args:
        pretrained: Whether the weights are loaded too; the widths are in any case.
        pretrained_cfg: timm's, which says where the folder is.
        pretrained_cfg_overlay: Entries that replace those of the model's own configuration.
        cache_dir: Not used: nothing is fetched.
        features_only: Whether to wrap the model as timm's feature extractors are.
        out_indices: Which features those give; all by default.
        num_classes: Replaces the classifier where it differs.
        **options: Refused: the file says how the model is built.

    Raises:
        CheckpointError: There is no folder, or further options are given.
    """
    given = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else getattr(pretrained_cfg, "__dict__", {})
    folder = given.get("file")
    if not folder or not Path(folder).is_dir():
        raise CheckpointError(
            f'{ARCHITECTURE} is made from a folder: timm.create_model("local-dir:FOLDER", pretrained=True); of a hub '
            "fetch the folder first"
        )
    odd = sorted(key for key, value in options.items() if value is not None)
    if odd:
        raise CheckpointError(f"{odd} cannot be changed: a slim model is built with the arguments that it was cut with")
    model = load(folder)
    if not pretrained:
        model = apply_plan(load_dense(folder), plan_of(model))
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and isinstance(pretrained_cfg_overlay, Mapping):
        config.update(pretrained_cfg_overlay)
    if num_classes is not None and num_classes != getattr(model, "num_classes", None):
        classifier: Any = model
        classifier.reset_classifier(num_classes)
    if features_only:
        from timm.models._features import FeatureGetterNet

        info: Any = model.feature_info
        wrapped: Any = FeatureGetterNet(model, out_indices=tuple(out_indices or range(len(info))))
        wrapped.pretrained_cfg = wrapped.default_cfg = config
        model = wrapped
    return model.eval()


def register_with_timm() -> None:
    """Tells timm of slim models; a second call changes nothing."""
    registry: Any = importlib.import_module("timm.models")
    if not registry.is_model(ARCHITECTURE):
        registry.register_model(prunegate_slim)
