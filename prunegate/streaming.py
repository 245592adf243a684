"""Cutting weights that nobody could hold: from sharded files to sharded files, a piece of one tensor at a time.

The model may be on the meta device all the way: it is built, labelled, planned and cut there, and only the kept rows
and columns of its weights are ever read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunegate.errors import CheckpointError
from prunegate.files import put_tensors, put_text
from prunegate.plan import Plan
from prunegate.slim.slicing import check_tensors

__all__ = ["cut_files"]

_INDEX = "model.safetensors.index.json"
_PIECE = 2**26  # bytes of a dense tensor that are read at once


def cut_files(model: nn.Module, plan: Plan, sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
              destination: str | os.PathLike[str], shard_size: int = 2**30) -> list[Path]:  # fmt: skip
    """Writes the weights that a plan leaves of a model's, from files to files, without ever holding all of them.

    Memory is that of one shard of the result and a piece of one tensor. ``apply_plan(model, plan)`` is the model that
    the weights are for; give them to it with ``load_state_dict(..., assign=True)``.

    Args:
        model: The dense model that the plan was made for, customarily on the meta device; only its names and shapes
            are looked at.
        plan: What stays.
        sources: The dense weights: one safetensors file or several, an index (``*.safetensors.index.json``, as
            transformers and timm write it), or a folder with an index or files.
        destination: A folder, made if need be, for ``model-00001-of-0000N.safetensors``, their index, and
            ``plan.json``.
        shard_size: Most bytes of a shard, unless one tensor alone is larger.

    Returns:
        The shards, in order.

    Raises:
        CheckpointError: Weights are missing, of another shape or not the model's, or a file cannot be read or written.
        PlanError: The plan was made for another model.
    """
    if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
        raise CheckpointError(f"shard_size={shard_size!r} was given; expected a number of bytes, 1 or more")
    check_tensors(model, plan)
    destination = Path(destination)
    files = _files(sources)
    if destination.resolve() in {file.resolve().parent for file in files.values()}:
        raise CheckpointError(f"{destination} holds the dense weights; name another folder for what is left of them")
    try:
        sizes = _check(model, plan, files)
        shards = _grouped(sizes, shard_size)
        destination.mkdir(parents=True, exist_ok=True)
        names = [f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors" for at in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            cut = {each: _read(files[each], each, plan).contiguous() for each in shard}
            put_tensors(destination / name, cut, {"format": "pt"})
        where = {each: name for name, shard in zip(names, shards, strict=True) for each in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        put_text(destination / "plan.json", plan.to_json())
        put_text(destination / _INDEX, json.dumps(index, indent=1))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the weights cannot be cut into {destination}: {error}") from error
    return [destination / name for name in names]


def _files(sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """The file of each tensor."""
    given = [Path(each) for each in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    if len(given) == 1 and given[0].is_dir():
        folder = given[0]
        given = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
        if not given:
            raise CheckpointError(f"the folder {folder} has no *.safetensors.index.json and no *.safetensors")
    if len(given) == 1 and given[0].name.endswith(".json"):
        return _indexed(given[0])
    found: dict[str, Path] = {}
    for path in given:
        try:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error})") from error
    return found


def _indexed(path: Path) -> dict[str, Path]:
    try:
        places = json.loads(path.read_text())["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of safetensors files: {type(error).__name__}: {error}") from error
    for file in set(named.values()):
        if Path(file).name != file or not (path.parent / file).is_file():
            raise CheckpointError(f"{path} names {file[:80]!r}, which is not a file beside it")
    return {name: path.parent / file for name, file in named.items()}


def _check(model: nn.Module, plan: Plan, files: Mapping[str, Path]) -> dict[str, int]:
    """Sees that the files hold the model; bytes of each tensor after the cut, in the model's order."""
    held = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in held.items():
        if name in files:
            first[id(tensor)] = name
    missing = [name for name, tensor in held.items() if id(tensor) not in first]
    foreign = [name for name in files if name not in held]
    if missing or foreign:
        raise CheckpointError(
            f"the weights are not those of this {type(model).__name__}: they lack {missing[:3]} ({len(missing)}) and "
            f"have {foreign[:3]} besides ({len(foreign)})"
        )
    sizes = {}
    for name in held:
        if name not in files:  # tied to one that is there
            continue
        with safe_open(files[name], "pt") as file:
            if name not in file.keys():
                raise CheckpointError(f"the index says that {files[name]} holds {name!r}; it does not")
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(held[name].shape):
                raise CheckpointError(f"{files[name]} has {name!r} of shape {shape}; the model's is "
                                      f"{tuple(held[name].shape)}")  # fmt: skip
            bits = re.match(r"[A-Z]+(\d+)", str(file.get_slice(name).get_dtype()))  # of F32, BF16, BOOL, ...
        count = math.prod(plan.shape(name) if name in plan.kept else shape)
        sizes[name] = count * (int(bits.group(1)) // 8 if bits else 1)
    return sizes


def _grouped(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def _read(path: Path, name: str, plan: Plan) -> Tensor:
    """What stays of one tensor."""
    with safe_open(path, "pt") as file:
        dims = plan.kept.get(name)
        if not dims:
            return file.get_tensor(name)
        stored = file.get_slice(name)
        rest = {dim: torch.tensor(positions) for dim, positions in dims.items() if dim}
        rows = dims.get(0, range(plan.dense[name][0]))
        cut: Tensor | None = None
        at = 0
        for start, stop in _runs(rows, max(1, _PIECE // (4 * math.prod(plan.dense[name][1:])))):
            piece = stored[start:stop]
            for dim, positions in rest.items():
                piece = piece.index_select(dim, positions)
            if cut is None:
                cut = piece.new_empty(plan.shape(name))
            cut[at : at + stop - start] = piece
            at += stop - start
    assert cut is not None  # a plan keeps something of every dimension
    return cut


def _runs(positions: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive positions as (start, stop), none longer than ``longest``."""
    breaks = [0, *(at + 1 for at, (a, b) in enumerate(pairwise(positions)) if b != a + 1), len(positions)]
    for begin, end in pairwise(breaks):
        for start in range(positions[begin], positions[begin] + end - begin, longest):
            yield start, min(start + longest, positions[begin] + end - begin)
