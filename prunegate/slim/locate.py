"""From a recorded call to its place in the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunegate.labels.record import FrameRecord
from prunegate.plan import CallSite, Step
from prunegate.slim.source import (
    CallNode,
    FunctionSource,
    contains_code,
    innermost,
    method_running,
    read_source,
    resolve,
)

__all__ = ["Located", "locate", "locate_call"]


@dataclass(frozen=True, eq=False)
class Located:
    """A recorded call, found in the source.

    Attributes:
        owner: The module whose method runs.
        path: The function and the node of each call that leads there, the call itself last; those before it call free
            functions.
    """

    owner: nn.Module
    path: tuple[tuple[FunctionSource, CallNode], ...]

    @property
    def source(self) -> FunctionSource:
        """The function in which the call is written."""
        return self.path[-1][0]

    @property
    def call(self) -> CallNode:
        """The call."""
        return self.path[-1][1]

    def outer(self) -> Located:
        """The call of the free function in which this call is written."""
        return Located(self.owner, self.path[:-1])

    def site(self, modules: Mapping[int, str]) -> CallSite | None:
        """The name of this place in a plan; ``None`` where the module or a call on the way has none."""
        if id(self.owner) not in modules or any(node.ordinal < 0 for _, node in self.path):
            return None
        *via, last = [Step(source.name, node.call, node.ordinal) for source, node in self.path]
        return CallSite(modules[id(self.owner)], last.function, last.call, last.ordinal, tuple(via))


def locate(frame: FrameRecord | None, name: str, modules: Mapping[int, str]) -> CallSite | None:
    """The place in the source at which a call was made.

    Args:
        frame: Where the call was made.
        name: Plain name of the called function.
        modules: Qualified name of every module, by identity.

    Returns:
        The place, or ``None`` where no module's method can be rewritten for it.
    """
    located = locate_call(frame, name)
    return None if located is None else located.site(modules)


def locate_call(frame: FrameRecord | None, name: str) -> Located | None:
    """The functions and nodes of a call and of those that lead to it, from a module's method inwards."""
    frames: list[FrameRecord] = []
    while frame is not None:
        frames.insert(0, frame)
        if frame.owner is not None:
            break
        frame = frame.caller
    if not frames or frames[0].owner is None:
        return None
    cls: Any = type(frames[0].owner)
    method = method_running(cls, frames[0].code)
    source = None if method is None else read_source(method)
    path: list[tuple[FunctionSource, CallNode | None]] = []
    for index, record in enumerate(frames):
        if index and source is not None:
            if contains_code(source.function.__code__, record.code):
                path.pop()  # a comprehension: its calls are calls of the function around it
            else:
                source = _entered(*path[-1], record)
        if source is None:
            return None
        called = name if index == len(frames) - 1 else frames[index + 1].code.co_name
        path.append((source, source.at(record.code, record.lasti, called)))
    steps = tuple((source, node) for source, node in path if node is not None)
    return Located(frames[0].owner, steps) if len(steps) == len(path) else None


def _entered(source: FunctionSource, node: CallNode | None, record: FrameRecord) -> FunctionSource | None:
    """The function that a call entered, if it is the one that the source names."""
    if node is None or not hasattr(node.node, "func"):
        return None
    function = innermost(resolve(source, node.node.func), lambda each: each.__code__ is record.code)
    return None if function is None else read_source(function)
