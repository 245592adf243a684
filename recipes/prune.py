"""Prunes a timm model to a budget, from top to bottom: dense training, search, export, fine-tuning, comparison.

    python recipes/prune.py --model resnet50 --pretrained --data-dir /data/imagenet --flops 0.5 --amp
    torchrun --nproc-per-node 8 recipes/prune.py --model ... the same
    python recipes/prune.py --resume runs/FOLDER      a run that was stopped, by whatever, goes on

Every choice (the best epoch of a phase) is made on a validation part that is split off the training set; the test
split is read once, at the end. The output folder then holds slim.safetensors (open it with ``prunegate.load``),
dense.safetensors (the weights before the search), plan.json, summary.csv, args.yaml, report.json, kept.png and
curves.png. While it runs, the folder ``state`` in it has what ``--resume`` needs.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from data import CLASSES, create_loaders, create_mixup
from loggers import create_loggers
from options import BUDGETS, parse_args, write_args
from plots import plot_curves, plot_kept
from progress import RunLog
from report import measure, table, write_report
from safetensors.torch import load_model, save_model
from state import Interrupt, Keeper, capture_random, isolated, restore_random, restoring
from tasks import create_task, create_teacher
from timm import create_model
from timm.data import Mixup, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.task import DistillationTeacher
from timm.utils import (
    ModelEmaV3,
    NativeScaler,
    dispatch_clip_grad,
    init_distributed_device,
    random_seed,
    unwrap_model,
)
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn import functional as F
from torch.utils.data import DataLoader

import prunegate
from prunegate.files import put_text

PHASES = ("dense", "search", "finetune")


def main(argv: Sequence[str] | None = None) -> tuple[Path, nn.Module]:
    """Runs the recipe; Ctrl-C lets a step finish and saves.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.

    Returns:
        The folder with the results, and the slim model in eval mode.
    """
    with Interrupt() as interrupt:
        return prune(parse_args(argv), interrupt)


def prune(args: argparse.Namespace, interrupt: Interrupt) -> tuple[Path, nn.Module]:
    """The run, from top to bottom.

    Args:
        args: What ``parse_args`` gave.
        interrupt: Says when to stop.
    """
    if not torch.cuda.is_available() and args.device.startswith("cuda"):
        args.device = "cpu"
    device = init_distributed_device(args)
    primary = args.rank == 0
    folder = Path(args.output, args.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{args.model}")
    if primary:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_args(args, folder / "args.yaml")
        except OSError as error:
            raise SystemExit(f"the folder {folder} cannot be written: {error}; name another with --output") from None
    log = RunLog(folder, primary)
    log.loggers = create_loggers(args.log if primary else [], vars(args), folder)
    keeper = Keeper(folder / "state", args.checkpoint_hist, primary)
    saved = keeper.latest() if args.resume else None
    reached = -1
    if saved is not None:
        with restoring("the phase and the rows"):
            reached = PHASES.index(saved["phase"])
            log.restore(saved["rows"])
        log.say(f"going on from {keeper.last}")

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
    check_loaders(args, train_loader, validation_loader, test_loader)
    mixup = create_mixup(args)
    random_seed(args.seed, args.rank)  # from here on each process draws its own images and gates
    run = Run(args, device, log, train_loader, validation_loader, mixup, keeper, interrupt)

    # ---------------------------------------------------------------- 1. dense training, where it is wanted
    if reached > 0:
        with restoring("dense.safetensors"):
            load_model(model, str(folder / "dense.safetensors"))
    elif args.dense_epochs:
        train(run, "dense", model, args.dense_epochs, args.dense_lr or args.lr, saved)
    dense = copy.deepcopy(model).eval()
    if primary:
        save_dense(dense, folder / "dense.safetensors")
    teacher = create_teacher(args, copy.deepcopy(dense), device)

    # ---------------------------------------------------------------- 2. search: weights and gates learn together
    example = torch.zeros(1, *config["input_size"], device=device)
    gated = prunegate.attach(model, example, units=args.units, ignore=args.ignore)
    log.say(f"{gated.logits.numel():,} gates in {len(gated.groups)} groups")
    budget = prunegate.Budget(
        gated,
        steps=args.search_epochs * run.updates,
        round_to=args.round_to,
        **{name: value for name in BUDGETS if (value := getattr(args, name)) is not None},
    )
    cycle = args.search_epochs + args.epochs  # one cycle of the learning rate spans search and fine-tuning
    searched = None
    if reached < 2:
        searched = train(run, "search", gated, args.search_epochs, args.search_lr or args.lr,
                         saved if reached == 1 else None, teacher, budget, cycle=cycle)  # fmt: skip
        budget.finish()
    else:
        with restoring("the mask"):
            gated.mask = saved["mask"]

    # ---------------------------------------------------------------- 3. export: an ordinary, smaller model
    slim = gated.export()
    plan = gated.plan()
    kept = [int(gated.mask[group.slice].sum()) for group in gated.groups]
    run.mask = gated.mask.cpu()
    place(slim, args, device)
    log.say(f"exported: {gated.cost.flops(gated.mask) / gated.cost.flops():.1%} of the FLOPs, "
            f"{gated.cost.params(gated.mask) / gated.cost.params():.1%} of the parameters")  # fmt: skip
    if args.refit and reached < 2 and not bool(gated.mask.all()):
        log.say(f"refitted layers: {repair(slim, dense, train_loader, args, device)}")

    # ---------------------------------------------------------------- 4. fine-tuning
    def go_on(optimizer: torch.optim.Optimizer) -> None:
        """Fine-tuning starts with the search's moments, cut like the weights; a resumed one has its own."""
        if searched is not None:
            prunegate.transfer_optimizer(searched, gated, slim, into=optimizer)

    if args.epochs:
        train(run, "finetune", slim, args.epochs, args.lr, saved if reached == 2 else None, teacher,
              before=args.search_epochs, cycle=cycle, prepare=go_on)  # fmt: skip

    # ---------------------------------------------------------------- 5. what came out
    models = {"dense": dense, "slim": slim.eval()}
    tested = evaluate(models, test_loader, args, device)
    if primary:
        prunegate.save(slim, folder / "slim.safetensors")
        put_text(folder / "plan.json", plan.to_json())
        plot_kept([group.name for group in gated.groups], [group.size for group in gated.groups], kept,
                  folder / "kept.png")  # fmt: skip
        plot_curves(log.rows, folder / "curves.png")
        top1 = {name: result["top1"] for name, result in tested.items()}
        files = {name: folder / f"{name}.safetensors" for name in models}
        measured = measure(models, top1, files, example)
        write_report(measured, folder / "report.json")
        log.say(table(measured["dense"], measured["slim"], str(device)))
        log.say(f"results are in {folder}")
        keeper.clear()
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
    keeper: Keeper
    interrupt: Interrupt
    mask: torch.Tensor | None = None

    @property
    def updates(self) -> int:
        """Updates of the weights in one epoch."""
        return math.ceil(len(self.train_loader) / self.args.grad_accum_steps)


def train(run: Run, phase: str, model: nn.Module, epochs: int, lr: float, saved: Mapping[str, Any] | None = None,
          teacher: DistillationTeacher | None = None, budget: prunegate.Budget | None = None, before: int = 0,
          cycle: int | None = None, prepare: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
          ) -> torch.optim.Optimizer:  # fmt: skip
    """Trains a model for one phase.

    Afterwards it has the weights of the epoch that did best in validation; after a search, those of the last, for the
    gates are settled only there.

    Args:
        run: Data, log and arguments.
        phase: Name in the log.
        model: Dense, gated or slim.
        epochs: How many.
        lr: Learning rate, where the schedule starts.
        saved: The state from which the phase goes on.
        teacher: What to learn from besides the labels.
        budget: What the gates are held to, in a search.
        before: Epochs of the learning rate's cycle that lie behind.
        cycle: Length of that cycle in epochs; the phase's own where left out.
        prepare: Gets the new optimizer, before the first step and before a saved state is read.

    Returns:
        The optimizer as it is after the last step.
    """
    args, device, loader = run.args, run.device, run.train_loader
    task = create_task(args, model, teacher, device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args) | {"lr": lr})
    prepare(optimizer)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=cycle or epochs, decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate, min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
        step_on_epochs=False, updates_per_epoch=run.updates,
    )  # fmt: skip
    if before:
        scheduler.step_update(num_updates=before * run.updates)
    scaler = NativeScaler(device.type) if args.amp and args.amp_dtype == "float16" and device.type == "cuda" else None
    # An average over weights that served under different masks would describe no network: none in the search.
    ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema and budget is None else None
    best: dict[str, Any] = {"top1": -1.0, "weights": None}
    at: dict[str, Any] = {"epoch": 0, "index": 0, "seen": 0, "correct": 0, "loss_sum": 0.0}
    trained = unwrap_model(task.get_trainable_module())

    def state() -> dict[str, Any]:
        return {
            "phase": phase, "at": dict(at), "rows": run.log.rows, "mask": run.mask, "best": best,
            "model": trained.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "ema": None if ema is None else ema.module.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "budget": None if budget is None else budget.state_dict(),
            "random": capture_random(device),
        }  # fmt: skip

    def save() -> None:
        name = f"{PHASES.index(phase)}-{at['epoch']:05d}-{at['index']:08d}"
        problem = run.keeper.save(state(), name)
        if problem:
            run.log.say(f"WARNING: {problem}; training goes on, the last good state is {run.keeper.last}")

    if saved is None:
        save()
    else:
        with restoring(phase):
            trained.load_state_dict(saved["model"])
            load_optimizer(optimizer, saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            at.update(saved["at"])
            best.update(saved["best"])
            for one, part in ((ema and ema.module, "ema"), (scaler, "scaler"), (budget, "budget")):
                if one is not None:
                    one.load_state_dict(saved[part])
            restore_random(saved["random"], args.rank, device)

    for epoch in range(at["epoch"], epochs):
        task.train()
        sampler = getattr(loader, "sampler", None)
        if args.distributed and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(len(run.log.rows))
        shown: dict[str, float] = {}
        # Of an epoch that was begun, the batches that are done are loaded again, and passed over.
        done = at["index"]
        if not done:
            at.update(seen=0, correct=0, loss_sum=0.0)
        batches = isolated(loader, args.seed + 1_000_003 * (len(run.log.rows) + 1) + args.rank, device)
        update = epoch * run.updates + done // args.grad_accum_steps
        for index, (images, labels) in enumerate(run.log.batches(batches, len(loader), f"{phase} {epoch + 1}/{epochs}",
                                                                 shown)):  # fmt: skip
            if index < done:
                continue
            check_labels(labels, args)
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
            output = result["output"]
            output = output[0] if isinstance(output, tuple) else output
            odd = [name for name, value in (("the loss", loss), ("the logits", output)) if not all_finite(value)]
            if agreed(bool(odd), args, device):
                raise SystemExit(
                    f"{' and '.join(odd) or 'the loss of another process'} became NaN or infinite in update "
                    f"{update + 1} of phase {phase} (epoch {epoch + 1}, batch {index + 1}); lower the learning rate or "
                    f"look at the data. {how_to_resume(run)}"
                )
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
                scheduler.step_update(num_updates=before * run.updates + update)

            at["seen"] += len(labels)
            at["correct"] += int((output.argmax(1) == labels).sum())
            at["loss_sum"] += float(loss.detach()) * len(labels)
            shown |= {"loss": at["loss_sum"] / at["seen"], "top1": 100 * at["correct"] / at["seen"],
                      **gate_state(budget)}  # fmt: skip
            if last:
                at["index"] = index + 1
                due = args.recovery_interval and update % args.recovery_interval == 0
                stop = agreed(run.interrupt.asked, args, device)
                if (due or stop) and index + 1 < len(loader):
                    save()
                    if stop:
                        raise SystemExit(f"stopped on request after update {update}. {how_to_resume(run)}")

        scheduler.step(before + epoch + 1)
        judged = ema.module if ema is not None else model
        result = evaluate({"": judged}, run.validation_loader, args, device)[""]
        run.log.epoch(phase=phase, lr=optimizer.param_groups[0]["lr"], train_loss=at["loss_sum"] / at["seen"],
                      train_top1=100 * at["correct"] / at["seen"], eval_loss=result["loss"], eval_top1=result["top1"],
                      eval_top5=result["top5"], **gate_state(budget))  # fmt: skip
        if budget is None and result["top1"] >= best["top1"]:
            best.update(top1=result["top1"], weights=copy.deepcopy(judged.state_dict()))
        at.update(epoch=epoch + 1, index=0)
        save()
        if agreed(run.interrupt.asked, args, device):
            raise SystemExit(f"stopped on request after epoch {epoch + 1}. {how_to_resume(run)}")
    if best["weights"] is not None:
        model.load_state_dict(best["weights"])
    return optimizer


def how_to_resume(run: Run) -> str:
    """Where the last good state is and what to do with it."""
    folder = run.keeper.folder.parent
    return f"The last good state is {run.keeper.last}; go on with: python recipes/prune.py --resume {folder}"


def all_finite(value: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    return bool(value.detach().isfinite().all())


def agreed(flag: bool, args: argparse.Namespace, device: torch.device) -> bool:
    """Whether any process says so: all must stop at the same step."""
    if not args.distributed:
        return flag
    shared = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return bool(shared)


def repair(slim: nn.Module, dense: nn.Module, loader: DataLoader, args: argparse.Namespace,
           device: torch.device) -> int:  # fmt: skip
    """Fits what consumed removed units to the weights before the search; all processes get the first one's result.

    Returns:
        The number of layers.
    """
    enough = math.ceil(args.refit / args.batch_size)
    batches = [images for images, _ in islice(isolated(loader, args.seed, device), enough)]
    done = prunegate.refit(slim, dense, [torch.cat(batches)[: args.refit]])
    if args.distributed:
        for tensor in slim.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    return len(done.layers)


def check_loaders(args: argparse.Namespace, train: DataLoader, validation: DataLoader, test: DataLoader) -> None:
    """Stops, before anything is computed, a run whose data is missing or of other classes."""
    if not len(train):
        raise SystemExit(f"fewer training images than one batch of {args.batch_size}; lower --batch-size")
    for name, flag, loader in (("validation", "--val-split or --val-fraction", validation),
                               ("test", "--test-split", test)):  # fmt: skip
        if not len(loader):
            raise SystemExit(f"the {name} part has no images; see {flag}")
    names = getattr(getattr(train.dataset, "reader", None), "class_to_idx", None)
    classes = CLASSES.get(args.dataset) or (len(names) if names else None)
    if classes is not None and classes > args.num_classes:
        raise SystemExit(f"the data has {classes} classes, the model {args.num_classes}: give --num-classes {classes}")


def check_labels(labels: torch.Tensor, args: argparse.Namespace) -> None:
    """Stops a run whose labels have no output in the model, before a kernel reads past the end of one."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= args.num_classes:
        raise SystemExit(f"a label is {low if low < 0 else high}, but the model has the classes 0 to "
                         f"{args.num_classes - 1}: give --num-classes, or see --class-map")  # fmt: skip


def save_dense(dense: nn.Module, path: Path) -> None:
    """Writes the weights before the search in one step."""
    beside = path.with_name(f".{path.name}.part")
    save_model(dense, str(beside))
    beside.replace(path)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Takes over an optimizer's state, and sees that it is one for these parameters."""
    optimizer.load_state_dict(dict(state))
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > max(parameter.numel(), 1):
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a weight of {tuple(parameter.shape)}")


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
    # torchrun shows the error of the process that failed first.
    record(main)()
