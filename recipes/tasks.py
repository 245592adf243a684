"""What is minimised: labels, or labels and a teacher. The losses are timm's."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.models import load_checkpoint
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

__all__ = ["create_task", "create_teacher"]


def create_teacher(args: argparse.Namespace, dense: nn.Module, device: torch.device) -> DistillationTeacher | None:
    """The teacher that ``--kd-model-name`` asks for.

    Args:
        args: The recipe's arguments.
        dense: The model before the search; the teacher if the name is ``dense``. It is used as it is: give a copy.
        device: Where the teacher runs.
    """
    if not args.kd_model_name:
        return None
    if args.kd_model_name == "dense":
        teacher = DistillationTeacher(dense, device=device)
    elif args.kd_checkpoint:
        from timm import create_model

        model = create_model(args.kd_model_name, num_classes=args.num_classes, in_chans=args.input_chans)
        load_checkpoint(model, args.kd_checkpoint)
        teacher = DistillationTeacher(model, device=device)
    else:
        teacher = DistillationTeacher(args.kd_model_name, num_classes=args.num_classes, in_chans=args.input_chans,
                                      device=device)  # fmt: skip
    return teacher.to(device).requires_grad_(False).eval()


def create_task(args: argparse.Namespace, model: nn.Module, teacher: DistillationTeacher | None, device: torch.device,
                ) -> TrainingTask:  # fmt: skip
    """Ties a model to its loss, in DDP and compiled where the arguments ask for it.

    Args:
        args: The recipe's arguments.
        model: What is trained, gated or not.
        teacher: What it learns from besides the labels.
        device: Where it runs.

    Returns:
        ``task(images, targets)`` gives a dict with ``"loss"`` and ``"output"``.
    """
    soft = args.mixup > 0 or args.cutmix > 0
    common: dict[str, Any] = {
        "criterion_kwargs": {"soft_targets": True} if soft else {"smoothing": args.smoothing},
        "device": device, "verbose": False,
    }  # fmt: skip
    if teacher is None:
        task = ClassificationTask(model, **common)
    else:
        common |= {"distill_loss_weight": args.distill_loss_weight, "task_loss_weight": args.task_loss_weight}
        if args.kd_distill_type == "feature":
            task = FeatureDistillationTask(model, teacher, **common)
        elif args.kd_distill_type == "token":
            task = TokenDistillationTask(model, teacher, temperature=args.kd_temperature, **common)
        else:
            task = LogitDistillationTask(model, teacher, temperature=args.kd_temperature, **common)
    task.to(device)
    if args.distributed:
        # DDP reads its ignore list from the outermost module only, and a task may put one around a gated model.
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        outer = task.trainable_module
        prefix = next(name for name, module in outer.named_modules() if module is model)
        outer._ddp_params_and_buffers_to_ignore = [f"{prefix}.{name}".lstrip(".") for name in ignored]
        task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    return task
