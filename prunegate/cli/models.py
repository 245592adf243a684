"""Models as the command line names them: a timm name, a slim file, or a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.checkpoint import load, load_dense
from prunegate.errors import PruneGateError
from prunegate.gated import example_input_of

__all__ = ["add_model_arguments", "example_for", "open_dense", "open_model"]


def add_model_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the arguments that name a model."""
    parser.add_argument("model", metavar=what, help="timm model name, or a file or folder that prunegate saved")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's pretrained weights")
    parser.add_argument("--checkpoint", metavar="FILE", help="start from these weights (a state dict)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes, where not the model's own")
    parser.add_argument("--input-size", nargs=3, type=int, metavar=("C", "H", "W"), help="size of one image")


def open_model(args: argparse.Namespace) -> nn.Module:
    """The model that the arguments name, in eval mode.

    Raises:
        PruneGateError: There is no such model.
    """
    name = args.model
    if Path(name).exists():
        return load(name).eval()
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:4])
        raise PruneGateError(
            f"{name!r} is neither a file nor a timm model{f'; near it are {close}' if close else ''}; "
            "timm.list_models() lists all"
        )
    options: dict[str, Any] = {}
    if args.num_classes is not None:
        options["num_classes"] = args.num_classes
    if args.input_size:
        options["in_chans"] = args.input_size[0]
    model = timm.create_model(name, pretrained=args.pretrained, **options)
    if args.checkpoint:
        try:
            timm.models.load_checkpoint(model, args.checkpoint, remap=args.checkpoint.endswith((".pth", ".pt")))
        except (OSError, RuntimeError, ValueError) as error:
            raise PruneGateError(f"{args.checkpoint} does not hold weights of {name}: {error}") from error
    built: nn.Module = model.eval()
    return built


def open_dense(path: str) -> nn.Module:
    """The dense architecture that a slim file was cut from, with weights as they are initialised, in eval mode."""
    return load_dense(path).eval()


def example_for(model: nn.Module, input_size: list[int] | None, batch: int = 1) -> Tensor:
    """Random images for a model, ``[batch, channels, height, width]``."""
    generator = torch.Generator().manual_seed(0)
    shape = tuple(input_size) if input_size else tuple(example_input_of(model).shape[1:])
    return torch.randn((batch, *shape), generator=generator)
