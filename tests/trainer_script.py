"""A training script made of the pieces that timm's own is made of, for the test that adds pruning to it.

timm does not ship its script. What matters of it here: the names in ``main()``, the order in which models, optimizers,
wrappers, loaders, schedules and checkpoints are made, and what runs in an epoch. ``--task`` takes the loss from
``timm.task``, as newer versions do; without it there is a loss function, a scaler's call or a plain backward, and an
average of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from functools import partial

import torch
from timm import create_model, utils
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("data_dir")
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--num-classes", type=int, default=10)
parser.add_argument("--input-size", type=int, nargs=3, default=(3, 32, 32))
parser.add_argument("--batch-size", type=int, default=20)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--warmup-epochs", type=int, default=1)
parser.add_argument("--sched-on-updates", action="store_true")
parser.add_argument("--grad-accum-steps", type=int, default=1)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--clip-mode", default="norm")
parser.add_argument("--mixup", type=float, default=0.0)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--scaler", action="store_true")
parser.add_argument("--channels-last", action="store_true")
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--torchcompile")
parser.add_argument("--task", action="store_true")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", required=True)


def main() -> None:
    args = parser.parse_args()
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)

    model = create_model(
        args.model,
        num_classes=args.num_classes,
        drop_path_rate=0.1,
    )
    data_config = resolve_data_config(vars(args), model=model)
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if args.amp else contextlib.nullcontext
    loss_scaler = utils.NativeScaler(device=device.type) if args.scaler else None

    loss_fn = SoftTargetCrossEntropy() if args.mixup else LabelSmoothingCrossEntropy(args.smoothing)
    task = model_ema = None
    if args.task:
        task = ClassificationTask(model, loss_fn, device=device)
        model_ema = task.setup_ema(decay=0.9) if args.model_ema else None
        if args.distributed:
            task.prepare_distributed()
        if args.torchcompile:
            task.compile(backend=args.torchcompile)
    else:
        model_ema = utils.ModelEmaV3(model, decay=0.9) if args.model_ema else None
        if args.distributed:
            model = DistributedDataParallel(model)
        if args.torchcompile:
            model = torch.compile(model, backend=args.torchcompile)

    common = {"batch_size": args.batch_size, "input_size": data_config["input_size"], "mean": data_config["mean"],
              "std": data_config["std"], "num_workers": 0, "persistent_workers": False, "distributed": args.distributed,
              "device": device, "use_prefetcher": False}  # fmt: skip
    train, held = (create_dataset("", root=args.data_dir, split=split) for split in ("train", "validation"))
    loader_train = create_loader(train, is_training=True, hflip=0.0, color_jitter=None, **common)
    loader_eval = create_loader(held, is_training=False, crop_pct=data_config["crop_pct"], **common)
    mixup_fn = Mixup(args.mixup, num_classes=args.num_classes) if args.mixup else None

    saver = None
    output_dir = None
    if utils.is_primary(args):
        output_dir = utils.get_outdir(args.output)
        saver = utils.CheckpointSaver(
            model=model, optimizer=optimizer, args=args, model_ema=model_ema, amp_scaler=loss_scaler, task=task,
            checkpoint_dir=output_dir, recovery_dir=output_dir, max_history=2,
        )  # fmt: skip

    updates_per_epoch = math.ceil(len(loader_train) / args.grad_accum_steps)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
    )
    start_epoch = 0

    best_metric = None
    try:
        for epoch in range(start_epoch, num_epochs):
            train_metrics = train_one_epoch(
                epoch, model, task, loader_train, optimizer, loss_fn, args, lr_scheduler, autocast, loss_scaler,
                model_ema, mixup_fn, updates_per_epoch,
            )  # fmt: skip
            if args.distributed:
                utils.distribute_bn(model, args.world_size, reduce=True)
            eval_metrics = validate(model, loader_eval, args, autocast)
            if model_ema is not None:
                validate(model_ema.module, loader_eval, args, autocast)
            if output_dir is not None:
                rates = [group["lr"] for group in optimizer.param_groups]
                utils.update_summary(
                    epoch, train_metrics, eval_metrics, filename=os.path.join(output_dir, "summary.csv"),
                    lr=sum(rates) / len(rates), write_header=best_metric is None,
                )  # fmt: skip
            if saver is not None:
                best_metric, _ = saver.save_checkpoint(epoch, metric=eval_metrics["top1"])
            if lr_scheduler is not None:
                lr_scheduler.step(epoch + 1, eval_metrics["top1"])
    except KeyboardInterrupt:
        pass
    if best_metric is not None:
        print(f"best: {best_metric}")
    if args.distributed:
        torch.distributed.destroy_process_group()


def train_one_epoch(epoch, model, task, loader, optimizer, loss_fn, args, lr_scheduler, autocast, loss_scaler,
                    model_ema, mixup_fn, updates_per_epoch):  # fmt: skip
    losses = utils.AverageMeter()
    (task or model).train()
    optimizer.zero_grad()
    outer = task or model
    for index, (images, targets) in enumerate(loader):
        need_update = index == len(loader) - 1 or (index + 1) % args.grad_accum_steps == 0
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        held_back = outer.no_sync() if not need_update and hasattr(outer, "no_sync") else contextlib.nullcontext()
        with held_back:
            with autocast():
                loss = task(images, targets)["loss"] if task is not None else loss_fn(model(images), targets)
                loss = loss / args.grad_accum_steps
            parameters = model_parameters(model, exclude_head="agc" in args.clip_mode)
            if loss_scaler is not None:
                loss_scaler(loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters,
                            need_update=need_update)  # fmt: skip
            else:
                loss.backward()
                if need_update:
                    if args.clip_grad is not None:
                        utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
                    optimizer.step()
        losses.update(loss.item() * args.grad_accum_steps, len(images))
        if not need_update:
            continue
        optimizer.zero_grad()
        updates = epoch * updates_per_epoch + math.ceil((index + 1) / args.grad_accum_steps)
        if task is not None:
            task.update_ema(step=updates)
        elif model_ema is not None:
            model_ema.update(model, step=updates)
        lr_scheduler.step_update(num_updates=updates, metric=losses.avg)
    if args.distributed:
        losses.avg = float(utils.reduce_tensor(torch.tensor(losses.avg), args.world_size))
    return {"loss": losses.avg}


@torch.no_grad()
def validate(model, loader, args, autocast):
    losses, top1 = utils.AverageMeter(), utils.AverageMeter()
    model.eval()
    for images, targets in loader:
        with autocast():
            output = model(images)
            loss = torch.nn.functional.cross_entropy(output, targets)
        (right,) = utils.accuracy(output, targets, topk=(1,))
        losses.update(float(loss), len(images))
        top1.update(float(right), len(images))
    return {"loss": losses.avg, "top1": top1.avg}


if __name__ == "__main__":
    main()
