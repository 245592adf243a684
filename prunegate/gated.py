"""The wrapped model: the user's network with a gate on every unit."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunegate.cost import Cost
from prunegate.errors import AttachError, ExportError, MaskError
from prunegate.gates import Gates
from prunegate.groups import Frozen, GateMap, Group, find_frozen
from prunegate.labels.trace import Trace, call_model
from prunegate.operators import chosen_by
from prunegate.plan import Plan
from prunegate.planning import Planner
from prunegate.slim.apply import cut_along
from prunegate.tensors import computed_tensors, fit_inputs, set_attributes_back

__all__ = ["GatedModel", "drawn_alike"]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


class GatedModel(nn.Module):
    """A model with a gate on every removable unit. Made by :func:`prunegate.attach`.

    It shares parameters and buffers with the model it was made from, under the same names; the gates' logits are one
    more parameter, ``prunegate.logits``. Until a ``Budget`` starts, or a mask is assigned, it computes exactly what
    the model does.

    Attributes:
        model: The network that runs: a copy of the given model's modules over the same parameters.
        groups: The gate groups.
        cost: FLOPs and parameters of any mask.
        example_input: The input on which the model was traced.
        prunegate: The gates.
        gate_map: Which gate decides about each position of each tensor dimension.
        trace: The labelled forward that all this was read from.
        planner: Plans cuts.
    """

    prunegate: Gates
    model: nn.Module

    def __init__(self, dense: nn.Module, running: nn.Module, gates: Gates, groups: Sequence[Group],
                 cost: Cost, gate_map: GateMap, trace: Trace,
                 example_input: Any) -> None:  # fmt: skip
        super().__init__()
        # The running model's children are this module's children, so that names, state dicts and optimizers see no
        # wrapper; the model itself is kept out of the module tree.
        self.__dict__["model"] = running
        self.__dict__["_dense"] = dense
        self._parameters = running._parameters
        self._buffers = running._buffers
        self._non_persistent_buffers_set = running._non_persistent_buffers_set
        self._modules = {**running._modules, "prunegate": gates}
        self.training = running.training
        self.groups = tuple(groups)
        self.cost = cost
        self.example_input = example_input
        self.gate_map = gate_map
        self.trace = trace
        self.planner = Planner(trace, self.groups, gate_map, example_input)
        self._has_fused_attention = any(
            isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for module in running.modules()
        )
        # All ranks draw the same gates from one seed, and the budget reduces the logits' gradient, one small vector a
        # step: nothing of the gates is left for DDP to send.
        own = [*gates._parameters, *gates._buffers]
        self._ddp_params_and_buffers_to_ignore = [f"prunegate.{name}" for name in own]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model with the gates of this step: one sample per forward in train mode, a hard mask in eval."""
        self.prunegate.draw(self.training)
        if not self._has_fused_attention or self.prunegate.sample.pieces is None:
            return self.model(*args, **kwargs)
        # torch's own inference path through its attention layers reads weights behind the gates' back.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return self.model(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own ``forward_features``, gated."""
        self.prunegate.draw(self.training)
        return self.model.forward_features(*args, **kwargs)  # type: ignore[operator]

    def train(self, mode: bool = True) -> GatedModel:
        """Sets train or eval mode on the model and everything in it."""
        super().train(mode)
        self.model.training = mode
        if not mode:
            self.prunegate.refresh()
        return self

    def __getattr__(self, name: str) -> Any:
        # What timm's tools ask of a model (pretrained_cfg, no_weight_decay, group_matcher, ...) the model answers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("model")
            if model is None or not hasattr(model, name):
                raise
            return getattr(model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> GatedModel:
        # The trace describes the architecture, not the weights: copies share it.
        for shared in (self.trace, self.gate_map, self.cost, self.groups, self.planner):
            memo[id(shared)] = shared
        memo.update(computed_tensors(self.model) | computed_tensors(self._dense))
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        duplicate.cost = self.cost.of(duplicate.prunegate)
        return duplicate

    # ------------------------------------------------------------------ gates

    @property
    def logits(self) -> nn.Parameter:
        """Every gate of the model, float32 ``[n_gates]``."""
        return self.prunegate.logits

    @functools.cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """What cannot be pruned: for each dimension of each parameter how many positions, and what decided it."""
        return find_frozen(self.trace)

    @property
    def mask(self) -> Tensor:
        """The current hard mask, bool ``[n_gates]``: True where a unit stays.

        All True after ``attach``; during a search the selection for the current target. Assigning a mask fixes it in
        train and eval mode, assigning ``None`` releases it. Of a group inside a removed branch one unit stays marked.

        Raises:
            MaskError: On assignment of a mask of the wrong type or length, or that empties a layer.
        """
        return self.prunegate.mask().clone()

    @mask.setter
    def mask(self, mask: Tensor | Sequence[bool] | None) -> None:
        gates = self.prunegate
        if mask is None:
            gates.phase = "open" if gates.selector is None else "search"
            return
        checked = self._check_mask(mask)
        gates.fixed_mask.copy_(checked)
        gates.phase = "fixed"

    def choose(self, operators: Mapping[str, str]) -> None:
        """Fixes the mask with these operators; units, and other choices, stay as they are in the current mask.

        Args:
            operators: Name of the operator by name of the choice (its module's qualified name, or its key).

        Raises:
            MaskError: There is no such choice or operator.
        """
        mask = self.mask
        for name, operator in operators.items():
            record = self.trace.choices.get(name)
            if record is None:
                raise MaskError(f"there is no choice {name!r}; there are {list(self.trace.choices)}")
            if operator not in record.options:
                raise MaskError(f"the choice {name!r} has no operator {operator!r}; it has {list(record.options)}")
            own = self.gate_map.choices[name]
            mask[own] = False
            mask[own.start + record.options.index(operator)] = True
        self.mask = mask

    @property
    def chosen(self) -> dict[str, str]:
        """Name of the operator that the current mask leaves of each choice, by name of the choice."""
        mask = self.mask.cpu()
        return {name: self.trace.choices[name].options[index] for name, index in chosen_by(self.gate_map, mask).items()}

    def _check_mask(self, mask: Tensor | Sequence[bool]) -> Tensor:
        n = self.logits.numel()
        given = torch.as_tensor(mask)
        if given.dtype != torch.bool:
            raise MaskError(
                f"a mask of type {given.dtype} was given; expected torch.bool, True where a unit stays "
                "(compare your scores with a threshold)"
            )
        if given.shape != (n,):
            raise MaskError(
                f"a mask of shape {tuple(given.shape)} was given; expected ({n},), one entry for each gate in "
                "gated.logits"
            )
        given = given.detach().to("cpu").clone()
        for name, own in self.gate_map.choices.items():
            if int(given[own].sum()) != 1:
                raise MaskError(
                    f"the mask keeps {int(given[own].sum())} operators of the choice {name!r} (gates {own.start} to "
                    f"{own.stop - 1}); exactly one must stay"
                )
        removed = frozenset[str]().union(*(block.tensors for block in self.gate_map.removed(given)))
        for group in self.groups:
            # What is inside a removed branch does not matter, but it runs, and must not divide by nothing.
            if group.members and all(tensor in removed for tensor, _ in group.members) and not given[group.slice].any():
                given[group.slice.start] = True
        for (tensor, dim), index in (*self.gate_map.dims.items(), *self.gate_map.inner.items()):
            if bool((index >= 0).all()) and not bool(given[index].any()):
                group = self._group_of(int(index[0]))
                raise MaskError(
                    f"the mask removes every position of {tensor!r} along dimension {dim}; a layer must keep at "
                    f"least one unit: keep one of group {group.name!r} (gates {group.slice.start} to "
                    f"{group.slice.stop - 1})"
                )
        for group in self.groups:
            if group.kind == "head_dim" and not bool(given[group.slice].any()):
                raise MaskError(
                    f"the mask removes every position inside the heads of {group.name!r} (gates {group.slice.start} to "
                    f"{group.slice.stop - 1}); at least one must stay"
                )
        return given

    def _group_of(self, gate: int) -> Group:
        return next(group for group in self.groups if group.slice.start <= gate < group.slice.stop)

    # ------------------------------------------------------------------ what comes out

    def plan(self) -> Plan:
        """What is kept of every tensor under the current mask, and what else must change for it.

        Where a model's own arithmetic cannot be made to follow a cut, the units that it depends on are kept: the mask
        is fixed with them open, and a warning names the place and their number.

        Raises:
            ExportError: Even so the cut model does not run.
        """
        planned = self.planner.plan(self._check_mask(self.mask))
        for kept in planned.kept:
            warnings.warn(
                f"{kept.why}; {int(kept.gates.sum())} units that the mask removes there are kept, so the slim model "
                "costs more than the mask says",
                stacklevel=2,
            )
        if planned.kept:
            self.mask = planned.mask
        return planned.plan

    def export(self, flops: float | None = None) -> nn.Module:
        """A plain model of the same class without the removed units; this one stays usable.

        The result is checked: on a random batch it must compute what the masked model does (without values, on the
        meta device, there is nothing to compare). In the middle of a search
        the current selection is cut, and a warning says so.

        Args:
            flops: After a search for several budgets (``Budget(gated, flops=[most, ..., least])``), any budget between
                the largest and the smallest: a share of the dense model's FLOPs, or an absolute number. The mask stays
                as it is. Batch norms' statistics are those of all budgets together: re-estimate them.

        Raises:
            ExportError: The two disagree; says by how much. Or there was no search that ``flops`` could be cut from.
        """
        if flops is not None:
            return self._export_at(flops)
        if self.prunegate.phase == "search":
            warnings.warn(
                "export() in the middle of a search cuts the selection for the current target; call "
                "budget.finish() first for the final one",
                stacklevel=2,
            )
        plan = self.plan()
        slim = cut_along(self._dense, plan)
        set_attributes_back(slim, self.trace.changed)  # what the model kept from its last forward, at dense sizes
        slim.train(self.training)
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            self._check(slim)
        return slim

    def _export_at(self, flops: float) -> nn.Module:
        gates = self.prunegate
        if gates.selector is None:
            raise ExportError(
                f"export(flops={flops!r}) was asked for before any search; make a Budget(gated, flops=[most, ..., "
                "least]) and train, or assign a mask and call export()"
            )
        phase, fixed = gates.phase, gates.fixed_mask.clone()
        try:
            self.mask = gates.selector(flops)
            return self.export()
        finally:
            gates.phase = phase
            gates.fixed_mask.copy_(fixed)

    def _check(self, slim: nn.Module) -> None:
        inputs = _random_like(fit_inputs(self.example_input, self))
        modes = [(module, module.training) for module in (*self.modules(), self.model, *slim.modules())]
        gates = self.prunegate
        phase, fixed = gates.phase, gates.fixed_mask.clone()
        try:
            gates.fixed_mask.copy_(self.mask)
            gates.phase = "fixed"
            self.eval()
            slim.eval()
            with torch.no_grad():
                masked, cut = (_tensors(drawn_alike(model, inputs, self.logits.device)) for model in (self, slim))
        finally:
            gates.phase = phase
            gates.fixed_mask.copy_(fixed)
            for module, training in modes:
                module.training = training
        dtype = max(self.trace.precision, masked[0].dtype, key=lambda each: torch.finfo(each).eps)
        tolerance = _TOLERANCE.get(dtype, 5e-2)
        for a, b in zip(masked, cut, strict=True):
            scale = float(a.abs().max()) if a.numel() else 0.0
            error = float((a - b).abs().max()) if a.numel() else 0.0
            if not error <= tolerance * max(scale, 1e-6):
                raise ExportError(
                    f"the slim model differs from the masked one by {error:.3g} (outputs are up to {scale:.3g}); "
                    "this is a fault in the library: please report the model and gated.mask"
                )

    def __repr__(self) -> str:
        kept = self.mask
        lines = [
            f"GatedModel({type(self.model).__name__}: {self.logits.numel()} gates in {len(self.groups)} groups, "
            f"{self.cost.flops(kept) / max(self.cost.flops(), 1):.1%} of {self.cost.flops():,} FLOPs kept "
            "(one multiply-add is one FLOP))",
            f"  {'group':<40} {'kind':<10} {'units':>6} {'kept':>6}  tensors",
        ]
        for group in self.groups:
            lines.append(
                f"  {group.name:<40} {group.kind:<10} {group.size:>6} {int(kept[group.slice].sum()):>6}  "
                f"{len(group.members)}"
            )
        if self.frozen:
            lines.append(f"  frozen: {len({item.tensor for item in self.frozen})} tensors in part; see gated.frozen")
        return "\n".join(lines)


def drawn_alike(model: nn.Module, inputs: Any, device: torch.device) -> Any:
    """Runs a model that may draw numbers in eval mode, too; the next one draws the same."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return call_model(model, inputs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _random_like(inputs: Any) -> Any:
    """An input of the same shapes; integers (tokens) stay as they are."""
    generator = torch.Generator().manual_seed(0)

    def fresh(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        return leaf

    return tree_map(fresh, inputs)


def example_input_of(model: nn.Module) -> Tensor:
    """A batch of one from the model's pretrained configuration, on the model's device and in its type.

    Raises:
        AttachError: The model has no such configuration.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    if not size:
        raise AttachError(
            f"{type(model).__name__} has no pretrained_cfg to take an input size from; pass example_input= "
            "(a tensor, a tuple of positional or a dict of keyword inputs)"
        )
    # The configuration describes the pretrained weights; what the model was built with stands beside it.
    built: Mapping[str, Any] = getattr(model, "_model_args", None) or {}
    channels = built.get("in_chans", size[0])
    image = built.get("img_size") or size[1:]
    image = (image, image) if isinstance(image, int) else tuple(image)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn((1, channels, *image), device=first.device, dtype=first.dtype)
