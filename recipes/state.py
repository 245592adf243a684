"""The state of a training run in one file: safetensors for the tensors, JSON for the rest. Nothing is ever unpickled.

A file is complete or not there, old ones are removed only when a newer one is whole, and a file that was altered is
refused. Reading runs no code, whatever the file says.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunegate import CheckpointError
from prunegate.files import put_tensors

__all__ = ["Interrupt", "Keeper", "capture_random", "isolated", "read_state", "restore_random", "restoring",
           "write_state"]  # fmt: skip

FORMAT = 1
"""Version of the file's layout."""

Item = TypeVar("Item")

_KEY = "prunegate_training"
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Writes nested dictionaries, lists and tuples of tensors, numbers, strings and ``None`` in one step.

    Raises:
        OSError: It cannot be written; what was at ``path`` is still there.
        TypeError: There is something else in it.
    """
    tensors: dict[str, Tensor] = {}
    document: dict[str, Any] = {"format": FORMAT, "state": _encode(state, tensors)}
    document["digest"] = _digest(document, tensors)
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    put_tensors(path, tensors, {_KEY: text})


def read_state(path: Path) -> Any:
    """What :func:`write_state` wrote. The file need not be trusted.

    Raises:
        CheckpointError: It is not a whole, unaltered file of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise CheckpointError(f"{path} is a safetensors file, but not the state of a training run")
            # Copies, as what the file gives lies in the mapped file itself, at addresses that are not aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); it was truncated or altered, or is "
                              "of another kind") from error  # fmt: skip
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or set(document) != {"format", "state", "digest"}:
            raise CheckpointError(f"{path}: its JSON is not the state of a training run; it was altered")
        if document["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {str(document['format'])[:20]}; this version reads {FORMAT}")
        if _digest(document, tensors) != document["digest"]:
            raise CheckpointError(f"{path} was altered after it was saved: its checksum does not match")
        return _decode(document["state"], tensors)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path}: its JSON is not a training state ({error}); it was altered") from error


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy: safetensors refuses tensors that share memory, and training goes on.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"map": [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be part of a training state")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | str | int | float):
        return value
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    match value:
        case {"tensor": str(name), **rest} if not rest and name in tensors:
            return tensors[name]
        case {"float": str(text), **rest} if not rest and text in _SPECIAL:
            return _SPECIAL[text]
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_decode(item, tensors) for item in items)
        case {"map": list(pairs), **rest} if not rest:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in pairs}
    raise ValueError("there is a value of an unknown kind")


def _digest(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    said = {key: value for key, value in document.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------- the files of a run


class Keeper:
    """The latest states of a run.

    Args:
        folder: Where they lie; made when the first is written.
        keep: How many stay.
        primary: Whether this process is the one that writes.

    Attributes:
        last: The newest file that this process wrote or read.
    """

    def __init__(self, folder: Path, keep: int = 2, primary: bool = True) -> None:
        self.folder, self.keep, self.primary = folder, max(keep, 1), primary
        self.last: Path | None = None

    def files(self) -> list[Path]:
        """The states, oldest first."""
        return sorted(self.folder.glob("*.safetensors"))

    def save(self, state: Mapping[str, Any], name: str) -> str | None:
        """Writes a state, then removes the oldest that are too many.

        Args:
            state: What a run needs to go on.
            name: Names sort in the order in which states are made.

        Returns:
            Why it could not be written, or ``None``. The older ones are untouched then, and training can go on.

        Raises:
            CheckpointError: Something in the state is not finite: it would be no state to go back to.
        """
        if not self.primary:
            return None
        odd = sorted(_not_finite(state.get("model", {})))
        if odd:
            raise CheckpointError(f"not finite: {', '.join(odd[:4])}{' and more' if len(odd) > 4 else ''}")
        path = self.folder / f"{name}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_state(state, path)
        except OSError as error:
            return f"{path} cannot be written: {error}"
        self.last = path
        for old in self.files()[: -self.keep]:
            with suppress(OSError):
                old.unlink()
        return None

    def latest(self) -> Any:
        """The newest state that can be read; ``None`` where there is no file at all.

        Raises:
            CheckpointError: There are files, but none is whole.
        """
        faults = []
        for path in reversed(self.files()):
            try:
                state = read_state(path)
            except CheckpointError as error:
                faults.append(str(error))
                continue
            self.last = path
            return state
        if faults:
            raise CheckpointError(f"no state in {self.folder} can be read: {faults[0]}")
        return None

    def clear(self) -> None:
        """Removes all states: the results are there."""
        for path in [*self.files(), *self.folder.glob(".*.part")]:
            path.unlink()
        with suppress(OSError):
            self.folder.rmdir()


def _not_finite(tensors: Mapping[str, Any]) -> Iterator[str]:
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            yield name


@contextmanager
def restoring(what: str) -> Iterator[None]:
    """Turns what a part of a run says of a state that does not fit into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"the saved state does not fit this run: {what}: {type(error).__name__}: "
                              f"{str(error)[:300]}") from error  # fmt: skip


# ---------------------------------------------------------------------- random numbers


def capture_random(device: torch.device) -> list[Any]:
    """State of every generator that training draws from, one entry for each process."""
    own = _random_here(device)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed:
        return [own]
    world = torch.distributed.get_world_size()
    gathered: list[dict[str, Any]] = [{} for _ in range(world)]
    for name, value in own.items():
        everyone = [torch.empty_like(value, device=device) for _ in range(world)]
        torch.distributed.all_gather(everyone, value.to(device))
        for rank, one in enumerate(everyone):
            gathered[rank][name] = one.cpu()
    return gathered


def restore_random(states: list[Any], rank: int, device: torch.device) -> None:
    """Takes over what :func:`capture_random` gave.

    Raises:
        CheckpointError: It is of a run with another number of processes, or is malformed.
    """
    with restoring("random numbers"):
        _set_random(states[rank], device)


def isolated(items: Iterable[Item], seed: int, device: torch.device) -> Iterator[Item]:
    """Goes through a loader with random numbers of its own.

    What it yields depends on the seed alone, and not on what training draws meanwhile: going through it again, without
    training, gives the same batches.
    """
    outside = _random_here(device)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's augmentation draws from it
    random.seed(seed)
    iterator, inside = None, _random_here(device)
    _set_random(outside, device)
    while True:
        outside = _random_here(device)
        _set_random(inside, device)
        try:
            iterator = iter(items) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            inside = _random_here(device)
            _set_random(outside, device)
        yield item


def _random_here(device: torch.device) -> dict[str, Tensor]:
    _kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - timm's mixup draws from it
    _version, words, following = random.getstate()
    own = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
        "rest": torch.tensor([place, has_gauss, gauss, math.nan if following is None else following],
                             dtype=torch.float64),
    }  # fmt: skip
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    return own


def _set_random(own: Mapping[str, Tensor], device: torch.device) -> None:
    place, has_gauss, gauss, following = own["rest"].tolist()
    keys = own["numpy"].numpy().astype(np.uint32)
    torch.set_rng_state(own["torch"])
    np.random.set_state(("MT19937", keys, int(place), int(has_gauss), gauss))  # noqa: NPY002
    random.setstate((3, tuple(own["python"].tolist()), None if math.isnan(following) else following))
    if "cuda" in own and device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], device)


# ---------------------------------------------------------------------- signals


class Interrupt:
    """Lets a step finish when a run is told to stop; the second Ctrl-C stops at once.

    Attributes:
        asked: Whether it was told to.
    """

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> Interrupt:
        """Listens to Ctrl-C; elsewhere than in the main thread nothing can."""
        with suppress(ValueError):
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Restores what was."""
        with suppress(ValueError, AttributeError):
            signal.signal(signal.SIGINT, self._before)
