"""Static quantisation of an ONNX file to eight bits, with the ranges of activations that serve its outputs best."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["quantise"]

_BATCH = 16
# Shares of the values seen, in per cent, that a range covers. One far-off value in a layer costs all others their
# digits: a network with squeeze-and-excitation lost 21 points of accuracy with full ranges, and 4 with the narrower.
_COVERED = (100.0, 99.99)


def quantise(plain: Path, path: Path, images: Tensor, open_file: Callable[[Path], Callable[[Tensor], Tensor]]) -> None:
    """Writes the graph with int8 weights, by channel, and uint8 activations (onnxruntime's QDQ format).

    Ranges of activations come from images: all values seen, or all but the outermost 0.01%, whichever leaves the
    outputs on these images nearer to those of ``plain`` (by the mean of each image's relative error, of which none
    counts more than 1: a single far-off image decides nothing). No labels are needed.

    Args:
        plain: The float32 graph, with one input, named ``input``.
        path: Where the quantised graph goes.
        images: float32 ``[n, channels, height, width]``; they are seen a few at a time.
        open_file: Gives a function that runs a file.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    parts = images.split(_BATCH)

    class Images(CalibrationDataReader):
        """The images; the calibrator asks for them batch by batch, and so need not hold all activations at once."""

        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(parts)

        def __len__(self) -> int:
            return len(parts)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(parts[start_index:end_index])

        def get_next(self) -> Any:
            part = next(self.left, None)
            return None if part is None else {"input": part.numpy()}

    run = open_file(plain)
    wanted = [run(part) for part in parts]
    with tempfile.TemporaryDirectory() as place:
        ready = Path(place, "ready.onnx")
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
        errors: dict[Path, float] = {}
        for covered in _COVERED:
            file = Path(place, f"{covered}.onnx")
            method = CalibrationMethod.MinMax if covered == 100 else CalibrationMethod.Percentile
            # "Strided" means batch by batch, under either method.
            quantize_static(str(ready), str(file), Images(), quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=method,
                            extra_options={"CalibStridedMinMax": 1, "CalibPercentile": covered})  # fmt: skip
            run = open_file(file)
            errors[file] = sum(_relative_error(run(part), right) for part, right in zip(parts, wanted, strict=True))
        shutil.move(min(errors, key=errors.__getitem__), path)


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """The relative errors of the images' outputs, each at most 1, summed up."""
    difference, size = (rows.reshape(len(rows), -1).norm(dim=1) for rows in (found - wanted, wanted))
    return float((difference / size.clamp(min=1e-12)).clamp(max=1).sum())
