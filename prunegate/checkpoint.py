"""Slim models in one file: safetensors for the tensors, JSON for everything else. Nothing is ever unpickled.

The file names the constructor of the dense model and holds the plan of the cut. Loading builds the dense skeleton
without memory for its weights, cuts it along the plan, and puts the tensors in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunegate.builders import Limits, build, describe, names_in
from prunegate.errors import AttachError, CheckpointError, PlanError
from prunegate.example import describe_example
from prunegate.files import put_tensors
from prunegate.plan import Plan
from prunegate.slim.apply import apply_plan, plan_of
from prunegate.slim.slicing import check_tensors
from prunegate.tensors import is_channels_last, named_tensors, tensor_stores
from prunegate.valueless import check_runs, runs

__all__ = ["WEIGHTS", "load", "load_dense", "save"]

FORMAT = 1
"""Version of the file's layout."""

WEIGHTS = "model.safetensors"
"""The file's name where it is in a folder of its own."""

_KEY = "prunegate"
_FIELDS = frozenset({
    "format", "versions", "builder", "plan", "pretrained_cfg", "aliases", "channels_last", "fixed", "training",
    "digest",
})  # fmt: skip


def save(model: nn.Module, path: str | os.PathLike[str], builder: Callable[..., nn.Module] | None = None) -> None:
    """Writes a slim (or dense) model to one file, from which :func:`load` makes it again.

    The file is complete or not there: it is written beside ``path`` and then put in its place. Before that, the model
    is built again from what would be written, so that a file that was saved can be loaded.

    Args:
        model: What ``gated.export()`` or ``apply_plan`` gave, or a model that was never cut.
        path: Where to write; customarily it ends in ``.safetensors``.
        builder: What builds the dense model: a function or class that another process can import, or a
            ``functools.partial`` of one with plain arguments. Models of timm and transformers need none.

    Raises:
        CheckpointError: The model's constructor has no name, or does not build this model.

    Example:
        >>> import tempfile, timm, torch, prunegate
        >>> net = timm.create_model("test_vit", num_classes=3).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     prunegate.save(net, f"{folder}/net.safetensors")
        ...     twin = prunegate.load(f"{folder}/net.safetensors")
        >>> x = torch.randn(1, 3, 160, 160)
        >>> torch.equal(twin(x), net(x))
        True
    """
    model = _unwrapped(model)
    plan = plan_of(model)
    document: dict[str, Any] = {
        "format": FORMAT,
        "versions": _versions(),
        "builder": describe(model, builder),
        "plan": plan.to_json(),
        "pretrained_cfg": _plain_config(getattr(model, "pretrained_cfg", None)),
        "training": model.training,
    }
    tensors, document["aliases"] = _collect(model, _skeleton_names(model, document["builder"], plan))
    document["channels_last"] = sorted(name for name, tensor in tensors.items() if is_channels_last(tensor))
    document["fixed"] = sorted(
        name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    )
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document["digest"] = _digest(document, data)
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    try:
        put_tensors(Path(path), data, {_KEY: text})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def load(path: str | os.PathLike[str], allow: Collection[str] = ()) -> nn.Module:
    """Makes a model from a file that :func:`save` wrote, on the CPU, without its original weights.

    Args:
        path: The file, or a folder that holds it as ``model.safetensors``. It need not be trusted.
        allow: Modules (``"mypackage.models"``), or single constructors (``"mypackage.models:Net"``), that the file may
            name besides the models of timm, torchvision and transformers.

    Returns:
        The model, in the mode (train or eval) in which it was saved.

    Raises:
        CheckpointError: The file is not one of ours, is truncated or was altered, names what may not be called, or does
            not fit the library versions here.
    """
    path = _file(path)
    document, tensors = _read(path)
    try:
        plan = Plan.from_json(document["plan"])
        _check_sizes(plan, tensors)
        model = _assembled(document, plan, tensors, allow)
        config = document["pretrained_cfg"]
        if isinstance(config, dict) and isinstance(getattr(model, "pretrained_cfg", None), dict):
            own: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
            own.update(_tuples(config))
    except PlanError as error:
        raise CheckpointError(f"{path}: {error} ({_differences(document)})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error} ({_differences(document)})") from error
    except Exception as error:  # what a file can make of the library's own code has no end
        raise CheckpointError(
            f"{path} does not describe a model that can be built here: {type(error).__name__}: {str(error)[:300]} "
            f"({_differences(document)})"
        ) from error
    return model.train(document["training"])


def load_dense(path: str | os.PathLike[str], allow: Collection[str] = ()) -> nn.Module:
    """The dense model that a file's model was cut from: its architecture, with weights as they are initialised.

    Args:
        path: As for :func:`load`.
        allow: As for :func:`load`.

    Raises:
        CheckpointError: As for :func:`load`.
    """
    path = _file(path)
    document, tensors = _read(path)
    try:
        plan = Plan.from_json(document["plan"])
        shapes = [plan.dense.get(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        limits = Limits([*shapes, *(() for _ in document["aliases"])], len(plan.choices))
        dense = build(document["builder"], allow, limits)
        check_tensors(dense, plan)
    except (PlanError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error} ({_differences(document)})") from error
    return dense


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / WEIGHTS if path.is_dir() else path


# ---------------------------------------------------------------------- what is saved


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)  # a compiled model
    if not isinstance(inner, nn.Module):
        raise CheckpointError(f"a {type(model).__name__} was given; expected a torch.nn.Module")
    if isinstance(inner._modules.get("prunegate"), nn.Module):
        raise CheckpointError(f"a gated model ({type(inner).__name__}) was given; save what its export() returns")
    return inner


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for package in ("timm", "torchvision", "transformers", "prunegate"):
        with suppress(Exception):
            from importlib.metadata import version

            versions[package] = version(package)
    return versions


def _plain_config(config: Any) -> Any:
    """The entries of a pretrained configuration that JSON can hold."""
    if not isinstance(config, Mapping):
        return None
    plain = {}
    for key, value in config.items():
        with suppress(TypeError, ValueError):
            plain[str(key)] = json.loads(json.dumps(value, allow_nan=False))
    return plain


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _skeleton_names(model: nn.Module, entry: dict[str, Any], plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a loaded model will have; sees that they are those of ``model``.

    Raises:
        CheckpointError: The constructor builds something else.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(model)}
    target = entry["target"]
    try:
        skeleton = apply_plan(_dense(entry, names_in(entry), Limits(list(shapes.values()), len(plan.choices))), plan)
    except PlanError as error:
        raise CheckpointError(f"{target} does not build the model that was cut: {error}") from error
    built = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(skeleton)}
    registered = _registered(model, plan)
    odd = [
        f"{name} {shapes.get(name, 'missing here')} (built: {built.get(name, 'missing')})"
        for name in dict.fromkeys((*shapes, *built))
        # Plain attributes may be tables that a forward makes, of any size; if the skeleton has one, so must the model.
        if shapes.get(name) != built.get(name) and (name in registered or (name in built and name not in shapes))
    ]
    if odd:
        raise CheckpointError(
            f"{target} with the arguments that the model was made with does not build it again: {'; '.join(odd[:3])}"
            f"{' and more' if len(odd) > 3 else ''}. Pass builder= with something that builds the dense model as it "
            "was before the cut"
        )
    return built


def _registered(model: nn.Module, plan: Plan) -> set[str]:
    """Names of tensors whose sizes the constructor decides: parameters and buffers, of tied ones all.

    Where the plan has an example to try the model on, buffers outside the state dict are none of them: they may be
    tables that a forward makes, of any size.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        free = set() if plan.example is None else module._non_persistent_buffers_set
        names |= {f"{prefix}.{name}" if prefix else name for name in module._buffers.keys() - free}
    return names


def _collect(model: nn.Module, names: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, each once, and the further names of tied ones."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor, _ in named_tensors(model):
        if name not in names:  # computed in a forward and kept; it will be computed again
            continue
        if tensor.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no values to save")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases


def _digest(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Over everything that the file says."""
    digest = hashlib.sha256()
    said = {key: value for key, value in document.items() if key != "digest"}
    digest.update(json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------- what is loaded


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a file, checked against each other."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise CheckpointError(f"{path} is a safetensors file, but not one that prunegate.save() wrote")
            document = _document(text, path)
            # Copies: what the file gives lies in the mapped file itself, at any address and at the mercy of whoever
            # writes the file next; kernels may add in another order where memory is not aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it was truncated or altered, or is of another kind"
        ) from error
    try:
        digest = _digest(document, tensors)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is nested too deeply or odd ({error}); it was altered") from None
    if digest != document["digest"]:
        raise CheckpointError(f"{path} was altered after it was saved: its checksum does not match")
    return document, tensors


def _document(text: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is not JSON ({error}); it was altered") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: its metadata is a {type(document).__name__}; it was altered")
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {str(document.get('format'))[:20]!r}; this version reads format {FORMAT}. "
            "Update prunegate"
        )
    kinds: dict[str, Any] = {"versions": dict, "builder": dict, "plan": str, "aliases": dict, "channels_last": list,
                             "fixed": list, "training": bool, "digest": str}  # fmt: skip
    wrong = [key for key, kind in kinds.items() if not isinstance(document.get(key), kind)]
    if wrong or set(document) != _FIELDS:
        odd = wrong or sorted(set(document) ^ _FIELDS)
        raise CheckpointError(f"{path}: its metadata lacks or has wrong entries: {odd[:4]}; it was altered")
    return document


def _check_sizes(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Sees that the plan is one for these tensors, before anything is built."""
    for name in plan.dense:
        if name in tensors and tuple(tensors[name].shape) != plan.shape(name):
            raise CheckpointError(
                f"the plan leaves {name!r} of shape {plan.shape(name)}; the file has it in {tuple(tensors[name].shape)}"
            )


def _dense(entry: Any, allow: Collection[str], limits: Limits) -> nn.Module:
    """The dense model, with tensors that have no values wherever the constructor allows it."""
    try:
        with torch.device("meta"):
            dense = build(entry, allow, limits)
        if not any(tensor.is_meta for module in dense.modules() for tensor in _inside(module)):
            return dense
    except CheckpointError as error:
        if error.__cause__ is None:  # refused, not failed
            raise
    # A constructor that reads values of tensors, or keeps some in lists, must really run.
    return build(entry, allow, limits)


def _skeleton(document: Mapping[str, Any], plan: Plan, allow: Collection[str],
              shapes: Collection[Sequence[int]]) -> nn.Module:  # fmt: skip
    """The cut model, its tensors still to be given values."""
    limits = Limits(shapes, len(plan.choices))
    dense = _dense(document["builder"], allow, limits)
    check_tensors(dense, plan)
    try:
        cut = apply_plan(dense, plan)
        if plan.example is None and plan.kept:
            _check_on_own_input(dense, cut)
        return cut
    except PlanError as error:
        # The library's source is another than the plan was made for. What is kept still says what must change.
        from prunegate.rederive import rederive

        try:
            real = build(document["builder"], allow, limits)
            return apply_plan(dense, rederive(real, plan, document["pretrained_cfg"]))
        except PlanError as again:
            raise PlanError(f"{error}; {again}") from again


def _check_on_own_input(dense: nn.Module, cut: nn.Module) -> None:
    """Sees, where a plan tells no example, that what runs on its configuration's input size still runs when cut.

    Raises:
        PlanError: It does not.
    """
    from prunegate.gated import example_input_of  # which is loaded for such files alone

    if not all(parameter.is_meta for parameter in dense.parameters()):
        return  # of a size that a file tells nothing is made
    try:
        example = describe_example(example_input_of(dense))
    except AttachError:
        return
    if runs(dense, example):
        check_runs(cut, example)


def _assembled(document: Mapping[str, Any], plan: Plan, tensors: dict[str, Tensor],
               allow: Collection[str]) -> nn.Module:  # fmt: skip
    """The model with its tensors."""
    aliases = {str(name): str(first) for name, first in document["aliases"].items()}
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    model = _skeleton(document, plan, allow, [*shapes, *(() for _ in aliases)])
    fixed, channels_last = (set(map(str, document[key])) for key in ("fixed", "channels_last"))
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in channels_last and tensor.dim() != 4:
            raise CheckpointError(f"the file says that {name!r} of shape {tuple(tensor.shape)} is in channels_last")
        values[name] = tensor.clone(memory_format=torch.channels_last) if name in channels_last else tensor
    skeletons = {name: tensor.shape for name, tensor, _ in named_tensors(model)}
    _assign(model, values, aliases, fixed, _registered(model, plan))
    if plan.example is not None and any(value.shape != skeletons[name] for name, value in values.items()):
        check_runs(model, plan.example)  # with tables of the file's sizes, not of its own
    return model


def _inside(module: nn.Module) -> Iterator[Tensor]:
    """Tensors in the plain lists, tuples and dictionaries of a module, which have no names of their own."""
    own = {id(tensor) for store in (module._parameters, module._buffers) for tensor in store.values()}
    stack = [value for name, value in module.__dict__.items() if name not in ("_parameters", "_buffers", "_modules")]
    stack = [value for value in stack if isinstance(value, list | tuple | dict)]
    while stack:
        for item in stack.pop():
            if isinstance(item, Tensor) and id(item) not in own:
                yield item
            elif isinstance(item, list | tuple):
                stack.append(item)
            elif isinstance(item, dict):
                stack.append(list(item.values()))


def _assign(model: nn.Module, values: Mapping[str, Tensor], aliases: Mapping[str, str], fixed: set[str],
            registered: set[str]) -> None:  # fmt: skip
    """Puts tensors in the places of a skeleton's."""
    made: dict[str, Tensor] = {}
    replaced: dict[int, Tensor] = {}
    left = set(values) | set(aliases)
    for prefix, store, is_parameter in tensor_stores(model):
        for key, old in store.items():
            if not isinstance(old, Tensor):
                continue
            name = f"{prefix}.{key}" if prefix else key
            first = aliases.get(name, name)
            value = values.get(first)
            fits = value is not None and value.is_floating_point() == old.is_floating_point()
            if value is None or not fits or (name in registered and value.shape != old.shape):
                found = "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
                raise CheckpointError(
                    f"the model has {name!r} of shape {tuple(old.shape)} and type {old.dtype}; the file has {found}"
                )
            if first not in made:
                made[first] = nn.Parameter(value, first not in fixed and old.requires_grad) if is_parameter else value
            replaced[id(old)] = made[first]
            store[key] = made[first]
            left.discard(name)
    if left:
        raise CheckpointError(f"the file has tensors that the model does not: {sorted(left)[:4]}")
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, list):  # recurrent layers keep a second list of their weights
                value[:] = [replaced.get(id(item), item) for item in value]


def _differences(document: Mapping[str, Any]) -> str:
    """Versions with which the file was written and those here, where they differ."""
    here, saved = _versions(), document["versions"]
    odd = [
        f"{name} {saved.get(name)} then, {here.get(name)} here" for name in saved if saved.get(name) != here.get(name)
    ]
    return "; ".join(odd[:5]) or "same library versions as when it was saved"
