"""Running a model for the shapes of its tensors alone: on the meta device, where nothing is computed or held."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunegate.errors import PlanError
from prunegate.example import example_from
from prunegate.tensors import attributes_kept, call_model, fit_inputs, tensor_stores

__all__ = ["check_runs", "runs", "without_values"]

_OPERATIONS = 20_000
"""How many operations any model may take, and how many more each of its modules."""
_EACH = 500


class _Counted(TorchDispatchMode):
    """Stops a forward that never ends."""

    def __init__(self, most: int) -> None:
        from prunegate.labels.shapes import Blanks, plain_name  # no part of what a slim model needs to be loaded

        super().__init__()
        self.left = most
        self.run, self.name = Blanks().run, plain_name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation."""
        self.left -= 1
        if self.left < 0:
            raise PlanError("one forward of the model takes more operations than its modules account for")
        return self.run(func, self.name(func), args, kwargs or {})


@contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """Inside, a model's tensors have their shapes, types and layouts but no values; outside, all is as it was."""
    plain: dict[int, Tensor] = {}
    swapped: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = []

    def bare(value: Any) -> Any:
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.is_meta:
            return value
        if id(value) not in plain:
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            is_parameter = isinstance(value, nn.Parameter)
            plain[id(value)] = nn.Parameter(made, value.requires_grad) if is_parameter else made
        return plain[id(value)]

    # What a forward leaves in plain attributes has no values either, and goes.
    with attributes_kept(model):
        try:
            for _, store, _ in tensor_stores(model):
                found = {key: value for key, value in store.items() if isinstance(value, Tensor)}
                swapped.append((store, found))
                for key, value in found.items():
                    store[key] = bare(value)
            for module in model.modules():
                for key, value in module.__dict__.items():
                    if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
                        module.__dict__[key] = [bare(item) for item in value]
            yield
        finally:
            for store, found in swapped:
                for key, value in found.items():
                    store[key] = value


def _run(model: nn.Module, described: Any) -> None:
    modes = [(module, module.training) for module in model.modules()]
    inputs = example_from(described)
    try:
        with without_values(model), torch.no_grad(), _Counted(_OPERATIONS + _EACH * len(modes)):
            model.eval()
            call_model(model, fit_inputs(inputs, model))
    finally:
        for module, training in modes:
            module.training = training


def runs(model: nn.Module, described: Any) -> bool:
    """Whether a model runs without values on an example input; some ask what is in a tensor.

    Args:
        model: The model, with or without values. It is left as it is.
        described: What ``describe_example`` told of the input.
    """
    try:
        _run(model, described)
    except Exception:  # whatever a forward may raise
        return False
    return True


def check_runs(model: nn.Module, described: Any) -> None:
    """Sees that a cut model runs, as far as shapes go, on the input that its plan was made for.

    Args:
        model: The cut model, with or without values. It is left as it is.
        described: What ``describe_example`` told of an input on which the dense model runs without values.

    Raises:
        PlanError: It does not run; says why.
    """
    try:
        _run(model, described)
    except NotImplementedError:  # an operation that this version of torch knows no shapes of
        return
    except Exception as error:
        raise PlanError(
            f"the cut {type(model).__name__} does not run on the input that the plan was made for: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
