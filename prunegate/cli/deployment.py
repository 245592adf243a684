"""Export targets of a slim model, each verified by running what was written."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunegate.cli.eight_bits import quantise
from prunegate.errors import ExportError

__all__ = ["TARGETS", "deploy", "open_onnx"]

_Run = Callable[[Tensor], Tensor]

_TOLERANCE = 1e-4  # of float32 outputs; a share of the largest where that is below 1
_COMPILED_TOLERANCE = 1e-3  # compilers fuse and reorder sums
_LEAST_SECONDS = 1.0


def deploy(model: nn.Module, example: Tensor, folder: Path, targets: Sequence[str], *, check: bool = True,
           bench: bool = False, dense: nn.Module | None = None, calibration: Tensor | None = None,
           name: str = "model") -> list[dict[str, Any]]:  # fmt: skip
    """Writes a model in other forms.

    Args:
        model: Any model of one image tensor; put into eval mode.
        example: float32 ``[batch, channels, height, width]``.
        folder: Where files go; made where it is missing.
        targets: Names in :data:`TARGETS`.
        check: Whether each is run, at two batch sizes, and compared with the model.
        bench: Whether each is timed on the example.
        dense: What the model was cut from: where it is given, the same forms of it are timed in the same rounds.
        calibration: Images from which ``"int8"`` takes the ranges of activations; the example by default.
        name: Of the files, before their endings.

    Returns:
        One record per target: ``target``, ``file``, ``bytes``, ``error`` (largest difference, where checked; a share of
        the largest output if that is below 1), ``milliseconds`` (median, where timed) and ``dense_milliseconds``. The
        first is the model itself. ``"int8"`` has ``same`` too where it is checked and images are given: for what share
        of them the largest output is the model's; no labels are needed, and the ranges come from these images.

    Raises:
        ExportError: A target is not known, cannot be written, or computes something else.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise ExportError(f"--to {' '.join(unknown)} was given; expected some of {', '.join(TARGETS)}")
    folder.mkdir(parents=True, exist_ok=True)
    model = model.eval()
    batches = [example, example.repeat(3, *[1] * (example.dim() - 1))[: example.shape[0] + 2]]
    with torch.no_grad():
        wanted = [_first(model(batch)) for batch in batches]
    records = [{"target": "torch", "file": None, "bytes": None, "error": 0.0}]
    runners: dict[tuple[str, str], _Run] = {("torch", "milliseconds"): model}
    if dense is not None:
        runners["torch", "dense_milliseconds"] = dense.eval()
    seen = example if calibration is None else calibration
    written: dict[str, Path] = {}
    for target in targets:
        path = folder / f"{name}{_ENDINGS[target]}"
        run = _write(target, model, example, path, seen, written.get("onnx"))
        written[target] = path
        record: dict[str, Any] = {"target": target, "file": str(path) if path.exists() else None,
                                  "bytes": path.stat().st_size if path.exists() else None}  # fmt: skip
        if check:
            found = [run(batch) for batch in batches]
            record["error"] = max(_apart(a, b) for a, b in zip(found, wanted, strict=True))
            if target == "pt2":
                record["error"] = max(record["error"], _in_fresh_process(path, example, wanted[0]))
            if not record["error"] <= _ALLOWED[target]:
                raise ExportError(
                    f"{target} differs from the model by {record['error']:.3g}; allowed is "
                    f"{_ALLOWED[target]:.0e}"
                )
            if target == "int8" and calibration is not None and wanted[0].dim() > 1:
                record["same"] = _same_class(run, model, calibration)
        records.append(record)
        runners[target, "milliseconds"] = run
        if bench and dense is not None:
            with tempfile.TemporaryDirectory() as place:
                # Read into memory by its runtime: the file may go before it is timed.
                other = _write(target, dense, example, Path(place, path.name), seen, None)
            runners[target, "dense_milliseconds"] = other
    if bench:
        _time(records, runners, example)
    return records


def _write(target: str, model: nn.Module, example: Tensor, path: Path, calibration: Tensor, plain: Path | None) -> _Run:
    try:
        with _quiet():
            return TARGETS[target](model, example, path, calibration, plain)
    except ImportError as error:
        hint = "pip install prunegate[deploy]"
        raise ExportError(f"{target} needs a package that is not here ({error}); {hint}") from error
    except Exception as error:
        raise ExportError(f"{target}: {type(error).__name__}: {str(error)[:500]}") from error


def _first(output: Any) -> Tensor:
    leaf = torch.utils._pytree.tree_leaves(output)[0]
    assert isinstance(leaf, Tensor)
    return leaf


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / min(1.0, max(1e-6, float(wanted.abs().max()))))


@torch.no_grad()
def _same_class(run: _Run, model: nn.Module, images: Tensor) -> float:
    """Share of the images (or of their pixels, where there is an output for each) that both give one class."""
    equal = torch.cat([run(part).argmax(1) == _first(model(part)).argmax(1) for part in images.split(16)])
    return int(equal.sum()) / equal.numel()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk; what they have to say of a failure is in the exception."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _exported(model: nn.Module, example: Tensor) -> Any:
    """The model's graph, for any number of images."""
    two = example.repeat(2, *[1] * (example.dim() - 1))[:2]  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch", min=1, max=4096)
    return torch.export.export(model, (two,), dynamic_shapes=({0: batch},))


def _to_pt2(model: nn.Module, example: Tensor, path: Path, *_: Any) -> _Run:
    torch.export.save(_exported(model, example), path)
    loaded = torch.export.load(path).module()

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return _first(loaded(batch))

    return run


def _to_onnx(model: nn.Module, example: Tensor, path: Path, *_: Any) -> _Run:
    two = example.repeat(2, *[1] * (example.dim() - 1))[:2]
    program = torch.onnx.export(model, (two,), dynamo=True, input_names=["input"], output_names=["output"],
                                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
                                verbose=False)  # fmt: skip
    assert program is not None
    program.save(path, external_data=False)
    return open_onnx(path)


def open_onnx(path: Path) -> _Run:
    """A function that runs an ONNX file under onnxruntime, with as many threads as torch has now."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {entry: batch.numpy()})[0]))

    return run


def _to_int8(model: nn.Module, example: Tensor, path: Path, calibration: Tensor, plain: Path | None) -> _Run:
    """The ONNX graph in eight bits; it is read from ``plain`` where the model has just been written there."""
    with tempfile.TemporaryDirectory() as place:
        if plain is None:
            plain = Path(place, "plain.onnx")
            _to_onnx(model, example, plain)
        quantise(plain, path, calibration, open_onnx)
    return open_onnx(path)


def _to_compile(model: nn.Module, example: Tensor, path: Path, *_: Any) -> _Run:
    # As people call it. With dynamic=True sizes of images would be symbols, too: padding that follows them takes long.
    compiled = torch.compile(model)

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return _first(compiled(batch))

    run(example)
    return run


TARGETS: dict[str, Callable[[nn.Module, Tensor, Path, Tensor, Path | None], _Run]] = {
    "onnx": _to_onnx,
    "pt2": _to_pt2,
    "compile": _to_compile,
    "int8": _to_int8,
}
"""What a model can be written as. ``"compile"`` leaves no file: it only sees that ``torch.compile`` takes the model."""

_ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "compile": ".none", "int8": ".int8.onnx"}
# Eight bits are not meant to reproduce the outputs: what they cost is to be measured as accuracy, on images.
_ALLOWED = {"onnx": _TOLERANCE, "pt2": _TOLERANCE, "compile": _COMPILED_TOLERANCE, "int8": float("inf")}

_READER = """
import json, sys, torch
program, example, wanted = sys.argv[1:]
with torch.no_grad():
    out = torch.export.load(program).module()(torch.load(example, weights_only=True))
out = torch.utils._pytree.tree_leaves(out)[0]
wanted = torch.load(wanted, weights_only=True)
error = float((out - wanted).abs().max()) / min(1.0, max(1e-6, float(wanted.abs().max())))
print(json.dumps({"error": error, "foreign": sorted({"timm", "prunegate"} & set(sys.modules))}))
"""


def _in_fresh_process(path: Path, example: Tensor, wanted: Tensor) -> float:
    """The error of a program that another process loads, with neither timm nor this package."""
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, "example.pt"), Path(place, "wanted.pt")]
        for file, tensor in zip(files, (example, wanted), strict=True):
            torch.save(tensor, file)
        command = [sys.executable, "-W", "ignore", "-c", _READER, str(path.resolve()), *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    if done.returncode:
        raise ExportError(f"pt2: another process could not run it: {done.stderr.strip()[-300:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    if said["foreign"]:
        raise ExportError(f"pt2: running it imported {said['foreign']}; it should need torch alone")
    return float(said["error"])


def _time(records: list[dict[str, Any]], runners: Mapping[tuple[str, str], _Run], example: Tensor) -> None:
    """Median milliseconds, one run of each in turn, so that what else the machine does falls on all alike."""
    found: dict[tuple[str, str], list[float]] = {name: [] for name in runners}
    started = time.perf_counter()
    with torch.inference_mode():
        for run in runners.values():
            run(example)
        while len(found["torch", "milliseconds"]) < 7 or time.perf_counter() - started < _LEAST_SECONDS * len(runners):
            for name, run in runners.items():
                before = time.perf_counter()
                run(example)
                found[name].append((time.perf_counter() - before) * 1e3)
    for record in records:
        for (target, column), times in found.items():
            if target == record["target"]:
                record[column] = float(np.median(times))
