"""Branches of residual networks that can be removed as one: found in the graph of recorded operations.

At a sum of two tensors, the operations whose results reach nothing but one operand feed only that branch. Where the
branch gives zero, the other operand is all that is left, and none of these operations need to run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.labels.record import Call, FrameRecord, Node, Op, nodes_in
from prunegate.labels.trace import Trace
from prunegate.plan import Argument, CallEdit, Change
from prunegate.slim.locate import locate_call

__all__ = ["Block", "Removal", "factors_of", "find_blocks", "removal_of"]

_SUMS = ("add", "__add__", "add_", "__iadd__")
_UNUSED = -1  # stands in a value's readers for the model's output
_COPY = "copy"


@dataclass(frozen=True, eq=False)
class Block:
    """A branch that may vanish.

    Attributes:
        name: Qualified name of the innermost module that holds all of its modules.
        label: The label of its gate.
        call: The sum.
        branch: Which of the sum's two tensors the branch gives.
        ops: Identities of the operations that feed only the branch.
        calls: Identities of the torch calls that do.
        replaced: Modules that an identity stands in for when the branch is gone, by qualified name.
        tensors: Parameters and buffers in these modules.
        edit: What becomes of the sum; ``None`` where it is in a module that is replaced.
    """

    name: str
    label: int
    call: Call
    branch: int
    ops: frozenset[int]
    calls: frozenset[int]
    replaced: tuple[str, ...]
    tensors: frozenset[str]
    edit: CallEdit | None


@dataclass(frozen=True)
class Removal:
    """What removing some blocks comes to.

    Attributes:
        replaced: Modules that an identity stands in for.
        edits: What becomes of the sums.
        calls: The recorded calls that are still made.
    """

    replaced: tuple[str, ...]
    edits: tuple[CallEdit, ...]
    calls: tuple[Call, ...]


def removal_of(blocks: Sequence[Block], calls: Sequence[Call]) -> Removal:
    """What removing ``blocks`` comes to; of blocks inside one another the outer ones count."""
    gone = frozenset[int]().union(*(block.calls for block in blocks))
    outer = [block for block in blocks if id(block.call) not in gone]
    names = {name for block in blocks for name in block.replaced}
    replaced = tuple(sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names)))
    sums = {id(block.call): block for block in outer}
    left = []
    for call in calls:
        block = sums.get(id(call))
        if block is not None and block.edit is not None and block.edit.changes[0].argument.name == _COPY:
            kept = list(nodes_in((call.args, call.kwargs)))[1 - block.branch]
            left.append(Call(torch.Tensor.clone, "clone", (kept,), {}, call.out, call.frame))
        elif block is None and id(call) not in gone:
            left.append(call)
    edits = tuple(block.edit for block in outer if block.edit is not None)
    return Removal(replaced, edits, tuple(left))


def find_blocks(trace: Trace, ignore: Callable[[str], bool] = lambda name: False) -> list[Block]:
    """The branches of a traced model that may vanish, in the order in which they run; each gets a label.

    A sum counts if both operands have its shape and depend on the model's input, and if one of them either starts from
    the other (the shortcut) or, as the other does, from one tensor alone (a shortcut with a projection). Of several
    candidates at one sum the one with most parameters is the branch.

    Args:
        trace: A labelling.
        ignore: Says of a tensor's qualified name whether it must stay.
    """
    flow = _Flow(trace)
    owners = _Owners(trace)
    found: list[Block] = []
    for index, op in enumerate(trace.ops):
        if not _is_sum(op, flow):
            continue
        branches = [branch for at in (0, 1) if (branch := _branch(trace, flow, index, at)) is not None]
        branches.sort(key=lambda branch: (not branch.from_shortcut, -branch.size))
        for branch in branches:
            block = _block(trace, flow, owners, branch)
            if block is not None and not any(ignore(name) for name in block.tensors):
                found.append(block)
                break
    return found


# ---------------------------------------------------------------------- the graph


class _Flow:
    """Which operation reads which value. An operation that writes in place makes a new value of the same tensor."""

    def __init__(self, trace: Trace) -> None:
        self.ops = trace.ops
        self.reads: list[list[int]] = []
        self.writes: list[list[int]] = []
        self.readers: list[list[int]] = []
        self.maker: list[int] = []
        self.history: dict[int, list[tuple[int, int]]] = {}
        self.depends: list[bool] = []
        self._family: dict[int, list[Node]] = {}
        for index, op in enumerate(trace.ops):
            operands = list(nodes_in((op.args, op.kwargs)))
            self.reads.append([self.value(node) for node in operands])
            for value in self.reads[-1]:
                self.readers[value].append(index)
            results = list({node.uid: node for node in nodes_in(op.out)}.values())
            if op.func._schema.is_mutable:
                for node in [each for each in operands if any(each is out for out in results)]:
                    for other in self._family.get((node.base or node).uid, ()):
                        if other is not node and other is not (node.base or node):
                            results.append(other)
                    if node.base is not None:
                        results.append(node.base)
                for node in results:
                    if node.uid in self.history:
                        self.readers[self.value(node)].append(index)
                        self.reads[-1].append(self.value(node))
            self.writes.append([self._new(node, index) for node in results])
        self.outputs = {self.value(node) for node in trace.outputs}
        for value in self.outputs:
            self.readers[value].append(_UNUSED)
        self.tensors = {name: self._first(node) for name, node in trace.tensors.items()}
        self.unused = {at for at, made in enumerate(self.writes) if not any(self.readers[value] for value in made)}
        self.of_call: dict[int, list[int]] = {}
        for index, op in enumerate(trace.ops):
            if op.call is not None:
                self.of_call.setdefault(id(op.call), []).append(index)

    def value(self, node: Node) -> int:
        """The current value of a tensor."""
        return self.history[node.uid][-1][1] if node.uid in self.history else self._new(node, -1)

    def _first(self, node: Node) -> int:
        return self.history[node.uid][0][1] if node.uid in self.history else self._new(node, -1)

    def _new(self, node: Node, maker: int) -> int:
        if node.uid not in self.history:
            self._family.setdefault((node.base or node).uid, []).append(node)
        self.history.setdefault(node.uid, []).append((maker, len(self.maker)))
        self.maker.append(maker)
        self.readers.append([])
        self.depends.append(node.depends)
        return len(self.maker) - 1

    def at(self, node: Node, before: int) -> int | None:
        """The value that a tensor had before operation ``before``."""
        values = [value for maker, value in self.history.get(node.uid, ()) if maker < before]
        return values[-1] if values else None

    def is_changed(self, value: int) -> bool:
        """Whether an operation writes into a tensor that has this value."""
        return any(
            self.ops[reader].func._schema.is_mutable and self.ops[reader].args
            for reader in self.readers[value]
            if reader != _UNUSED
        )

    def feeding(self, index: int, value: int) -> set[int]:
        """The operations before ``index`` whose results reach nothing but ``value`` as an operand of ``index``."""
        inside: set[int] = set()
        for at in range(index - 1, -1, -1):
            used = False
            for made in self.writes[at]:
                for reader in self.readers[made]:
                    used = True
                    if reader not in inside and (reader != index or made != value):
                        break
                else:
                    continue
                break
            else:
                if used:
                    inside.add(at)
        return inside


@dataclass(frozen=True, eq=False)
class _Branch:
    """A candidate: the operations that feed one operand of a sum."""

    index: int
    at: int
    inside: frozenset[int]
    shortcut: int
    from_shortcut: bool
    tensors: frozenset[str]
    size: int


def _is_sum(op: Op, flow: _Flow) -> bool:
    call = op.call
    if op.name != "add" or call is None or call.name not in _SUMS or op.path or len(flow.of_call[id(call)]) != 1:
        return False
    tensors = list(nodes_in((call.args, call.kwargs)))
    operands = list(nodes_in((op.args, op.kwargs)))
    if len(tensors) != 2 or any(a is not b for a, b in zip(tensors, operands, strict=True)) or call.kwargs:
        return False
    return len(call.args) == 2 and all(node.depends and node.shape == op.out.shape for node in tensors)


def _branch(trace: Trace, flow: _Flow, index: int, at: int) -> _Branch | None:
    value, shortcut = flow.reads[index][at], flow.reads[index][1 - at]
    if value == shortcut:
        return None
    inside = flow.feeding(index, value)
    tensors = frozenset(
        name for name, made in flow.tensors.items() if flow.readers[made] and inside.issuperset(flow.readers[made])
    )
    size = sum(trace.tensors[name].numel() for name in tensors & trace.parameters)
    if not size or any(trace.ops[each].path for each in inside):
        return None
    made = {each for one in inside for each in flow.writes[one]}
    taken = {each for one in inside for each in flow.reads[one]} - made
    from_shortcut = shortcut in taken
    if not from_shortcut:
        sources = {each for each in taken if flow.depends[each]}
        beside = flow.feeding(index, shortcut)
        others = {each for one in beside for each in flow.reads[one] if flow.depends[each]}
        others -= {each for one in beside for each in flow.writes[one]}
        if len(sources) != 1 or sources != others:
            return None
    return _Branch(index, at, frozenset(inside), shortcut, from_shortcut, tensors, size)


# ---------------------------------------------------------------------- modules


class _Owners:
    """The calls that are made in each module and in those below it.

    Calls that give no tensor (assertions) go where their module goes.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.of: dict[str, set[int]] = {}
        self.silent: dict[str, set[int]] = {}
        self.owner: dict[int, str] = {}
        self.places: dict[Any, int] = {}
        for call in trace.calls:
            name = self.owner[id(call)] = trace.algebra.module_name(call.frame)
            found = self.of if any(True for _ in nodes_in(call.out)) else self.silent
            for each in _with_outer(name):
                found.setdefault(each, set()).add(id(call))
            place = _place(call.frame)
            self.places[place] = self.places.get(place, 0) + 1

    def whole(self, calls: frozenset[int], removable: Callable[[str], bool]) -> list[str]:
        """The outermost modules in which nothing runs but ``calls``."""
        found: list[str] = []
        for name, module in self.trace.model.named_modules():
            if any(name.startswith(f"{outer}.") for outer in found) or not name:
                continue
            own = self.of.get(name, set())
            if own and own <= calls and _is_callable(module) and self.can_go(name, module, removable):
                found.append(name)
        return found

    def can_go(self, name: str, module: nn.Module, removable: Callable[[str], bool]) -> bool:
        """Whether all tensors of a module are removable."""
        return all(removable(each) for each in _tensors_of(self.trace, name, module))


def _tensors_of(trace: Trace, name: str, module: nn.Module) -> list[str]:
    names = [f"{name}.{each}" for each, _ in (*module.named_parameters(), *module.named_buffers())]
    return [trace.aliases.get(each, each) for each in names]


def _is_callable(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _with_outer(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _place(frame: FrameRecord | None) -> tuple[Any, ...]:
    steps: list[Any] = []
    while frame is not None:
        steps += [frame.code, frame.lasti, id(frame.owner)]
        frame = frame.caller
    return tuple(steps)


# ---------------------------------------------------------------------- blocks


def _block(trace: Trace, flow: _Flow, owners: _Owners, branch: _Branch) -> Block | None:
    """The block of a candidate, if its place in the source can be edited."""
    op = trace.ops[branch.index]
    call = op.call
    assert call is not None
    if owners.places[_place(call.frame)] != 1:
        return None
    calls = frozenset(_calls_inside(trace, flow, branch))

    def removable(name: str) -> bool:
        return name in branch.tensors or name not in flow.tensors or not flow.readers[flow.tensors[name]]

    around = _module_around(trace, flow, owners, branch, calls, removable)
    edit = None
    if around is not None:
        replaced = [around]
        calls |= owners.of[around]
    else:
        replaced = owners.whole(calls, removable)
        edit = _edit(trace, flow, branch, call)
        if edit is None or not replaced:
            return None
    calls = calls.union(*(owners.silent.get(name, ()) for name in replaced))
    modules = dict(trace.model.named_modules())
    tensors = frozenset(each for name in replaced for each in _tensors_of(trace, name, modules[name]))
    label = int(trace.labels.fresh(1))
    return Block(_common(replaced), label, call, branch.at, frozenset(id(trace.ops[each]) for each in branch.inside),
                 calls, tuple(replaced), tensors, edit)  # fmt: skip


def _calls_inside(trace: Trace, flow: _Flow, branch: _Branch) -> Iterator[int]:
    """Calls all of whose operations feed only the branch; a call without any hands on what it is given."""
    done = 0
    for call in trace.calls:
        own = flow.of_call.get(id(call), [])
        if own:
            done = own[-1] + 1
            used = [each for each in own if each not in flow.unused]
            if used and branch.inside.issuperset(used):
                yield id(call)
            continue
        given = [flow.at(node, done) for node in nodes_in(call.out)]
        if given and all(value is not None and flow.maker[value] in branch.inside for value in given):
            yield id(call)


def _module_around(trace: Trace, flow: _Flow, owners: _Owners, branch: _Branch, calls: frozenset[int],
                   removable: Callable[[str], bool]) -> str | None:  # fmt: skip
    """The module of the sum, if it does nothing but add the branch to what it is given."""
    call = trace.ops[branch.index].call
    assert call is not None
    name = owners.owner[id(call)]
    module = trace.model.get_submodule(name) if name else trace.model
    own = owners.of[name]
    if not name or own != calls | {id(call)} or not owners.can_go(name, module, removable):
        return None
    made = {each for one in branch.inside for each in flow.writes[one]}
    taken = {each for one in branch.inside for each in flow.reads[one] if flow.depends[each]} - made
    out = flow.writes[branch.index][0]
    return name if taken == {branch.shortcut} and not flow.is_changed(out) else None


def _edit(trace: Trace, flow: _Flow, branch: _Branch, call: Call) -> CallEdit | None:
    """The sum becomes its shortcut, copied where something is written into the sum afterwards."""
    located = locate_call(call.frame, call.name)
    site = None if located is None else located.site(trace.modules)
    kept = 1 - branch.at
    if located is None or site is None:
        return None
    if isinstance(located.call.node, ast.Call) and call.name == "add_" and kept != 0:
        return None  # what the shortcut would have to be written into is gone
    copy = _COPY if flow.is_changed(flow.writes[branch.index][0]) else ""
    return CallEdit(site, (Change(Argument("operand", kept, copy), kept),))


def _common(names: Sequence[str]) -> str:
    """The innermost module around all of several."""
    if len(names) == 1:
        return names[0]
    paths = [name.split(".") for name in names]
    length = 0
    while all(len(path) > length + 1 for path in paths) and len({path[length] for path in paths}) == 1:
        length += 1
    return ".".join(paths[0][:length]) or names[0]


def factors_of(blocks: Mapping[int, Block]) -> tuple[dict[int, list[Tensor]], dict[str, list[Tensor]]]:
    """The blocks that an operation or call (by identity), and a tensor (by name), are part of: lengths of 0 or 1."""
    of_event: dict[int, list[Tensor]] = {}
    of_tensor: dict[str, list[Tensor]] = {}
    for gate, block in blocks.items():
        there = torch.tensor([gate])
        for event in (*block.ops, *block.calls):
            of_event.setdefault(event, []).append(there)
        for name in block.tensors:
            of_tensor.setdefault(name, []).append(there)
    return of_event, of_tensor
