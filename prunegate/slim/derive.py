"""Deriving a plan: which attributes and which calls must change so that a cut model's own arithmetic follows.

Attributes come first, as the record of the dense model alone tells many of them: where a wrong size is literally
``self.heads`` in the source, the attribute changes and every other use of it follows. Then the cut model runs beside
the record; what is still wrong there is repaired at the call, only the wrong argument, until nothing is wrong.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.errors import PlanError
from prunegate.labels.record import Call, FrameRecord, nodes_in
from prunegate.plan import (
    Argument,
    AttributeEdit,
    CallEdit,
    CallSite,
    Change,
    Chosen,
    PerExecution,
    Plan,
    Ratio,
    Value,
    merge_calls,
)
from prunegate.slim.apply import cut_model
from prunegate.slim.arguments import SEQUENCE, find_argument, gives_sequence, size_expressions
from prunegate.slim.attributes import plain
from prunegate.slim.checks import failed_check
from prunegate.slim.edits import Edit, edit_module
from prunegate.slim.expected import Number, Unrepairable, check_call
from prunegate.slim.features import FeatureWatch
from prunegate.slim.live import Kept, Live
from prunegate.slim.locate import Located, locate_call
from prunegate.slim.replay import Finding, Replay, UnrepairableError, replay
from prunegate.slim.source import FunctionSource
from prunegate.tensors import named_tensors, tensor_caches

__all__ = ["derive_plan"]

_MAX_ROUNDS = 16

AttributeKey = tuple[str, str]
"""Qualified name of a module and name of its attribute."""


def derive_plan(model: nn.Module, calls: Sequence[Call], kept: Kept, tensors: Mapping[tuple[str, int], Tensor],
                run: Callable[[nn.Module], Any], inputs: Any = None,
                choices: Mapping[str, Chosen] | None = None, removed: Sequence[str] = (),
                edits: Sequence[CallEdit] = (), written: frozenset[int] = frozenset()) -> Plan:  # fmt: skip
    """Finds the plan that cuts a model to what is kept.

    Args:
        model: The dense model; it is left as it is.
        calls: The torch calls of its traced run.
        kept: Which positions of a traced tensor's dimension stay.
        tensors: Which positions stay, bool, of the named tensors' dimensions.
        run: Runs a model on the input of the traced run.
        inputs: That input, where it is a tensor: with it the widths of intermediate features are found, too.
        choices: The operators that take the place of choices; ``calls`` are those that are made then.
        removed: Modules that an identity stands in for; ``calls`` are those that are made then.
        edits: What is known to change at calls.
        written: Numbers of the traced tensors into whose memory something is written through a view.

    Returns:
        The plan. The model that it leaves runs through the same calls, with results of the shapes that are kept.

    Raises:
        UnrepairableError: A call cannot be made to follow; it names the traced tensors that stand in the way.
    """
    draft = replace(_tensor_plan(model, tensors), choices=choices or {}, removed=tuple(removed), calls=tuple(edits))
    draft = draft.without_removed()
    return _Derivation(model, calls, Live(kept, written), draft, run, inputs).plan()


def _tensor_plan(model: nn.Module, tensors: Mapping[tuple[str, int], Tensor]) -> Plan:
    """The plan that only cuts tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(model)}
    sets: dict[bytes, tuple[int, ...]] = {}
    dense: dict[str, tuple[int, ...]] = {}
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), stays in tensors.items():
        if not bool(stays.all()):
            raw = stays.numpy().tobytes()
            positions = sets.setdefault(raw, tuple(torch.nonzero(stays).flatten().tolist()))
            kept.setdefault(name, {})[dim] = positions
            dense[name] = shapes[name]
    return Plan(dense, kept)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Takes back what a run leaves in modules: tables that they compute once and keep would be missing in the next."""
    modules = list(model.modules())
    stores = [store for module in modules for store in (module.__dict__, module._buffers)]
    stores += list(tensor_caches(model))
    before = [(store, dict(store)) for store in stores]
    empty = [value for module in modules for value in module.__dict__.values() if type(value) is dict and not value]
    try:
        yield
    finally:
        for store, content in before:
            store.clear()
            store.update(content)
        for value in empty:
            value.clear()


class _Derivation:
    """One search for a plan. ``slim`` is edited in place until nothing in its run is wrong."""

    def __init__(self, model: nn.Module, calls: Sequence[Call], live: Live, draft: Plan,
                 run: Callable[[nn.Module], Any], inputs: Any) -> None:  # fmt: skip
        self.model = model
        self.calls = calls
        self.live = live
        self.draft = draft
        self.run = run
        self.inputs = inputs
        self.slim = cut_model(model, draft).eval()
        self.names = {id(module): name for name, module in self.slim.named_modules()}
        self.dense_names = {id(module): name for name, module in model.named_modules()}
        self.dense_modules = dict(model.named_modules())
        self.slim_modules = dict(self.slim.named_modules())
        self.attributes: dict[AttributeKey, AttributeEdit] = {}
        self.edits: list[CallEdit] = list(draft.calls)
        self.watched: set[int] = set()
        self.executions: dict[Any, list[int]] = {}

    def plan(self) -> Plan:
        """Searches."""
        self.from_record()
        for index, call in enumerate(self.calls):
            self.executions.setdefault(_identity(call.frame), []).append(index)
        for _ in range(_MAX_ROUNDS):
            watch, result = self.replay()
            if not result.findings:
                attributes = {**self.attributes}
                with _as_before(self.slim), _as_before(self.model):
                    for edit in watch.edits(self.slim, self.live):
                        attributes.setdefault((edit.module, edit.name), edit)
                return Plan(
                    self.draft.dense,
                    self.draft.kept,
                    tuple(edit for edit in attributes.values() if edit.old != edit.new),
                    merge_calls(self.edits),
                    self.draft.choices,
                    self.draft.removed,
                ).without_removed()
            if not self.repair(result):
                finding = result.findings[0]
                raise self.unrepairable(finding, "its arguments stay wrong")
        raise self.unrepairable(result.findings[0], "one repair undoes another")

    def replay(self) -> tuple[FeatureWatch, Replay]:
        """Runs the cut model beside the record, when it passes its own checks of sizes."""
        while True:
            watch = FeatureWatch(self.model, self.inputs)
            try:
                with _as_before(self.slim), watch.on(self.slim):
                    return watch, replay(self.slim, self.run, self.calls, self.live, frozenset(self.watched))
            except UnrepairableError as error:
                if not self.passes(error.__cause__):
                    raise

    def unrepairable(self, finding: Finding, why: str) -> UnrepairableError:
        """The error that says that a call stays wrong."""
        return UnrepairableError(why, self.calls[finding.index], self.live)

    # ------------------------------------------------------------------ attributes, from the record alone

    def from_record(self) -> None:
        """Sets the attributes that give wrong sizes in the dense record."""
        wanted: dict[AttributeKey, dict[Any, set[Any]]] = {}
        for call in self.calls:
            if not any(self.live.changes(node) for node in nodes_in((call.args, call.kwargs, call.out))):
                continue
            try:
                given = check_call(call, call.func, call.args, call.kwargs, self.live)
            except Unrepairable as problem:
                raise UnrepairableError(str(problem), call, self.live) from None
            if not given.wrong:
                continue
            located = locate_call(call.frame, call.name)
            if located is None:
                continue
            for number in given.wrong:
                place = _Place(located, number)
                key = self.attribute(place, self.dense_names, self.dense_modules)
                if key is not None:
                    wanted.setdefault(key, {}).setdefault(place.entry, set()).add(number.right)
        for key, entries in wanted.items():
            for entry, values in entries.items():
                if len(values) == 1:
                    self.set_attribute(key, entry, next(iter(values)))

    def attribute(self, place: _Place, names: Mapping[int, str],
                  modules: Mapping[str, nn.Module]) -> AttributeKey | None:  # fmt: skip
        """The attribute that an expression reads, if it is nothing but ``self.x`` or ``self.child.x``."""
        expression, owner = place.expression, place.located.owner
        if not isinstance(expression, ast.Attribute) or len(place.located.path) != 1:
            return None
        steps: list[str] = []
        value: ast.expr = expression
        while isinstance(value, ast.Attribute):
            steps.insert(0, value.attr)
            value = value.value
        parameters = place.located.source.parameters
        if not isinstance(value, ast.Name) or not parameters or value.id != parameters[0]:
            return None
        module: Any = owner
        for step in steps[:-1]:
            module = getattr(module, step, None)
        if not isinstance(module, nn.Module) or id(module) not in names or steps[-1] not in module.__dict__:
            return None
        name = names[id(module)]
        current = module.__dict__[steps[-1]]
        if modules.get(name) is not module or isinstance(current, bool):
            return None
        return (name, steps[-1]) if isinstance(current, int | float | tuple | list) else None

    def passes(self, error: BaseException | None) -> bool:
        """Lets the cut model pass a check of a size by which it raised an exception; says whether that was it."""
        failed = None if error is None else failed_check(error)
        name = None if failed is None else self.names.get(id(failed.module))
        return failed is not None and name is not None and self.set_attribute((name, failed.name), None, failed.size)

    def set_attribute(self, key: AttributeKey, entry: int | None, right: Any) -> bool:
        """Gives an attribute, or one entry of it, the right value; once only."""
        module, name = key
        target = self.slim_modules[module]
        old, current = getattr(self.dense_modules[module], name), getattr(target, name)
        if entry is None:
            if key in self.attributes or isinstance(right, tuple) != isinstance(current, tuple | list):
                return False
            new = right
        else:
            if not isinstance(current, tuple | list) or not -len(current) <= entry < len(current):
                return False
            if current[entry] != old[entry]:
                return False
            new = tuple(right if at == entry % len(current) else value for at, value in enumerate(current))
        if plain(current) == new:
            return False
        self.attributes[key] = AttributeEdit(module, name, plain(old), new)
        setattr(target, name, type(current)(new) if isinstance(current, tuple | list) else new)
        return True

    # ------------------------------------------------------------------ repairs, from a run

    def repair(self, result: Replay) -> bool:
        """Changes attributes if that repairs anything, else calls; says whether anything was changed."""
        places: list[tuple[Finding, _Place]] = []
        for finding in result.findings:
            located = locate_call(finding.frame, self.calls[finding.index].name)
            if located is None or located.site(self.names) is None:
                raise self.unrepairable(finding, "it has no source that could be edited")
            places.append((finding, _Place(located, finding.number)))
        wanted: dict[tuple[AttributeKey, Any], set[Any]] = {}
        for finding, place in places:
            key = self.attribute(place, self.names, self.slim_modules)
            if key is not None:
                wanted.setdefault((key, place.entry), set()).add(finding.number.right)
        changed = [
            self.set_attribute(key, entry, next(iter(values)))
            for (key, entry), values in wanted.items()
            if len(values) == 1
        ]
        if any(changed):
            return True
        watched = len(self.watched)
        # A line that ran several times has a finding for each; they are repaired together.
        once = {(place.located.site(self.names), place.argument): (finding, place) for finding, place in places}
        edited = [self.edit(finding, place, result) for finding, place in once.values()]
        return any(edited) or len(self.watched) > watched

    def edit(self, finding: Finding, place: _Place, result: Replay) -> bool:
        """Edits one call; says whether the edit is a new one."""
        site = place.located.site(self.names)
        assert site is not None
        value = self.value(finding, place, result)
        if value is None:
            return False
        change = CallEdit(site, (Change(place.argument, value),))
        if not isinstance(value, Ratio) and change.changes[0] in self.changes_at(site):
            return False
        changes = [change]
        if place.argument.kind == "widths":
            # The attribute that says whether projections are packed has changed, and with it the branch that runs.
            same = [node for node in place.located.source.calls if node.call == site.call]
            changes = [CallEdit(replace(site, ordinal=node.ordinal), change.changes) for node in same]
        try:
            edit_module(place.located.owner, [Edit(replace(each.site, module=""), each.changes) for each in changes])
        except PlanError as error:
            raise self.unrepairable(finding, str(error)) from None
        self.edits += changes
        return True

    def changes_at(self, site: CallSite) -> tuple[Change, ...]:
        """The changes made at a call so far."""
        return next((edit.changes for edit in merge_calls(self.edits) if edit.site == site), ())

    def value(self, finding: Finding, place: _Place, result: Replay) -> Value | None:
        """The value for an argument: a constant, a ratio, or one for each execution; ``None`` if not known yet."""
        number = finding.number
        executions = self.executions[_identity(self.calls[finding.index].frame)]
        seen = {
            index: each
            for index in executions
            for each in result.numbers.get(index, ())
            if each.argument == number.argument
        }
        if len({each.right for each in seen.values()}) <= 1:
            if place.scales() and isinstance(number.right, int) and number.given > 0:
                ratios = {(each.right * number.given, each.given * number.right) for each in seen.values()}
                if all(a == b for a, b in ratios):
                    common = math.gcd(number.right, number.given)
                    return Ratio(number.right // common, number.given // common)
            right: Value = number.right
            return right
        if finding.index not in result.invocations:
            self.watched.update(executions)
            return None
        runs: dict[int, list[Any]] = {}
        for index, each in seen.items():
            runs.setdefault(result.invocations[index], []).append(each.right)
        if len({tuple(values) for values in runs.values()}) != 1 or len(place.located.path) != place.depth:
            raise self.unrepairable(finding, "it needs different numbers each time its function runs")
        return PerExecution(tuple(next(iter(runs.values()))))


def _identity(frame: FrameRecord | None) -> tuple[Any, ...]:
    """What tells one place in the source, in one module, from another."""
    steps: list[Any] = []
    while frame is not None:
        steps += [frame.code, frame.lasti, id(frame.owner)]
        frame = frame.caller
    return tuple(steps)


class _Place:
    """The place of a number in the source: where it is a parameter of a free function, in the call of that.

    Attributes:
        located: The call in which the number is written.
        argument: Which of its arguments the number is.
        entry: Which entry of the argument, where one expression gives a sequence.
        expression: The source of the number.
        depth: How many calls lead to the one that is wrong.
    """

    def __init__(self, located: Located, number: Number) -> None:
        self.located = located
        self.depth = len(located.path)
        self.argument, self.entry = _argument(located, number)
        self.expression = self._find()
        while self._is_parameter():
            assert isinstance(self.expression, ast.Name)
            index = self.located.source.parameters.index(self.expression.id)
            self.argument = Argument("argument", index, self.expression.id)
            self.located = self.located.outer()
            self.expression = self._find()

    def _find(self) -> ast.expr | None:
        node = self.located.call.node
        if self.entry is not None and self.argument.kind == "size" and isinstance(node, ast.Call):
            return size_expressions(self.located.source, node)[0]
        return find_argument(self.located.source, node, self.argument)

    def _is_parameter(self) -> bool:
        expression, source = self.expression, self.located.source
        if len(self.located.path) < 2 or self.entry is not None or not isinstance(expression, ast.Name):
            return False
        return expression.id in source.parameters and not _assignments(source, expression.id)

    def scales(self) -> bool:
        """Whether the number is computed, so that it may hold a batch size or a resolution besides what is cut."""
        if self.entry is not None:  # one expression gives a whole sequence
            return False
        expression = self.expression
        if isinstance(expression, ast.Name):
            values = _assignments(self.located.source, expression.id)
            expression = values[0] if len(values) == 1 else None
        return isinstance(expression, ast.BinOp)


def _argument(located: Located, number: Number) -> tuple[Argument, int | None]:
    """The argument as the source has it: sizes behind a starred one are counted from the end."""
    argument, node = number.argument, located.call.node
    if argument.kind != "size" or not isinstance(node, ast.Call):
        return argument, None
    if number.sequence and gives_sequence(located.source, node):
        return Argument("size", argument.index, SEQUENCE), argument.index
    sizes = size_expressions(located.source, node)
    starred = [isinstance(size, ast.Starred) for size in sizes]
    from_end = argument.index - len(number.whole)
    if any(starred[: argument.index + 1]) and -from_end <= len(sizes) and not any(starred[from_end:]):
        return Argument("size", from_end), None
    return argument, None


def _assignments(source: FunctionSource, name: str) -> list[ast.expr | None]:
    """What a function assigns to a local name; ``None`` for a part of something."""
    nodes = list(ast.walk(source.definition))
    stores = sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in nodes)
    whole: list[ast.expr | None] = [
        node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == name
    ]
    return [*whole, *(None for _ in range(stores - len(whole)))]
