"""Prunes a timm model to a budget, from top to bottom: dense training, search, export, fine-tuning, comparison.

    python recipes/prune.py --model resnet50 --pretrained --data-dir /data/imagenet --flops 0.5 --amp
    torchrun --nproc-per-node 8 recipes/prune.py --model ... the same

Every choice (the best epoch of a phase) is made on a validation part that is split off the training set; the test
split is read once, at the end. The output folder then holds slim.safetensors (open it with ``prunegate.load``),
dense.safetensors (the weights before the search), plan.json, summary.csv, args.yaml, report.json, kept.png and
curves.png.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from data import CLASSES, create_loaders, create_mixup
from loggers import create_loggers
from options import parse_args, write_args
from plots import plot_curves, plot_kept
from progress import RunLog
from report import measure, table, write_report
from safetensors.torch import save_model
from tasks import create_task, create_teacher
from timm import create_model
from timm.data import Mixup, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.task import DistillationTeacher
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad, init_distributed_device, random_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import prunegate


def main(argv: Sequence[str] | None = None) -> tuple[Path, nn.Module]:
    """Runs the recipe.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.

    Returns:
        The folder with the results, and the slim model in eval mode.
    """
    args = parse_args(argv)
    if not torch.cuda.is_available() and args.device.startswith("cuda"):
        args.device = "cpu"
    device = init_distributed_device(args)
    primary = args.rank == 0
    folder = Path(args.output, args.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{args.model}")
    if primary:
        folder.mkdir(parents=True, exist_ok=True)
        write_args(args, folder / "args.yaml")
    log = RunLog(folder, primary)
    log.loggers = create_loggers(args.log if primary else [], vars(args), folder)

    # ---------------------------------------------------------------- the model, and the data as the model wants it
    random_seed(args.seed)
    model = create_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint_path=args.checkpoint,
        num_classes=args.num_classes if args.num_classes is not None else CLASSES.get(args.dataset),
        in_chans=args.input_size[0] if args.input_size else args.in_chans,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        global_pool=args.gp,
        **args.model_kwargs,
    )
    args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    place(model, args, device)
    config = resolve_data_config(vars(args), model=model)
    args.input_chans = config["input_size"][0]
    train_loader, validation_loader, test_loader = create_loaders(args, config, device)
    if not len(train_loader):
        raise SystemExit(f"fewer training images than one batch of {args.batch_size}; lower --batch-size")
    mixup = create_mixup(args)
    random_seed(args.seed, args.rank)  # from here on each process draws its own images and gates
    run = Run(args, device, log, train_loader, validation_loader, mixup)

    # ---------------------------------------------------------------- 1. dense training, where it is wanted
    if args.dense_epochs:
        train(run, "dense", model, args.dense_epochs, args.dense_lr or args.lr)
    dense = copy.deepcopy(model).eval()
    teacher = create_teacher(args, copy.deepcopy(dense), device)

    # ---------------------------------------------------------------- 2. search: weights and gates learn together
    example = torch.zeros(1, *config["input_size"], device=device)
    gated = prunegate.attach(model, example, units=args.units, ignore=args.ignore)
    log.say(f"{gated.logits.numel():,} gates in {len(gated.groups)} groups")
    budget = prunegate.Budget(
        gated,
        steps=args.search_epochs * run.updates,
        round_to=args.round_to,
        **{name: value for name in ("flops", "params") if (value := getattr(args, name)) is not None},
    )
    train(run, "search", gated, args.search_epochs, args.search_lr or args.lr, teacher, budget)
    budget.finish()

    # ---------------------------------------------------------------- 3. export: an ordinary, smaller model
    slim = gated.export()
    plan = gated.plan()
    kept = [int(gated.mask[group.slice].sum()) for group in gated.groups]
    place(slim, args, device)
    log.say(f"exported: {gated.cost.flops(gated.mask) / gated.cost.flops():.1%} of the FLOPs, "
            f"{gated.cost.params(gated.mask) / gated.cost.params():.1%} of the parameters")  # fmt: skip

    # ---------------------------------------------------------------- 4. fine-tuning
    if args.epochs:
        train(run, "finetune", slim, args.epochs, args.lr, teacher)

    # ---------------------------------------------------------------- 5. what came out
    models = {"dense": dense, "slim": slim.eval()}
    tested = evaluate(models, test_loader, args, device)
    if primary:
        save_model(dense, str(folder / "dense.safetensors"))
        prunegate.save(slim, folder / "slim.safetensors")
        (folder / "plan.json").write_text(plan.to_json())
        plot_kept([group.name for group in gated.groups], [group.size for group in gated.groups], kept,
                  folder / "kept.png")  # fmt: skip
        plot_curves(log.rows, folder / "curves.png")
        top1 = {name: result["top1"] for name, result in tested.items()}
        files = {name: folder / f"{name}.safetensors" for name in models}
        measured = measure(models, top1, files, example)
        write_report(measured, folder / "report.json")
        log.say(table(measured["dense"], measured["slim"], str(device)))
        log.say(f"results are in {folder}")
    for logger in log.loggers:
        logger.finish()
    if args.distributed:
        torch.distributed.destroy_process_group()
    return folder, slim


@dataclass
class Run:
    """What all phases of one run share."""

    args: argparse.Namespace
    device: torch.device
    log: RunLog
    train_loader: DataLoader
    validation_loader: DataLoader
    mixup: Mixup | None

    @property
    def updates(self) -> int:
        """Updates of the weights in one epoch."""
        return math.ceil(len(self.train_loader) / self.args.grad_accum_steps)


def train(run: Run, phase: str, model: nn.Module, epochs: int, lr: float, teacher: DistillationTeacher | None = None,
          budget: prunegate.Budget | None = None) -> None:  # fmt: skip
    """Trains a model for one phase.

    Afterwards it has the weights of the epoch that did best in validation; after a search, those of the last, for the
    gates are settled only there.

    Args:
        run: Data, log and arguments.
        phase: Name in the log.
        model: Dense, gated or slim.
        epochs: How many.
        lr: Learning rate, where the schedule starts.
        teacher: What to learn from besides the labels.
        budget: What the gates are held to, in a search.
    """
    args, device, loader = run.args, run.device, run.train_loader
    task = create_task(args, model, teacher, device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args) | {"lr": lr})
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=epochs, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs, step_on_epochs=False,
        updates_per_epoch=run.updates,
    )  # fmt: skip
    scaler = NativeScaler(device.type) if args.amp and args.amp_dtype == "float16" and device.type == "cuda" else None
    # An average over weights that served under different masks would describe no network: none in the search.
    ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema and budget is None else None
    best_top1, best_weights = -1.0, None

    for epoch in range(epochs):
        task.train()
        sampler = getattr(loader, "sampler", None)
        if args.distributed and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(len(run.log.rows))
        state: dict[str, float] = {}
        seen, correct, loss_sum, update = 0, 0, 0.0, epoch * run.updates
        for index, (images, labels) in enumerate(run.log.batches(loader, len(loader), f"{phase} {epoch + 1}/{epochs}",
                                                                 state)):  # fmt: skip
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            images, targets = run.mixup(images, labels) if run.mixup else (images, labels)
            first = index - index % args.grad_accum_steps
            share = min(args.grad_accum_steps, len(loader) - first)  # the last group of an epoch may be smaller
            last = index + 1 == first + share

            with torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp):
                result = task(images, targets)
                loss = result["loss"]
            if budget is not None:
                loss = loss + budget.loss()
            if scaler is not None:
                scaler(loss / share, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode,
                       parameters=task.get_clip_parameters(exclude_head="agc" in args.clip_mode),
                       need_update=last)  # fmt: skip
            elif not last:
                with task.no_sync():
                    (loss / share).backward()
            else:
                (loss / share).backward()
                if args.clip_grad is not None:
                    dispatch_clip_grad(task.get_clip_parameters(exclude_head="agc" in args.clip_mode), args.clip_grad,
                                       mode=args.clip_mode)  # fmt: skip
                optimizer.step()
            if last:
                optimizer.zero_grad()
                if budget is not None:
                    budget.step()
                update += 1
                if ema is not None:
                    ema.update(model, step=update)
                scheduler.step_update(num_updates=update)

            output = result["output"]
            output = output[0] if isinstance(output, tuple) else output
            seen += len(labels)
            correct += int((output.argmax(1) == labels).sum())
            loss_sum += float(loss.detach()) * len(labels)
            state |= {"loss": loss_sum / seen, "top1": 100 * correct / seen, **gate_state(budget)}

        scheduler.step(epoch + 1)
        judged = ema.module if ema is not None else model
        result = evaluate({"": judged}, run.validation_loader, args, device)[""]
        run.log.epoch(phase=phase, lr=optimizer.param_groups[0]["lr"], train_loss=loss_sum / seen,
                      train_top1=100 * correct / seen, eval_loss=result["loss"], eval_top1=result["top1"],
                      eval_top5=result["top5"], **gate_state(budget))  # fmt: skip
        if budget is None and result["top1"] >= best_top1:
            best_top1, best_weights = result["top1"], copy.deepcopy(judged.state_dict())
    if best_weights is not None:
        model.load_state_dict(best_weights)


def gate_state(budget: prunegate.Budget | None) -> dict[str, float]:
    """Temperature, noise, expected and target FLOPs of a search, for bars and records."""
    if budget is None:
        return {}
    return {
        "tau": budget.tau,
        "noise": budget.noise,
        "expected_flops": budget.expected("flops"),
        "target_flops": budget.target("flops"),
    }


@torch.no_grad()
def evaluate(models: Mapping[str, nn.Module], loader: DataLoader, args: argparse.Namespace, device: torch.device,
             ) -> dict[str, dict[str, float]]:  # fmt: skip
    """Loss, top-1 and top-5 of each model, in per cent, over one pass through the data of all processes."""
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in models}
    for model in models.values():
        model.eval()
    for images, labels in loader:
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for name, model in models.items():
            with torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp):
                output = model(images)
            output = output[0] if isinstance(output, tuple) else output
            hits = output.topk(min(5, output.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(output.float(), labels, reduction="sum")
            sums[name] += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    found = {}
    for name, total in sums.items():
        if args.distributed:
            torch.distributed.all_reduce(total)
        loss, top1, top5, count = total.tolist()
        found[name] = {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
    return found


def place(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Moves a model to its device and memory layout."""
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
