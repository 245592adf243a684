"""Command line of the pruning recipe: timm's names and flags, and the few that pruning adds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from timm.utils import ParseKwargs

from prunegate.cli.pruning import rounding

__all__ = ["BUDGETS", "parse_args", "write_args"]

BUDGETS = ("flops", "params", "latency", "latency_ms", "memory_mb")
"""Arguments that are handed to ``prunegate.Budget`` by the same names."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; values in a ``--config`` file stand for defaults.

    Args:
        argv: Arguments without the program's name; ``None`` takes the process's own.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("-c", "--config", metavar="FILE", help="args.yaml of an earlier run: its values are defaults")
    first.add_argument("--resume", metavar="DIR", help="folder of a run that was stopped: it goes on where its newest "
                       "state was saved, with the arguments it had")  # fmt: skip
    given, rest = first.parse_known_args(argv)
    parser = _parser(first)
    if given.resume:
        given.config = given.config or str(Path(given.resume, "args.yaml"))
        if not Path(given.config).is_file():
            parser.error(f"--resume {given.resume}: there is no {given.config}; name the folder of a run")
    if given.config:
        parser.set_defaults(**yaml.safe_load(Path(given.config).read_text()))
    args = parser.parse_args(rest)
    if args.refit < 0:
        parser.error(f"--refit {args.refit}: expected a number of images, or 0 for no repair")
    args.resume = given.resume
    # YAML knows no tuples and sorts; a model that is made from a file must be made as it was from the command line.
    args.model_kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in sorted(args.model_kwargs.items())}
    if all(getattr(args, name) is None for name in BUDGETS):
        args.flops = 0.5
    if args.resume:
        args.output, args.experiment = str(Path(args.resume).parent), Path(args.resume).name
    args.validation_batch_size = args.validation_batch_size or args.batch_size
    return args


def write_args(args: argparse.Namespace, path: Path) -> None:
    """Writes the arguments so that ``--config`` reads them back."""
    given = {key: value for key, value in vars(args).items() if key != "resume"}
    plain = {key: value for key, value in given.items() if isinstance(value, (*_PLAIN, type(None)))}
    path.write_text(yaml.safe_dump(plain, sort_keys=True))


_PLAIN = (bool, int, float, str, list, dict)


def _parser(first: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Prunes a timm model to a budget: dense training (optional), search, export, fine-tuning.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[first],
    )
    _add_pruning(parser.add_argument_group("Pruning"))
    _add_data(parser.add_argument_group("Data"))
    _add_model(parser.add_argument_group("Model"))
    _add_optimizer(parser.add_argument_group("Optimizer and schedule, of every phase"))
    _add_augmentation(parser.add_argument_group("Augmentation and regularisation"))
    _add_distillation(parser.add_argument_group("Distillation, in search and fine-tuning"))
    _add_machine(parser.add_argument_group("Machine and output"))
    return parser


def _add_pruning(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--flops", type=float, help="budget: share of the dense FLOPs, or an absolute number")
    group.add_argument("--params", type=float, help="budget: share of the dense parameters, or an absolute number")
    group.add_argument("--latency", type=float, help="budget: share of the dense latency, measured on --device")
    group.add_argument("--latency-ms", type=float, help="budget: the same in milliseconds")
    group.add_argument("--memory-mb", type=float, help="budget: peak memory of a forward, in 2**20 bytes")
    group.add_argument("--round-to", type=rounding, default=1, help="make kept widths a multiple of this; auto: what "
                       "the device likes")  # fmt: skip
    group.add_argument("--units", nargs="+", default=["channel", "head"], help="kinds of units to prune")
    group.add_argument("--ignore", nargs="*", default=[], help="patterns of module or parameter names to leave whole")
    group.add_argument("--dense-epochs", type=int, default=0, help="epochs of training before the search")
    group.add_argument("--search-epochs", type=int, default=10, help="epochs of the search")
    group.add_argument("--refit", type=int, default=0, metavar="N", help="training images on which the cut is "
                       "repaired in closed form before fine-tuning, without labels; 0: it is not")  # fmt: skip
    group.add_argument("--epochs", type=int, default=30, help="epochs of fine-tuning the slim model")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data-dir", metavar="DIR", help="root of the data set")
    group.add_argument("--dataset", default="", help="digits, fashion-mnist, or a timm name (torch/..., hfds/...); "
                       "empty: ImageFolder")  # fmt: skip
    group.add_argument("--train-split", default="train", help="split to train on")
    group.add_argument("--val-split", default="", help="split for all choices; empty: a part of the training split")
    group.add_argument("--val-fraction", type=float, default=0.1, help="share of the training split that validates")
    group.add_argument("--test-split", default="validation", help="split that is read once, at the end")
    group.add_argument("--dataset-download", action="store_true", help="let torchvision fetch the data")
    group.add_argument("--class-map", default="", metavar="FILE", help="class to index mapping")
    group.add_argument("-b", "--batch-size", type=int, default=128, help="images of one process and step")
    group.add_argument("-vb", "--validation-batch-size", type=int, help="as --batch-size, without gradients")
    group.add_argument("--img-size", type=int, help="side of the images; the model's own where left out")
    group.add_argument("--in-chans", type=int, help="colour channels; the model's own where left out")
    group.add_argument("--input-size", nargs=3, type=int, metavar="N", help="channels, height, width")
    group.add_argument("--crop-pct", type=float, help="centre crop outside training")
    group.add_argument("--mean", type=float, nargs="+", help="mean of the pixels")
    group.add_argument("--std", type=float, nargs="+", help="standard deviation of the pixels")
    group.add_argument("--interpolation", default="", help="how images are resized")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="resnet50", help="timm model name")
    group.add_argument("--pretrained", action="store_true", help="start from timm's pretrained weights")
    group.add_argument("--checkpoint", "--initial-checkpoint", default="", metavar="PATH", help="start from these")
    group.add_argument("--num-classes", type=int, help="the data set's own where it has a list, else the model's")
    group.add_argument("--gp", help="global pooling")
    group.add_argument("--drop", type=float, default=0.0, help="dropout")
    group.add_argument("--drop-path", type=float, help="stochastic depth")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="more of create_model's")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in backward")
    group.add_argument("--model-ema", action="store_true", help="average the weights, in dense and fine-tuning phases")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, help="decay of that average")


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--opt", default="sgd", help="timm optimizer name")
    group.add_argument("--opt-eps", type=float, help="the optimizer's own where left out")
    group.add_argument("--opt-betas", type=float, nargs="+", help="the optimizer's own where left out")
    group.add_argument("--momentum", type=float, default=0.9, help="of SGD and its relatives")
    group.add_argument("--weight-decay", type=float, default=2e-5, help="of weights; gates never decay")
    group.add_argument("--clip-grad", type=float, help="clip gradients at this")
    group.add_argument("--clip-mode", default="norm", help="norm, value or agc")
    group.add_argument("--layer-decay", type=float, help="layer-wise decay of the learning rate")
    group.add_argument("--lr", type=float, default=0.05, help="peak learning rate")
    group.add_argument("--dense-lr", type=float, help="peak learning rate of the dense phase")
    group.add_argument("--search-lr", type=float, help="peak learning rate while it searches")
    group.add_argument("--sched", default="cosine", help="timm scheduler name; one cycle for the dense phase, one over "
                       "search and fine-tuning")  # fmt: skip
    group.add_argument("--min-lr", type=float, default=0.0, help="where a schedule ends")
    group.add_argument("--warmup-lr", type=float, default=1e-5, help="where a warm-up starts")
    group.add_argument("--warmup-epochs", type=int, default=0, help="epochs of warm-up in every cycle")
    group.add_argument("--decay-epochs", type=float, default=90, help="of step schedules")
    group.add_argument("--decay-rate", type=float, default=0.1, help="of step schedules")
    group.add_argument("--grad-accum-steps", type=int, default=1, help="batches to one update")


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--no-aug", action="store_true", help="none of the below that changes the image")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="range of the crop's area")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="range of the crop's aspect")
    group.add_argument("--hflip", type=float, default=0.5, help="probability of a mirror image")
    group.add_argument("--vflip", type=float, default=0.0, help="probability of an image upside down")
    group.add_argument("--color-jitter", type=float, default=0.4, help="strength")
    group.add_argument("--aa", help="AutoAugment policy")
    group.add_argument("--reprob", type=float, default=0.0, help="probability of random erasing")
    group.add_argument("--remode", default="pixel", help="how to erase")
    group.add_argument("--mixup", type=float, default=0.0, help="alpha; 0 turns it off")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha; 0 turns it off")
    group.add_argument("--mixup-prob", type=float, default=1.0, help="probability of either")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix, of the two")
    group.add_argument("--mixup-mode", default="batch", help="batch, pair or elem")
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    group.add_argument("--train-interpolation", default="random", help="how training images are resized")


def _add_distillation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--kd-model-name", metavar="NAME", help="teacher: a timm model name, or dense for the model as "
                       "it is before the search")  # fmt: skip
    group.add_argument("--kd-checkpoint", metavar="PATH", help="weights of a teacher given by name")
    group.add_argument("--kd-distill-type", default="logit", choices=["logit", "feature", "token"], help="what")
    group.add_argument("--kd-temperature", type=float, default=4.0, help="softens both sides, of logits")
    group.add_argument("--distill-loss-weight", type=float, help="weight of the distillation loss")
    group.add_argument("--task-loss-weight", type=float, help="weight of the labels; alone, the other is 1 minus it")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="cuda", help="falls back to cpu where there is none")
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument("--amp-dtype", default="float16", choices=["float16", "bfloat16"], help="its lower type")
    group.add_argument("--channels-last", action="store_true", help="channels_last memory layout")
    group.add_argument("--torchcompile", nargs="?", default=None, const="inductor", help="compile, with this backend")
    group.add_argument("-j", "--workers", type=int, default=4, help="processes that load data")
    group.add_argument("--pin-mem", action="store_true", help="pin memory of loaded batches")
    group.add_argument("--log", nargs="*", default=[], help="also log to: tensorboard, wandb, mlflow")
    group.add_argument("--seed", type=int, default=42, help="of weights, data order, gates and the validation split")
    group.add_argument("--recovery-interval", type=int, default=0, metavar="N", help="save the state every N updates "
                       "too, not only at the end of an epoch")  # fmt: skip
    group.add_argument("--checkpoint-hist", type=int, default=2, metavar="N", help="states that are kept")
    group.add_argument("--output", default="runs", metavar="DIR", help="where results go")
    group.add_argument("--experiment", default="", metavar="NAME", help="folder in --output; made up where left out")
