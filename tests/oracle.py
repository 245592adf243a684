"""Masked execution, a second time and by other means: the dense model under a mode that gates what each call consumes.

It walks the recorded calls of a labelled forward in lockstep. Before every contraction it multiplies the *activation*
operand, along the dimension that is summed over, by the gates; statistics are taken with explicit weights on
expanded tensors. It knows labels, and shares no code with sites, gates, masked statistics or the cut.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import prunegate
from prunegate.labels.record import Node, nodes_in
from prunegate.labels.trace import QUIET, Trace, call_model
from prunegate.tensors import tensor_caches
from tests.models import outputs, random_mask, relative_error

# Position of the activation operand and its summed dimension, by the call's name.
_SUMMED = {
    "linear": (0, -1), "conv1d": (0, 1), "conv2d": (0, 1), "conv_transpose2d": (0, 1), "matmul": (0, -1),
    "__matmul__": (0, -1), "bmm": (0, -1), "scaled_dot_product_attention": (0, -1), "mm": (0, -1),
}  # fmt: skip


class Oracle(TorchFunctionMode):
    """Replays a model with gate values ``z`` (float ``[n_gates]``, may require grad)."""

    def __init__(self, trace: Trace, of_label: Tensor, z: Tensor) -> None:
        super().__init__()
        self.trace, self.at = trace, 0
        self.of_label, self.z = of_label, torch.cat([z, z.new_ones(1)])

    def gate(self, node: Node, dims: set[int]) -> Tensor | None:
        """Product of the gates of the planes of ``node`` that vary inside ``dims`` only, expanded to its shape."""
        total = None
        for plane in self.trace.algebra.get(node):
            own = {d for d, size in enumerate(plane.shape) if size > 1}
            if own <= dims:
                gates = self.z[self.of_label[plane]]
                total = gates if total is None else total * gates
        return None if total is None else total.expand(node.shape)

    def passes(self, source: Node, weight: Node) -> bool:
        """Whether whole groups of channels go through a convolution as themselves, and are consumed further down."""
        return weight.shape[1] < source.shape[1] and self.trace.along(weight, 1) is None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in QUIET:
            return func(*args, **kwargs)
        call = self.trace.calls[self.at]
        self.at += 1
        assert call.name == name, f"out of step: {name}, recorded {call.name}"
        nodes = list(nodes_in((call.args, call.kwargs)))
        if not nodes:
            return func(*args, **kwargs)
        node = nodes[0]
        if name in _SUMMED:
            at, dim = _SUMMED[name]
            gate = self.gate(nodes[at], {dim % nodes[at].ndim})
            if gate is not None and not (name.startswith("conv") and self.passes(nodes[0], nodes[1])):
                args = (args[0] * gate, *args[1:])
            return func(*args, **kwargs)
        if name in ("lstm", "gru", "rnn_tanh"):
            return self.recurrent(func, call.args, *args)
        if name == "lstm_cell":
            return func(*args[:2], *self.gated_weights(call.args[2:], args[2:]))
        if name == "einsum":
            left, right = args[0].replace(" ", "").split("->")
            letters = left.split(",")[0]
            gate = self.gate(node, {d for d, letter in enumerate(letters) if letter not in right})
            return func(args[0], args[1] if gate is None else args[1] * gate, *args[2:])
        statistic = getattr(self, f"do_{name}", None)
        return func(*args, **kwargs) if statistic is None else statistic(func, node, *args, **kwargs)

    def recurrent(self, func: Any, nodes: Any, x: Tensor, hx: Any, weights: Any, *rest: Any) -> Any:
        """Gates what each step consumes: the input, and the hidden state that the step before left."""
        return func(x, hx, self.gated_weights(nodes[2], weights), *rest)

    def gated_weights(self, nodes: Any, weights: Any) -> list[Tensor]:
        gates = [self.gate(node, {1}) if node.ndim == 2 else None for node in nodes]
        return [w if gate is None else w * gate for w, gate in zip(weights, gates, strict=True)]

    def moments(self, x: Tensor, w: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        n = w.sum(dims, keepdim=True)
        mean = (w * x).sum(dims, keepdim=True) / n
        return n, mean, (w * (x - mean) ** 2).sum(dims, keepdim=True) / n

    def normalised(self, func: Any, node: Node, x: Tensor, dims: list[int], eps: float, args: Any, kwargs: Any) -> Any:
        w = self.gate(node, set(dims))
        if w is None:
            return func(*args, **kwargs)
        _, mean, var = self.moments(x, w, dims)
        return (x - mean) / (var + eps).sqrt()

    def do_layer_norm(self, func: Any, node: Node, x: Tensor, shape: Any, weight: Any = None, bias: Any = None,
                      eps: float = 1e-5, *rest: Any) -> Tensor:  # fmt: skip
        dims = list(range(x.dim() - len(shape), x.dim()))
        y = self.normalised(func, node, x, dims, eps, (x, shape, None, None, eps), {})
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def do_group_norm(self, func: Any, node: Node, x: Tensor, groups: int, weight: Any = None, bias: Any = None,
                      eps: float = 1e-5, *rest: Any) -> Tensor:  # fmt: skip
        if groups > 1:
            return func(x, groups, weight, bias, eps)
        y = self.normalised(func, node, x, list(range(1, x.dim())), eps, (x, 1, None, None, eps), {})
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)

    def do_batch_norm(self, func: Any, node: Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        training = kwargs.get("training", args[4] if len(args) > 4 else False)
        dims = [d for d in range(x.dim()) if d != 1]
        w = self.gate(node, set(dims)) if training else None
        if w is None:
            return func(x, *args, **kwargs)
        _, mean, var = self.moments(x, w, dims)
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (x - mean) / (var + kwargs.get("eps", 1e-5)).sqrt()
        weight, bias = kwargs.get("weight", args[2] if len(args) > 2 else None), kwargs.get("bias")
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)

    def _reduced(self, x: Tensor, dim: Any) -> list[int]:
        if dim is None or dim == ():
            return list(range(x.dim()))
        return [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]

    def do_mean(self, func: Any, node: Node, x: Tensor, dim: Any = None, keepdim: bool = False, **kw: Any) -> Tensor:
        dims = self._reduced(x, dim)
        w = self.gate(node, set(dims))
        if w is None:
            return func(x, **kw) if dim is None else func(x, dim, keepdim, **kw)
        mean = self.moments(x, w, dims)[1]
        return mean if keepdim else mean.sum(dims)

    def do_sum(self, func: Any, node: Node, x: Tensor, dim: Any = None, *args: Any, **kw: Any) -> Tensor:
        w = self.gate(node, set(self._reduced(x, dim)))
        x = x if w is None else x * w
        return func(x, **kw) if dim is None else func(x, dim, *args, **kw)

    def do_var(self, func: Any, node: Node, x: Tensor, dim: Any = None, keepdim: bool = False, **kw: Any) -> Tensor:
        dims = self._reduced(x, dim)
        w = self.gate(node, set(dims))
        if w is None:
            return func(x, dim, keepdim=keepdim, **kw)
        n, _, var = self.moments(x, w, dims)
        if kw.get("unbiased", True) and kw.get("correction", 1):
            var = var * n / (n - 1)
        return var if keepdim else var.sum(dims)

    def do_std(self, func: Any, node: Node, x: Tensor, *args: Any, **kw: Any) -> Tensor:
        return self.do_var(torch.var, node, x, *args, **kw).sqrt()

    def do_var_mean(self, func: Any, node: Node, x: Tensor, dim: Any = None, **kw: Any) -> tuple[Tensor, Tensor]:
        keepdim = kw.get("keepdim", False)
        return self.do_var(torch.var, node, x, dim, **kw), self.do_mean(torch.mean, node, x, dim, keepdim)

    def do_rms_norm(self, func: Any, node: Node, x: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
        dims = list(range(x.dim() - len(shape), x.dim()))
        w = self.gate(node, set(dims))
        if w is None:
            return func(x, shape, weight, eps)
        y = x / (self.moments(x * x, w, dims)[1] + eps).sqrt()
        return y if weight is None else y * weight

    def do_norm(self, func: Any, node: Node, x: Tensor, *args: Any, **kw: Any) -> Tensor:
        w = self.gate(node, set(self._reduced(x, kw.get("dim", args[1] if len(args) > 1 else None))))
        return func(x if w is None else x * w, *args, **kw)

    def do_softmax(self, func: Any, node: Node, x: Tensor, dim: int, *args: Any, **kw: Any) -> Tensor:
        w = self.gate(node, {dim % x.dim()})
        if w is None:
            return func(x, dim, *args, **kw)
        e = w * (x - x.detach().amax(dim, keepdim=True)).exp()
        return e / e.sum(dim, keepdim=True)

    def do_amax(self, func: Any, node: Node, x: Tensor, dim: Any, *args: Any, **kw: Any) -> Tensor:
        w = self.gate(node, set(self._reduced(x, dim)))
        return func(x if w is None else torch.where(w > 0, x, x.new_full((), -1e300)), dim, *args, **kw)

    def do_max(self, func: Any, node: Node, x: Tensor, *args: Any, **kw: Any) -> Any:
        w = self.gate(node, set(self._reduced(x, kw.get("dim", args[0] if args else None))))
        return func(x if w is None else torch.where(w > 0, x, x.new_full((), -1e300)), *args, **kw)

    def do_normalize(self, func: Any, node: Node, x: Tensor, p: float = 2.0, dim: int = 1,
                     eps: float = 1e-12, out: None = None) -> Tensor:  # fmt: skip
        w = self.gate(node, {dim % x.dim()})
        return func(x, p=p, dim=dim, eps=eps) if w is None else x * w / ((w * x) ** 2).sum(dim, keepdim=True).sqrt()


def masked_outputs(model: torch.nn.Module, inputs: Any, trace: Trace, of_label: Tensor, z: Tensor) -> Any:
    """Outputs of ``model`` under gate values ``z``, in whatever mode it is in."""
    for cache in tensor_caches(model):
        cache.clear()
    with Oracle(trace, of_label, z):
        return call_model(model, inputs)


def check_against_the_oracle(model: torch.nn.Module, example: Any, modes: tuple[bool, ...] = (False, True),
                             gradient: bool = True) -> None:  # fmt: skip
    """Values, and the gradient of every gate, equal those of gating each consumer's operand in plain autograd.

    Args:
        model: In float64, with nothing at its initial value.
        example: Its inputs.
        modes: Train mode (true) and eval mode (false), with nothing dropped at random.
        gradient: Whether to compare gradients, too.
    """
    gated = prunegate.attach(model, example)
    # Some models keep tables from their first forward, and make other calls from then on.
    model = copy.deepcopy(model)
    gated.prunegate.logits.data = torch.zeros_like(gated.logits.data, dtype=torch.float64)
    gated.mask = random_mask(gated, seed=3)
    for train in modes:
        model.train(train)
        gated.train(train)
        for network in (model, gated, gated.model):
            frozen_statistics(network)
        gates = gated.mask.double().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            expected = masked_outputs(copy.deepcopy(model), example, gated.trace, gated.gate_map.of_label, gates)
            actual = call_model(gated, example)
        assert relative_error(expected, actual) <= 1e-10, f"train: {train}"
        if gradient:
            check_gradient(gated, gates, expected, actual)


def check_gradient(gated: prunegate.GatedModel, gates: Tensor, expected: Any, actual: Any) -> None:
    """The gradient of a random sum of outputs by the oracle's gates, and by the logits."""
    weights = [torch.randn_like(out) for out in outputs(expected)]

    def weighted(tree: Any) -> Tensor:
        return sum((w * out).sum() for w, out in zip(weights, outputs(tree), strict=True))

    (by_oracle,) = torch.autograd.grad(weighted(expected), gates)
    (by_logits,) = torch.autograd.grad(weighted(actual), gated.logits)
    # At logit 0 and temperature 1 the relaxed gate's slope is 1/4.
    scale = float(by_oracle.abs().max())
    torch.testing.assert_close(4 * by_logits.double() / scale, by_oracle / scale, rtol=1e-10, atol=1e-10)
    assert bool((by_oracle[~gated.mask] != 0).any()), "closed gates must get gradients"


def frozen_statistics(model: torch.nn.Module) -> None:
    """Batch statistics of removed channels are nobody's business; nothing is dropped at random."""
    for module in model.modules():
        drops = isinstance(module, torch.nn.modules.dropout._DropoutNd) or hasattr(module, "drop_prob")
        if drops or isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
        if getattr(module, "drop_rate", 0):
            module.drop_rate = 1e-300  # given to a function, not to a module; at zero the call would not be made
