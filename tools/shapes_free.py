"""What people do with a model besides running it as it was traced, done with a slim one.

Each check says "ok", why the dense model itself cannot ("dense: ..."), or what is wrong with the slim model.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import prunegate
from prunegate.labels.trace import call_model

__all__ = ["CHECKS", "COMPILED", "OK", "check", "holds"]

OK = "ok"
RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
"""Modules that drop at random; so do those with a ``drop_prob`` of their own."""


class DenseCannot(Exception):
    """The dense model does not do it either."""


def holds(outcome: str) -> bool:
    """Whether a check's outcome is no fault of the slim model."""
    return outcome == OK or outcome.startswith("dense: ")


def check(model: nn.Module, gated: Any, slim: nn.Module, example: Any, bound: float,
          compiled: bool = False) -> dict[str, str]:  # fmt: skip
    """Runs every check.

    Args:
        model: The dense model, in eval mode and float64.
        gated: What was attached to it, with the mask that was cut.
        slim: The cut model.
        example: What it was traced on.
        bound: How far outputs may be apart, of the largest.
        compiled: Whether to compile and to export, too, which takes a while.
    """
    outcomes = {}
    for name, function in {**CHECKS, **(COMPILED if compiled else {})}.items():
        try:
            function(model, gated, slim, example, bound)
            outcomes[name] = OK
        except DenseCannot as reason:
            outcomes[name] = f"dense: {reason}"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        finally:
            for each in (model, gated, slim):
                each.eval()
    return outcomes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _same(expected: Any, actual: Any, bound: float) -> None:
    for a, b in zip(_tensors(expected), _tensors(actual), strict=True):
        apart = float((a - b).detach().abs().max()) / max(float(a.detach().abs().max()), 1e-30)
        if not apart <= bound:
            raise AssertionError(f"outputs are {apart:.1e} apart")


def _try_dense(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        raise DenseCannot(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from error


def _batch(model: nn.Module, gated: Any, slim: nn.Module, example: Any, bound: float) -> None:
    """Three samples instead of the example's one."""
    def more(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        repeated = torch.cat([leaf] * 3)[:3]
        return torch.randn_like(repeated) if leaf.is_floating_point() else repeated

    inputs = tree_map(more, example)
    with torch.no_grad():
        _try_dense(lambda: call_model(model, inputs))
        _same(call_model(gated, inputs), call_model(slim, inputs), bound)


def _resolution(model: nn.Module, gated: Any, slim: nn.Module, example: Any, bound: float) -> None:
    """An image of another size, and not a square."""
    if not isinstance(example, Tensor) or example.ndim != 4:
        raise DenseCannot("takes no image")
    height, width = example.shape[2:]
    smaller = max(height - 64, 64) if height > 64 else height + 32
    inputs = torch.randn(*example.shape[:2], smaller, width, dtype=example.dtype)
    with torch.no_grad():
        _try_dense(lambda: call_model(model, inputs))
        _same(call_model(gated, inputs), call_model(slim, inputs), bound)


def _without_chance(model: nn.Module) -> nn.Module:
    """A copy in train mode that drops nothing; batch norms train."""
    duplicate = copy.deepcopy(model).train()
    for module in duplicate.modules():
        if isinstance(module, RANDOM):
            module.eval()
        for name in ("drop_prob", "drop_path_rate"):
            if isinstance(getattr(module, name, None), float):
                module.eval()
    return duplicate


def _two(example: Any) -> Any:
    """A batch of two, for batch norms in train mode."""
    return tree_map(lambda leaf: torch.cat([leaf, leaf.flip(-1)])[:2] if isinstance(leaf, Tensor) else leaf, example)


def _training(model: nn.Module, gated: Any, slim: nn.Module, example: Any, bound: float) -> None:
    """Every parameter that gets a gradient in the dense model gets one in the slim model."""
    reached = []
    for network in (model, slim):
        copied = _without_chance(network)

        def step(copied: nn.Module = copied) -> None:
            loss = sum((out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)).sum()
                       for out in _tensors(call_model(copied, _two(example))))  # fmt: skip
            loss.backward()  # type: ignore[union-attr]

        _try_dense(step) if network is model else step()
        grads = {name: parameter.grad for name, parameter in copied.named_parameters()}
        reached.append({name for name, grad in grads.items() if grad is not None})
    lost = reached[0] - reached[1]
    if lost:
        raise AssertionError(f"no gradient reaches {sorted(lost)[:3]}")


def _copies(model: nn.Module, gated: Any, slim: nn.Module, example: Any, bound: float) -> None:
    """deepcopy, state_dict and back, pickle, torch.save; and source that can be read where it was edited."""
    with torch.no_grad():
        before = call_model(slim, example)
        duplicate = copy.deepcopy(slim)
        state = {name: value.clone() for name, value in slim.state_dict().items()}
        for parameter in duplicate.parameters():
            parameter.zero_()
        duplicate.load_state_dict(state)
        _same(before, call_model(duplicate, example), 0.0)
        _try_dense(lambda: pickle.dumps(model))
        _same(before, call_model(pickle.loads(pickle.dumps(slim)), example), 0.0)
        file = io.BytesIO()
        torch.save(slim, file)
        file.seek(0)
        _same(before, call_model(torch.load(file, weights_only=False), example), 0.0)
    for dense, cut in zip(model.modules(), slim.modules(), strict=True):
        if type(cut) is not type(dense):
            edited = [value for value in vars(type(cut)).values() if inspect.isfunction(value)]
            sources = [inspect.getsource(function).strip() for function in edited]
            if not sources or not all(source.startswith(("def ", "@")) for source in sources):
                raise AssertionError(f"no source of {type(cut).__name__}")


def _file(model: nn.Module, gated: Any, slim: nn.Module, example: Any, bound: float) -> None:
    """The library's own file."""
    if not hasattr(model, "pretrained_cfg"):
        raise DenseCannot("has no constructor by name")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slim.safetensors"
        prunegate.save(slim, path)
        loaded = prunegate.load(path)
    with torch.no_grad():
        _same(call_model(slim, example), call_model(loaded.to(next(slim.parameters()).dtype).eval(), example), 0.0)


def _compile(model: nn.Module, gated: Any, slim: nn.Module, example: Any, bound: float) -> None:
    """torch.compile into one graph; values need not be the same bits."""
    for network in (model, slim):
        torch._dynamo.reset()
        run = torch.compile(network, backend="eager", fullgraph=True)
        with torch.no_grad():
            out = _try_dense(lambda run=run: call_model(run, example)) if network is model else call_model(run, example)
    _same(call_model(slim, example), out, bound)


def _export(model: nn.Module, gated: Any, slim: nn.Module, example: Any, bound: float) -> None:
    """torch.export."""
    inputs = example if isinstance(example, tuple) else (example,)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        _try_dense(lambda: torch.export.export(model, inputs))
        program = torch.export.export(slim, inputs)
        _same(call_model(slim, example), program.module()(*inputs), bound)


Check = Callable[[nn.Module, Any, nn.Module, Any, float], None]

CHECKS: dict[str, Check] = {
    "batch": _batch,
    "resolution": _resolution,
    "training": _training,
    "copies": _copies,
    "file": _file,
}

COMPILED: dict[str, Check] = {"compile": _compile, "export": _export}
