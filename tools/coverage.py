"""Prune one model after another and check that nothing about it is wrong.

For each model: attach, three random masks that keep about half of every group, masked forward and export in float64
with nothing left at its initial value. Reported are the number of gates and groups, the share of parameters that are
prunable on at least one side, the share of FLOPs that a half-mask leaves, how far masked and slim outputs are apart,
whether costs are exact, and how long it took. A model that fails is reported with its reason, never left out.

Examples:
    python tools/coverage.py --timm families --jobs 2 --output runs/coverage
    python tools/coverage.py --timm "convnext*"
    python tools/coverage.py --timm all --shapes --jobs 2 --output runs/architectures
    python tools/coverage.py --timm all --shapes --jobs 2 --output runs/architectures --resume
    python tools/coverage.py --timm families --shapes-free --jobs 2 --output runs/shapes_free
    python tools/coverage.py --torchvision --transformers
    python tools/coverage.py --readme README.md --from runs/coverage/coverage.json runs/others/coverage.json
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prunegate
from prunegate.labels.shapes import ShapesOnly
from prunegate.labels.trace import call_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import shapes_free, support

MASKS = 3
EXACT = 1e-8
INSIDE = 1e-5
"""The bound for a model that computes something in float32 whatever its weights are in; the table says so."""
LARGE = 200e6
"""Above this many parameters a model is made shallower, by timm's own arguments."""
LARGE_TO_TRAIN = 150e6
"""As above, where it is trained: 20 GB are not enough for a step of 167 million on two images of 768 pixels."""


@dataclass
class Row:
    """What is reported of one model."""

    family: str
    model: str
    gates: int = 0
    groups: int = 0
    prunable: float = 0.0
    flops_left: float = 1.0
    error: float | None = None
    effect: float = 0.0
    precision: str = "float64"
    costs_exact: bool = False
    same_class: bool = False
    attach_seconds: float = 0.0
    export_seconds: float = 0.0
    seconds: float = 0.0
    failure: str = ""
    frozen: dict[str, int] = field(default_factory=dict)
    free: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether masked and slim agree, costs are exact and the top-level class is kept."""
        exact = EXACT if self.precision == "float64" else INSIDE
        whole = not self.failure and self.error is not None and self.error <= exact and self.costs_exact
        return whole and all(shapes_free.holds(outcome) for outcome in self.free.values())


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights, biases and statistics: zero-initialised branches and unit scales hide faults."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.ndim >= 2 and max(parameter.shape[1:]) > 1:
                usual = parameter[0].numel() ** -0.5
                if float(parameter.std()) < 0.5 * usual:  # heads and branches that start near zero
                    parameter.copy_(usual * noise)
                else:
                    parameter.add_(0.1 * usual * noise)
            elif parameter.numel() and float(parameter.abs().max()) < 0.5:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))


def random_mask(gated: Any, generator: torch.Generator) -> Tensor:
    """Keeps each unit with chance one half, at least one of each group and never all of a group of several."""
    mask = torch.rand(gated.logits.numel(), generator=generator) < 0.5
    for group in gated.groups:
        part = mask[group.slice]
        at = int(torch.randint(group.size, (1,), generator=generator))
        if not bool(part.any()):
            part[at] = True
        elif bool(part.all()) and group.size > 1:
            part[at] = False
    return mask


def examine(family: str, name: str, build: Callable[[], tuple[nn.Module, Any]]) -> Row:
    """Attaches, masks, cuts and compares one model."""
    row, start = Row(family, name), time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    try:
        model, example = build()
        model = model.double().eval()
        randomise(model, generator)
        began = time.perf_counter()
        gated = prunegate.attach(model, example)
        gated.cost.flops()  # counted when first asked for: a part of what one waits for
        row.attach_seconds = time.perf_counter() - began
        row.gates, row.groups = gated.logits.numel(), len(gated.groups)
        row.prunable = prunable_share(model, gated)
        row.precision = str(gated.trace.precision).removeprefix("torch.")
        for item in gated.frozen:
            key = f"{item.why} ({item.operation})" if item.operation else item.why
            row.frozen[key] = row.frozen.get(key, 0) + item.count
        compare(row, model, gated, example, generator)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}".splitlines()[0][:400]
        if os.environ.get("COVERAGE_TRACEBACK"):
            traceback.print_exc()
    row.seconds = time.perf_counter() - start
    return row


class SkipFilling(TorchDispatchMode):
    """Builds a model without filling its large tensors, whose memory is then never touched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skips operations that write into large floating-point tensors in place."""
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is not None and func._schema.is_mutable and target.is_floating_point() and target.numel() > 2**16:
            return target
        return func(*args, **(kwargs or {}))


def examine_shapes(family: str, name: str, build: Callable[[], tuple[nn.Module, Any]]) -> Row:
    """Labels, plans and cuts one model, and runs the cut one for its shapes alone."""
    row, start = Row(family, name, precision="shapes only"), time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    try:
        # Truncated normals are drawn until all values are in range, which values that nobody drew never are.
        with SkipFilling(), patch("torch.nn.init._no_grad_trunc_normal_", lambda tensor, *_, **__: tensor):
            model, example = build()
        model, example = model.eval(), example.float()
        began = time.perf_counter()
        gated = prunegate.attach(model, example)
        row.attach_seconds = time.perf_counter() - began
        row.gates, row.groups = gated.logits.numel(), len(gated.groups)
        row.prunable = prunable_share(model, gated)
        mask = random_mask(gated, generator)
        gated.mask = mask
        began = time.perf_counter()
        slim = prunegate.apply_plan(model, gated.plan())
        row.export_seconds = time.perf_counter() - began
        row.flops_left = gated.cost.flops(mask) / gated.cost.flops()
        with torch.no_grad(), ShapesOnly():
            shapes = [tuple(out.shape) for out in tensors(call_model(slim, example))]
        wanted = [node.shape for node in gated.trace.outputs if node.dtype.is_floating_point]
        if shapes != wanted:
            row.failure = f"outputs of {shapes}, expected {wanted}"
        elif not torch.equal(gated.mask, mask):
            row.failure = "units were kept where a call could not follow the cut"
        row.error, row.costs_exact = 0.0, gated.cost.params(mask) == sum(p.numel() for p in slim.parameters())
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}".splitlines()[0][:400]
    row.seconds = time.perf_counter() - start
    return row


def examine_freedom(family: str, name: str, build: Callable[[], tuple[nn.Module, Any]], compiled: bool) -> Row:
    """Cuts one model by one mask and does with the slim one what people do with models."""
    row, start = Row(family, name), time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    try:
        model, example = build()
        model = model.double().eval()
        randomise(model, generator)
        gated = prunegate.attach(model, example).eval()
        row.gates, row.groups = gated.logits.numel(), len(gated.groups)
        row.prunable = prunable_share(model, gated)
        row.precision = str(gated.trace.precision).removeprefix("torch.")
        gated.mask = random_mask(gated, generator)
        began = time.perf_counter()
        slim = gated.export()
        row.export_seconds = time.perf_counter() - began
        row.error, row.costs_exact = 0.0, True  # export has compared; the other sweep reports numbers
        bound = EXACT if row.precision == "float64" else INSIDE
        row.free = shapes_free.check(model, gated, slim.eval(), example, bound, compiled)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}".splitlines()[0][:400]
    row.seconds = time.perf_counter() - start
    return row


def prunable_share(model: nn.Module, gated: Any) -> float:
    """Share of parameters that some unit removes, on at least one of their dimensions."""
    named = dict(model.named_parameters())
    frozen: dict[str, Tensor] = {name: torch.ones(1, dtype=torch.bool) for name in named}
    for (name, dim), gates in gated.gate_map.dims.items():
        if name in named:
            shape = [1] * named[name].ndim
            shape[dim] = -1
            frozen[name] = frozen[name] & (gates < 0).reshape(shape)
    stuck = sum(int(frozen[name].expand(p.shape).sum()) if p.ndim else 1 for name, p in named.items())
    return 1 - stuck / sum(p.numel() for p in named.values())


def compare(row: Row, model: nn.Module, gated: Any, example: Any, generator: torch.Generator) -> None:
    """Fills in what masks and cuts show."""
    gated.eval()
    row.error, row.costs_exact, row.same_class, left = 0.0, True, True, []
    with torch.no_grad():
        dense = tensors(call_model(model, example))
        for _ in range(MASKS):
            gated.mask = random_mask(gated, generator)
            masked = tensors(call_model(gated, example))
            began = time.perf_counter()
            slim = gated.export()
            row.export_seconds = max(row.export_seconds, time.perf_counter() - began)
            cut = tensors(call_model(slim, example))
            row.error = max(row.error, apart(masked, cut))
            row.effect = max(row.effect, apart(masked, dense))
            flops, mask = gated.cost.flops(gated.mask), gated.mask
            row.costs_exact &= gated.cost.params(mask) == sum(p.numel() for p in slim.parameters())
            row.costs_exact &= flops == prunegate.count_flops(slim, example)
            row.same_class &= type(slim).__name__ == type(model).__name__ and isinstance(slim, type(model))
            left.append(flops / gated.cost.flops())
    row.flops_left = sorted(left)[len(left) // 2]


def tensors(tree: Any) -> list[Tensor]:
    """Floating-point tensors of an output."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the largest value."""
    scale = max(float(x.abs().max()) for x in a)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / scale


# ---------------------------------------------------------------------- which models


def families() -> list[str]:
    """The modules of timm that register models; others may register with timm as well."""
    own = []
    for family in timm.list_modules():
        models = timm.list_models(module=family)
        if models and timm.model_entrypoint(models[0]).__module__.startswith("timm."):
            own.append(family)
    return own


def smallest_of_family(family: str) -> str:
    """The model with fewest parameters among those that a timm module registers."""
    def parameters(name: str) -> float:
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception:
            return float("inf")  # some build index tables with data; a sibling stands for the family

    return min(timm.list_models(module=family), key=parameters)


def build_flexible(name: str) -> tuple[nn.Module, Tensor]:
    """As :func:`build_timm`, with images of any size where the model has an argument for that."""
    try:
        with torch.device("meta"):
            timm.create_model(name, dynamic_img_size=True)
    except (TypeError, RuntimeError):
        return build_timm(name, LARGE_TO_TRAIN)
    return build_timm(name, LARGE_TO_TRAIN, dynamic_img_size=True)


def build_timm(name: str, large: float = LARGE, **arguments: Any) -> tuple[nn.Module, Tensor]:
    """A timm model and a batch of one at its own size."""
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception:
            size = 0
    shallower: dict[str, Any] = {"depth": 2} if size > large else {}
    torch.manual_seed(0)
    model = timm.create_model(name, **shallower, **arguments)
    return model, torch.randn(1, *model.pretrained_cfg["input_size"], dtype=torch.float64)


def timm_rows(pattern: str) -> Iterator[tuple[str, str]]:
    """(family, model) pairs: every architecture, the smallest of each family, or those that match."""
    if pattern == "families":
        yield from ((family, "") for family in families())
        return
    for family in families():
        for name in timm.list_models(module=family):
            if pattern == "all" or fnmatch.fnmatch(name, pattern):
                yield family, name


Task = tuple[str, str, str]
"""Where a model comes from, its family, and its name; empty for the smallest of the family."""

_TASKS_OF_A_WORKER = 8


def work(task: Task) -> Row:
    """One model, in a worker process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    source, family, name = task
    if source == "shapes":
        return examine_shapes(family, name, lambda: build_timm(name, float("inf")))
    name = name or smallest_of_family(family)
    if source in ("free", "compiled"):
        return examine_freedom(family, name, lambda: build_flexible(name), source == "compiled")
    if source == "timm":
        return examine(family, name, lambda: build_timm(name))
    return examine(family, name, builders_of(source)[name])


def in_processes(tasks: Sequence[Task], jobs: int, run: Callable[[Task], Row] = work) -> Iterator[Row]:
    """The rows of all tasks, in the order in which they are done. A worker that is killed costs its own row only.

    Workers are replaced now and then: a process that has built many models does not give its memory back.
    """
    waiting = deque(tasks)
    while waiting:
        lost = yield from _in_one_pool(waiting, jobs, run)
        for task in lost:  # one of them was killed: which, shows when each is alone
            if (yield from _in_one_pool(deque([task]), 1, run)):
                _, family, name = task
                yield Row(family, name or smallest_of_family(family), failure="its process was killed; out of memory?")


def _in_one_pool(waiting: deque[Task], jobs: int, run: Callable[[Task], Row]) -> Generator[Row, None, list[Task]]:
    """Takes tasks from those that wait; returns those that ran when a worker was killed."""
    running: dict[Future[Row], Task] = {}
    left = _TASKS_OF_A_WORKER * jobs
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        while (waiting and left) or running:
            try:
                while waiting and left and len(running) < jobs:
                    running[pool.submit(run, waiting[0])] = waiting[0]
                    waiting.popleft()
                    left -= 1
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield future.result()
                    del running[future]
            except BrokenProcessPool:
                return list(running.values())
    return []


Builders = dict[str, Callable[[], tuple[nn.Module, Any]]]


def builders_of(source: str) -> Builders:
    """Builders of models that are not timm's, by name."""
    return SOURCES[source]()


def torchvision_builders() -> Builders:
    """The smallest classification model of each torchvision module, and its dense prediction models."""
    import torchvision

    models = torchvision.models
    smallest: dict[str, tuple[int, str]] = {}
    for name in models.list_models(module=models):
        module = models.get_model_builder(name).__module__
        count = models.get_model_weights(name).DEFAULT.meta["num_params"]
        if module not in smallest or count < smallest[module][0]:
            smallest[module] = (count, name)

    def classifier(name: str) -> Callable[[], tuple[nn.Module, Any]]:
        size = 299 if "inception" in name else 224

        def build() -> tuple[nn.Module, Any]:
            return models.get_model(name, weights=None), torch.randn(1, 3, size, size, dtype=torch.float64)

        return build

    def dense(name: str) -> Callable[[], tuple[nn.Module, Any]]:
        def build() -> tuple[nn.Module, Any]:
            model = models.get_model(name, weights=None, weights_backbone=None)
            return model, torch.randn(1, 3, 224, 224, dtype=torch.float64)

        return build

    builders = {name: classifier(name) for _, name in smallest.values()}
    for name in ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        builders[name] = dense(name)

    def backbone(name: str) -> Callable[[], tuple[nn.Module, Any]]:
        def build() -> tuple[nn.Module, Any]:
            detector = models.get_model(name, weights=None, weights_backbone=None)
            return detector.backbone, torch.randn(1, 3, 224, 224, dtype=torch.float64)

        return build

    for name in ("retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"):
        builders[f"backbone of {name}"] = backbone(name)
    return builders


def transformers_builders() -> Builders:
    """Tiny configurations with random weights; vision models take pixels, language models tokens."""
    import transformers

    def vision(model: str, config: str, size: int = 32, **arguments: Any) -> Callable[[], tuple[nn.Module, Any]]:
        def build() -> tuple[nn.Module, Any]:
            torch.manual_seed(0)
            settings = getattr(transformers, config)(**arguments)
            return Tuple(getattr(transformers, model)(settings)), torch.randn(1, 3, size, size, dtype=torch.float64)

        return build

    def language(model: str, config: str, **arguments: Any) -> Callable[[], tuple[nn.Module, Any]]:
        def build() -> tuple[nn.Module, Any]:
            torch.manual_seed(0)
            settings = getattr(transformers, config)(vocab_size=50, **arguments)
            return Tuple(getattr(transformers, model)(settings)), torch.randint(0, 50, (1, 7))

        return build

    vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32)
    swin = dict(image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4)
    text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    grouped = dict(num_key_value_heads=2, **text)
    return {
        "vit": vision("ViTForImageClassification", "ViTConfig", patch_size=8, **vit),
        "deit": vision("DeiTForImageClassification", "DeiTConfig", patch_size=8, **vit),
        "beit": vision("BeitForImageClassification", "BeitConfig", patch_size=8, **vit),
        "dinov2": vision("Dinov2ForImageClassification", "Dinov2Config", patch_size=8, **vit),
        "swin": vision("SwinForImageClassification", "SwinConfig", **swin),
        "swinv2": vision("Swinv2ForImageClassification", "Swinv2Config", **swin),
        "convnext": vision("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16, 24, 32],
                           depths=[1, 1, 2, 1]),
        "segformer": vision("SegformerForImageClassification", "SegformerConfig", hidden_sizes=[8, 16, 32, 64]),
        "mobilevit": vision("MobileViTForImageClassification", "MobileViTConfig", 64, image_size=64),
        "bert": language("BertForSequenceClassification", "BertConfig", **text),
        "distilbert": language("DistilBertForSequenceClassification", "DistilBertConfig", dim=32, n_layers=2,
                               n_heads=4, hidden_dim=48),
        "llama": language("LlamaForSequenceClassification", "LlamaConfig", pad_token_id=0, **grouped),
        "qwen2": language("Qwen2ForSequenceClassification", "Qwen2Config", pad_token_id=0, **grouped),
    }  # fmt: skip


class Tuple(nn.Module):
    """Runs a transformers model and gives its outputs as a tuple, of tensors only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pixels or tokens to logits."""
        return (self.model(x).logits,)


def ultralytics_builders() -> Builders:
    """Detectors of two generations, without weights."""
    from ultralytics.nn.tasks import DetectionModel

    def detector(name: str) -> Callable[[], tuple[nn.Module, Any]]:
        return lambda: (DetectionModel(name, verbose=False), torch.randn(1, 3, 256, 256, dtype=torch.float64))

    return {name: detector(f"{name}.yaml") for name in ("yolov8n", "yolo11n")}


SOURCES: dict[str, Callable[[], Builders]] = {
    "torchvision": torchvision_builders,
    "transformers": transformers_builders,
    "ultralytics": ultralytics_builders,
}


# ---------------------------------------------------------------------- report


def markdown(rows: list[Row]) -> str:
    """The table, with what it sums up to."""
    lines = [
        "| family | model | gates | groups | prunable | FLOPs left | error | costs | attach s | export s | "
        "positions that stay, and why | failure |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|--:|---|---|",
    ]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.0e}"
        error += "" if row.precision == "float64" else f" ({row.precision} inside)"
        costs = "exact" if row.costs_exact else "wrong"
        stays = "; ".join(f"{count} {why}" for why, count in sorted(row.frozen.items(), key=lambda item: -item[1]))
        lines.append(
            f"| {row.family} | {row.model} | {row.gates} | {row.groups} | {row.prunable:.1%} | {row.flops_left:.0%} | "
            f"{error} | {costs} | {row.attach_seconds:.2f} | {row.export_seconds:.2f} | {stays} | {row.failure} |"
        )
    return "\n".join([*lines, "", summary(rows), ""])


def summary(rows: list[Row]) -> str:
    """One sentence about all rows."""
    attach = sorted(row.attach_seconds for row in rows)
    single = sum(row.precision == "float32" for row in rows)
    return (
        f"{sum(row.passed for row in rows)} of {len(rows)} pass (exact costs, error at most {EXACT:g}, or {INSIDE:g} "
        f"for the {single} that compute something in float32 whatever their weights are in); "
        f"{sum(row.prunable >= 0.95 for row in rows)} have at least 95% of their parameters prunable, the least is "
        f"{min(row.prunable for row in rows):.0%}; a half-mask leaves under half of the FLOPs in "
        f"{sum(row.flops_left < 0.5 for row in rows)}; attach takes {attach[len(attach) // 2]:.2f} s in the median and "
        f"{attach[-1]:.1f} s at most."
    )


def freedom(rows: list[Row]) -> str:
    """A table of what else was done with slim models: what holds, and what does not."""
    names = [name for name in (*shapes_free.CHECKS, *shapes_free.COMPILED) if any(name in row.free for row in rows)]
    lines = ["| check | ok | the dense model does not, either | wrong |", "|---|--:|--:|---|"]
    for name in names:
        outcomes = {row.model: row.free[name] for row in rows if name in row.free}
        fine = sum(outcome == shapes_free.OK for outcome in outcomes.values())
        wrong = {model: outcome for model, outcome in outcomes.items() if not shapes_free.holds(outcome)}
        told = "; ".join(f"{model}: {outcome}" for model, outcome in wrong.items()).replace("|", "/")
        lines.append(f"| {name} | {fine} | {len(outcomes) - fine - len(wrong)} | {told} |")
    return "\n".join([*lines, "", *(f"{row.model}: {row.failure}" for row in rows if row.failure), ""])


def earlier(folder: Path) -> list[Row]:
    """What a sweep that was cut off found."""
    file = folder / "coverage.json"
    return [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []


def write_support(readme: Path, files: list[Path]) -> None:
    """Rewrites the README's table of what is supported from files that sweeps wrote."""
    rows = [Row(**row) for file in files for row in json.loads(file.read_text())]
    described = {
        "timm": "the smallest model of each family",
        "torchvision": "the smallest classifier of each kind, and dense prediction",
        "transformers": "vision and language models, tiny and random",
        "ultralytics": "YOLOv8n, YOLO11n",
    }
    lines = []
    for source, models in described.items():
        own = [row for row in rows if (row.family if row.family in SOURCES else "timm") == source]
        if own:
            version = importlib.metadata.version(source)
            passed = sum(row.passed for row in own)
            lines.append(support.Support.of(f"{source} {version}: {models}", [asdict(row) for row in own], passed))
    readme.write_text(support.rewrite(readme.read_text(), lines))


def main() -> int:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", metavar="all|families|PATTERN", help="which timm models")
    parser.add_argument("--shapes", action="store_true",
                        help="of timm models only label, plan, cut and check shapes, without computing")  # fmt: skip
    parser.add_argument("--shapes-free", action="store_true",
                        help="of timm models check other batches and resolutions, training, copies, files")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="with --shapes-free, also torch.compile and export")
    parser.add_argument("--readme", type=Path, help="rewrite the table of what is supported in this file and stop")
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", default=[], metavar="FILE",
                        help="for --readme: coverage.json of one or more sweeps")  # fmt: skip
    parser.add_argument("--torchvision", action="store_true", help="torchvision's classification and dense models")
    parser.add_argument("--transformers", action="store_true", help="tiny transformers models (needs transformers)")
    parser.add_argument("--ultralytics", action="store_true", help="YOLOv8n and YOLO11n (needs ultralytics)")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes, one thread each (default: 1)")
    parser.add_argument("--output", type=Path, help="folder for coverage.json and coverage.md")
    parser.add_argument("--resume", action="store_true", help="keep the models that --output has, run the others")
    args = parser.parse_args()
    if args.readme:
        if not args.sources:
            parser.error("--readme needs --from and at least one coverage.json")
        write_support(args.readme, args.sources)
        return 0
    kind = "shapes" if args.shapes else "timm"
    if args.shapes_free:
        kind = "compiled" if args.compile else "free"
    tasks = [(kind, family, name) for family, name in (timm_rows(args.timm) if args.timm else ())]
    for source in SOURCES:
        if getattr(args, source):
            tasks += [(source, source, name) for name in builders_of(source)]
    if args.resume and not args.output:
        parser.error("--resume needs --output, the folder of the sweep that was cut off")
    if not tasks:
        parser.error("nothing to do: give --timm (families, all or a pattern) or another package's flag")

    console, rows = Console(), []
    if args.resume:
        rows = earlier(args.output)
        done = {(row.family, row.model) for row in rows}
        tasks = [task for task in tasks if (task[1], task[2] or smallest_of_family(task[1])) not in done]
        console.print(f"{len(rows)} models were done before, {len(tasks)} are left", highlight=False)
    for row in in_processes(tasks, args.jobs):
        rows.append(row)
        state = "[green]ok[/]" if row.passed else "[red]FAILED[/]"
        error = "" if row.error is None else f"error {row.error:.0e}"
        console.print(
            f"{state} {row.model}: {row.gates} gates, {row.prunable:.1%} prunable, "
            f"{row.flops_left:.0%} FLOPs left, {error}, effect {row.effect:.2f}, "
            f"attach {row.attach_seconds:.2f} s {row.failure}",
            highlight=False,
            soft_wrap=True,
        )
        if args.output:  # written as it goes: a sweep that is cut off keeps what it found
            args.output.mkdir(parents=True, exist_ok=True)
            ordered = sorted(rows, key=lambda each: (each.family, each.model))
            (args.output / "coverage.json").write_text(json.dumps([asdict(each) for each in ordered], indent=1))
            (args.output / "coverage.md").write_text(freedom(ordered) if args.shapes_free else markdown(ordered))
    failed = Table("model", "failure", title="failed") if not all(row.passed for row in rows) else None
    for row in rows:
        if failed is not None and not row.passed:
            wrong = {name: told for name, told in row.free.items() if not shapes_free.holds(told)}
            failed.add_row(row.model, row.failure or f"error {row.error}, costs exact: {row.costs_exact} {wrong or ''}")
    if failed is not None:
        console.print(failed)
    console.print(freedom(rows) if args.shapes_free else summary(rows), highlight=False, soft_wrap=True)
    return 0 if failed is None else 1


if __name__ == "__main__":
    sys.exit(main())
