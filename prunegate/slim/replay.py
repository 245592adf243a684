"""Running a cut model beside the record of the dense one, call by call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prunegate.errors import ExportError
from prunegate.labels.record import Call, FrameRecord, capture_frame, nodes_in
from prunegate.labels.trace import QUIET
from prunegate.slim.expected import Number, Unrepairable, check_call, same_call
from prunegate.slim.features import NODE
from prunegate.slim.live import Live
from prunegate.slim.rewrite import NEW_INDEX

__all__ = ["Finding", "Replay", "UnrepairableError", "replay"]


class UnrepairableError(ExportError):
    """The cut model's own arithmetic cannot be made to follow.

    Attributes:
        nodes: Traced tensors whose labels to freeze so that the cut leaves the place alone.
        call: The call of the dense model.
    """

    def __init__(self, why: str, call: Call, live: Live | None = None) -> None:
        self.nodes = [
            node for node in nodes_in((call.args, call.kwargs, call.out)) if live is None or live.changes(node)
        ]
        self.call = call
        super().__init__(f"the call of {call.name} in {_where(call.frame)} cannot follow the cut: {why}")


def _where(frame: FrameRecord | None) -> str:
    if frame is None:
        return "code without source"
    return f"{frame.code.co_qualname} ({frame.code.co_filename}:{frame.code.co_firstlineno})"


@dataclass(frozen=True, eq=False)
class Finding:
    """A number that the cut model gives to a call and that must be another.

    Attributes:
        index: Which call of the record it is.
        number: The number.
        frame: Where the call is made in the cut model.
    """

    index: int
    number: Number
    frame: FrameRecord | None


@dataclass(eq=False)
class Replay:
    """What one run of the cut model showed.

    Attributes:
        findings: The numbers that were wrong. They were corrected on the way, so all of them are found in one run.
        numbers: For each call, the numbers that it was given, right ones too.
        invocations: For each call that was watched: a number for the run of the function that made it.
    """

    findings: list[Finding]
    numbers: dict[int, list[Number]]
    invocations: dict[int, int]


def replay(model: nn.Module, run: Callable[[nn.Module], Any], calls: Sequence[Call], live: Live,
           watched: frozenset[int] = frozenset()) -> Replay:  # fmt: skip
    """Runs the cut model and compares every call with the dense model's.

    Args:
        model: The cut model, in eval mode.
        run: Runs a model on the example input.
        calls: The dense model's calls.
        live: What stays.
        watched: Calls whose function's runs are to be told apart.

    Raises:
        UnrepairableError: The model does not make the dense model's calls, or a result has the wrong shape.
    """
    mode = _Replay(calls, live, watched)
    try:
        with torch.no_grad(), mode:
            run(model)
    except UnrepairableError:
        raise
    except Exception as error:
        at = min(mode.at, len(calls) - 1)
        raise UnrepairableError(f"{type(error).__name__}: {error}", calls[at], live) from error
    if mode.at != len(calls):
        raise UnrepairableError("the cut model takes another way through its code", calls[mode.at], live)
    return mode.result


class _Replay(TorchFunctionMode):
    def __init__(self, calls: Sequence[Call], live: Live, watched: frozenset[int]) -> None:
        super().__init__()
        self.calls = calls
        self.live = live
        self.watched = watched
        self.at = 0
        self.result = Replay([], {}, {})
        # Frames are held, or else the next run of a function could get the same address.
        self.frames: dict[int, tuple[FrameType, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        kwargs = kwargs or {}
        if name in QUIET:
            return func(*args, **kwargs)
        while self.at < len(self.calls) and self._was_kept(self.calls[self.at], name, (args, kwargs)):
            self.at += 1
        if name == NEW_INDEX and "index_select" in [call.name for call in self.calls[self.at : self.at + 2]]:
            return func(*args, **kwargs)  # made by the rewritten source, perhaps in the place of an earlier rewrite's
        if self.at >= len(self.calls) or not same_call(self.calls[self.at], name):
            call = self.calls[min(self.at, len(self.calls) - 1)]
            raise UnrepairableError(f"the cut model calls {name} there", call, self.live)
        call = self.calls[self.at]
        try:
            given = check_call(call, func, args, kwargs, self.live)
        except Unrepairable as problem:
            raise UnrepairableError(str(problem), call, self.live) from None
        if given.wrong:
            frame = capture_frame(sys._getframe(1))
            self.result.findings += [Finding(self.at, number, frame) for number in given.wrong]
        self.result.numbers[self.at] = given.numbers
        if self.at in self.watched:
            self.result.invocations[self.at] = self._invocation(sys._getframe(1))
        out = given.func(*given.args, **given.kwargs)
        self._check(out, call)
        self.at += 1
        return out

    def _was_kept(self, call: Call, name: str, arguments: Any) -> bool:
        """Whether a recorded call does not come because a module keeps, from an earlier run, what it computed then."""
        if any(node.depends for node in nodes_in((call.args, call.kwargs, call.out))):
            return False
        now = [tuple(leaf.shape) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        then = [self.live.shape(node) for node in nodes_in((call.args, call.kwargs))]
        return not same_call(call, name) or now != then

    def _invocation(self, frame: FrameType | None) -> int:
        record = capture_frame(frame)
        while frame is not None and (record is None or frame.f_code is not record.code):
            frame = frame.f_back
        while frame is not None and frame.f_code.co_name.startswith("<") and frame.f_back is not None:
            frame = frame.f_back  # a comprehension runs as a part of the function around it
        assert frame is not None
        return self.frames.setdefault(id(frame), (frame, len(self.frames)))[1]

    def _check(self, out: Any, call: Call) -> None:
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor, node in zip(tensors, nodes_in(call.out), strict=False):
            setattr(tensor, NODE, node)
            if node.numel() and tuple(tensor.shape) != self.live.shape(node):
                raise UnrepairableError(
                    f"its result has shape {tuple(tensor.shape)} and should have {self.live.shape(node)} (before the "
                    f"cut {node.shape})",
                    call,
                    self.live,
                )
