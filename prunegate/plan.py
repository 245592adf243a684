"""The plan of a cut: what stays of every tensor and which numbers in the model change with it.

Everything before it (labels, gates, budgets) ends in a plan; everything after it (cutting, saving, reporting) begins
with one. A plan is data only: it names places in a model and holds integers and floats, never code.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from prunegate.errors import PlanError
from prunegate.example import example_from

__all__ = ["Argument", "AttributeEdit", "CallEdit", "CallSite", "Change", "Chosen", "PerExecution", "Plan", "Ratio",
           "Step"]  # fmt: skip

FORMAT = 1
"""Version of the JSON form."""

Number = int | float
ArgumentKind = Literal["size", "argument", "start", "stop", "index", "split", "widths", "operand"]


@dataclass(frozen=True)
class Step:
    """A call on the way from a module's method into a free function.

    Attributes:
        function: Where the call is written, ``"package.module:Qualified.name"``.
        call: Name of the callee as the source has it.
        ordinal: Which of the calls with that name in this function it is, in order of evaluation, from 0.
    """

    function: str
    call: str
    ordinal: int


@dataclass(frozen=True)
class CallSite:
    """A call in the source of a module's method, named so that it is found again in another process.

    Operators count as calls: ``x @ y`` is ``__matmul__``, ``x[i]`` is ``__getitem__``.

    Attributes:
        module: Qualified name of the module whose method runs, ``""`` for the model itself.
        function: Where the call is written, ``"package.module:Qualified.name"``.
        call: Name of the callee as the source has it.
        ordinal: Which of the calls with that name in this function it is, in order of evaluation, from 0.
        via: Where the call is in a free function: the calls that lead there, beginning in the module's method.
    """

    module: str
    function: str
    call: str
    ordinal: int
    via: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Argument:
    """One number among the arguments of a call.

    Attributes:
        kind: ``"size"``: entry ``index`` of the sizes of a view, reshape, expand and the like (from the end where
            negative; ``name`` is ``"sequence"`` where one expression gives them all). ``"argument"``: the argument at
            position ``index``, the object of a method counted as 0, also known by the keyword ``name``.
            ``"start"``, ``"stop"``, ``"index"``: of item ``index`` of a subscript; an index may be a list of positions.
            ``"split"``: the sections of a split; a ``chunk`` becomes a ``split`` for it. ``"widths"``: of multi-head
            attention, the number of heads, the widths of queries and values, and the width that the scale is for.
            ``"operand"``: nothing is computed, the argument at position ``index`` takes the call's place (a copy of it
            where ``name`` is ``"copy"``).
        index: See ``kind``.
        name: See ``kind``.
    """

    kind: ArgumentKind
    index: int = 0
    name: str = ""


@dataclass(frozen=True)
class PerExecution:
    """A value for each time that one invocation of the function comes to the call."""

    values: tuple[Number | tuple[int, ...], ...]


@dataclass(frozen=True)
class Ratio:
    """What the source computes, times ``numerator`` and divided by ``denominator``; an exact integer."""

    numerator: int
    denominator: int


Value = Number | tuple[int, ...] | PerExecution | Ratio


@dataclass(frozen=True)
class Change:
    """A new value for one argument."""

    argument: Argument
    value: Value


@dataclass(frozen=True)
class CallEdit:
    """What changes at one call."""

    site: CallSite
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class AttributeEdit:
    """A number that a module keeps and that changes.

    Attributes:
        module: Qualified name of the module.
        name: Name of the attribute; further steps into lists and dictionaries follow after dots
            (``"feature_info.2.num_chs"``).
        old: Its value before the cut; sequences as tuples.
        new: Its value after the cut.
    """

    module: str
    name: str
    old: Number | tuple[int, ...]
    new: Number | tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """The operator that takes the place of a choice.

    Attributes:
        name: The operator's name.
        path: Its qualified name below the choice.
    """

    name: str
    path: str


@dataclass(frozen=True)
class Plan:
    """What stays of a model.

    Attributes:
        dense: Shape, before the cut, of every tensor that loses positions, by qualified name.
        kept: The positions that stay, in increasing order, by qualified name and dimension.
        attributes: Numbers that modules keep and that change.
        calls: Calls whose arguments change.
        choices: The operator that takes the place of a ``Choice``, by the choice's qualified name. All names in a plan
            are those of the model before the cut, with its choices.
        removed: Modules that an identity stands in for, by qualified name, none inside another.
        example: The input that the plan was made for, as ``describe_example`` tells it, where the model runs on it for
            shapes alone: a model that is cut along the plan must run on it. Not to be changed.

    Raises:
        PlanError: The parts do not fit together.
    """

    dense: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: tuple[AttributeEdit, ...] = ()
    calls: tuple[CallEdit, ...] = ()
    choices: Mapping[str, Chosen] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    example: Any = None

    def __post_init__(self) -> None:
        """Checks that the parts fit together."""
        if set(self.dense) != set(self.kept):
            odd = sorted(set(self.dense) ^ set(self.kept))
            raise PlanError(f"a plan must give the dense shape of exactly the tensors that it cuts; see {odd[:3]}")
        checked: set[tuple[int, int]] = set()
        for name, dims in self.kept.items():
            shape = self.dense[name]
            for dim, positions in dims.items():
                if not 0 <= dim < len(shape):
                    raise PlanError(f"{name!r} of shape {shape} has no dimension {dim}")
                # Index sets are shared between tensors, so each is checked once for each size.
                if (id(positions), shape[dim]) not in checked:
                    _check_positions(positions, shape[dim], name, dim)
                    checked.add((id(positions), shape[dim]))

    def __hash__(self) -> int:
        """Of the names, attributes and calls: mappings have no hash of their own."""
        return hash((tuple(sorted(self.dense)), self.attributes, self.calls))

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """The plan itself: it is frozen, and every copy of a slim model carries it."""
        return self

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a cut tensor after the cut."""
        dims = self.kept[name]
        return tuple(len(dims[dim]) if dim in dims else size for dim, size in enumerate(self.dense[name]))

    def compose(self, after: Plan) -> Plan:
        """The one plan that does what this one and then ``after`` do.

        Args:
            after: A plan for the model that this plan leaves.

        Raises:
            PlanError: ``after`` was made for another model.
        """
        after = _named_before(after, {site: each.path for site, each in self.choices.items()})
        dense = {**after.dense, **self.dense}
        kept: dict[str, Mapping[int, tuple[int, ...]]] = {**after.kept, **self.kept}
        for name in self.dense.keys() & after.dense.keys():
            if self.shape(name) != tuple(after.dense[name]):
                raise PlanError(
                    f"the second plan expects {name!r} of shape {tuple(after.dense[name])}; the first leaves "
                    f"{self.shape(name)}"
                )
            first, second = self.kept[name], after.kept[name]
            kept[name] = {
                dim: tuple(first[dim][i] for i in second[dim])
                if dim in first and dim in second
                else (first.get(dim) or second[dim])
                for dim in sorted(first.keys() | second.keys())
            }
        order = [*self.dense, *(name for name in after.dense if name not in self.dense)]
        return Plan(
            {name: dense[name] for name in order},
            {name: kept[name] for name in order},
            _compose_attributes(self.attributes, after.attributes),
            merge_calls((*self.calls, *after.calls)),
            {**self.choices, **after.choices},
            (*self.removed, *after.removed),
            self.example if after.example is None else after.example,
        ).without_removed()

    def removes(self, name: str) -> bool:
        """Whether a module or tensor is one of those that are removed, or inside one."""
        return any(name == module or name.startswith(f"{module}.") for module in self.removed)

    def without_removed(self) -> Plan:
        """The plan without what it says about the inside of modules that it removes."""
        if not self.removed:
            return self
        inside = self.removes
        removed = {name for name in self.removed if not any(name.startswith(f"{each}.") for each in self.removed)}
        return Plan(
            {name: shape for name, shape in self.dense.items() if not inside(name)},
            {name: dims for name, dims in self.kept.items() if not inside(name)},
            tuple(edit for edit in self.attributes if not inside(edit.module)),
            tuple(edit for edit in self.calls if not inside(edit.site.module)),
            {site: chosen for site, chosen in self.choices.items() if not inside(site)},
            tuple(sorted(removed)),
            self.example,
        )

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> str:
        """The plan as a JSON text; equal plans give equal texts. Index sets that tensors share are stored once."""
        sets: dict[tuple[int, ...], int] = {}
        kept = {
            name: {str(dim): sets.setdefault(tuple(positions), len(sets)) for dim, positions in dims.items()}
            for name, dims in self.kept.items()
        }
        document: dict[str, Any] = {
            "format": FORMAT,
            "sets": [_ranges(positions) for positions in sets],
            "dense": {name: list(shape) for name, shape in self.dense.items()},
            "kept": kept,
            "attributes": [
                [edit.module, edit.name, _plain(edit.old), _plain(edit.new)] for edit in self.attributes
            ],
            "calls": [
                {
                    "module": edit.site.module,
                    "path": [
                        *([step.function, step.call, step.ordinal] for step in edit.site.via),
                        [edit.site.function, edit.site.call, edit.site.ordinal],
                    ],
                    "changes": [
                        [change.argument.kind, change.argument.index, change.argument.name, _plain(change.value)]
                        for change in edit.changes
                    ],
                }
                for edit in self.calls
            ],
        }  # fmt: skip
        if self.removed:
            document["removed"] = list(self.removed)
        if self.choices:
            document["choices"] = {site: [each.name, each.path] for site, each in self.choices.items()}
        if self.example is not None:
            document["example"] = self.example
        return json.dumps(document, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Reads a plan back.

        Raises:
            PlanError: The text is not a plan; says where.
        """
        try:
            document = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not a plan: the text is not JSON ({error}); expected what Plan.to_json wrote") from None
        return _Reader(document).plan()


def merge_calls(edits: Iterable[CallEdit]) -> tuple[CallEdit, ...]:
    """One edit for each site; of several changes to one argument the last stands."""
    sites: dict[CallSite, dict[Argument, Value]] = {}
    for edit in edits:
        changes = sites.setdefault(edit.site, {})
        for change in edit.changes:
            earlier = changes.get(change.argument)
            if isinstance(earlier, Ratio) and isinstance(change.value, Ratio):
                numerator = earlier.numerator * change.value.numerator
                denominator = earlier.denominator * change.value.denominator
                common = math.gcd(numerator, denominator)
                changes[change.argument] = Ratio(numerator // common, denominator // common)
            else:
                changes[change.argument] = change.value
    return tuple(
        CallEdit(site, tuple(Change(argument, value) for argument, value in changes.items()))
        for site, changes in sites.items()
    )


def _named_before(plan: Plan, paths: Mapping[str, str]) -> Plan:
    """A plan for a model with operators in the place of choices, in the names that it had with the choices.

    Args:
        plan: The plan.
        paths: What leads from a choice to the operator that stands in its place, by the choice's name.
    """
    if not paths:
        return plan

    def before(name: str) -> str:
        found = ""
        for step in ["", *name.split(".")] if name else [""]:
            found = f"{found}.{step}" if found and step else found or step
            while found in paths:
                found = f"{found}.{paths[found]}" if found else paths[found]
        return found

    return Plan(
        {before(name): shape for name, shape in plan.dense.items()},
        {before(name): dims for name, dims in plan.kept.items()},
        tuple(replace(edit, module=before(edit.module)) for edit in plan.attributes),
        tuple(CallEdit(replace(edit.site, module=before(edit.site.module)), edit.changes) for edit in plan.calls),
        {before(site): chosen for site, chosen in plan.choices.items()},
        tuple(before(name) for name in plan.removed),
        plan.example,
    )


def _compose_attributes(first: Iterable[AttributeEdit], second: Iterable[AttributeEdit]) -> tuple[AttributeEdit, ...]:
    merged = {(edit.module, edit.name): edit for edit in first}
    for edit in second:
        earlier = merged.get((edit.module, edit.name))
        if earlier is not None and earlier.new != edit.old:
            raise PlanError(
                f"the second plan expects {edit.module}.{edit.name} to be {edit.old}; the first leaves {earlier.new}"
            )
        old = edit.old if earlier is None else earlier.old
        merged[edit.module, edit.name] = AttributeEdit(edit.module, edit.name, old, edit.new)
    return tuple(edit for edit in merged.values() if edit.old != edit.new)


def _check_positions(positions: tuple[int, ...], size: int, name: str, dim: int) -> None:
    if not positions:
        raise PlanError(f"nothing would be left of {name!r} along dimension {dim}")
    if positions[0] < 0 or positions[-1] >= size or any(a >= b for a, b in itertools.pairwise(positions)):
        raise PlanError(f"the positions kept of {name!r} along dimension {dim} must increase within 0 to {size - 1}")


# ---------------------------------------------------------------------- JSON, element by element

_MAX_POSITIONS = 2**27  # a file must not be able to ask for more memory than a tensor dimension has


def _ranges(positions: tuple[int, ...]) -> list[int]:
    """Runs of consecutive positions as start, length, start, length, ..."""
    runs: list[int] = []
    for position in positions:
        if runs and runs[-2] + runs[-1] == position:
            runs[-1] += 1
        else:
            runs += [position, 1]
    return runs


def _plain(value: Any) -> Any:
    if isinstance(value, PerExecution):
        return {"each": [_plain(item) for item in value.values]}
    if isinstance(value, Ratio):
        return {"ratio": [value.numerator, value.denominator]}
    return list(value) if isinstance(value, tuple) else value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


class _Reader:
    """Turns a JSON document into a plan and refuses everything that ``to_json`` does not write."""

    def __init__(self, document: Any) -> None:
        self.document = self.mapping(document, "the plan")
        expected = {"format", "sets", "dense", "kept", "attributes", "calls"}
        if set(self.document) - {"choices", "removed", "example"} != expected:
            raise PlanError(f"not a plan: it has the keys {sorted(self.document)[:8]}, expected {sorted(expected)}")
        if self.document["format"] != FORMAT or isinstance(self.document["format"], bool):
            raise PlanError(
                f"the plan has format {self.document['format']!r}; this version reads format {FORMAT}. Update prunegate"
            )

    def plan(self) -> Plan:
        sets = [self.positions(item) for item in self.sequence(self.document["sets"], "sets")]
        dense = {name: self.sizes(shape) for name, shape in self.mapping(self.document["dense"], "dense").items()}
        kept: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, dims in self.mapping(self.document["kept"], "kept").items():
            kept[name] = {}
            for dim, index in self.mapping(dims, f"kept of {name!r}").items():
                if not dim.isdecimal() or len(dim) > 3 or not self.is_int(index) or not 0 <= index < len(sets):
                    raise PlanError(f"not a plan: what is kept of {name!r} is malformed")
                kept[name][int(dim)] = sets[index]
        return Plan(
            dense,
            kept,
            tuple(self.attribute(item) for item in self.sequence(self.document["attributes"], "attributes")),
            tuple(self.call(item) for item in self.sequence(self.document["calls"], "calls")),
            {
                site: self.chosen(each)
                for site, each in self.mapping(self.document.get("choices", {}), "choices").items()
            },
            tuple(
                self.text(name, "a removed module")
                for name in self.sequence(self.document.get("removed", []), "the removed modules")
            ),
            self.example(),
        )

    def example(self) -> Any:
        """The description of the example input, once it has proved to be one."""
        described = self.document.get("example")
        example_from(described)
        return described

    @staticmethod
    def is_int(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62

    def mapping(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise PlanError(f"not a plan: {what} is {type(value).__name__}, expected an object")
        return value

    def sequence(self, value: Any, what: str, length: int | None = None) -> list[Any]:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise PlanError(f"not a plan: {what} is {str(value)[:60]}, expected a list" + (
                f" of {length}" if length is not None else ""))  # fmt: skip
        return value

    def text(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise PlanError(f"not a plan: {what} is {str(value)[:60]}, expected a string")
        return value

    def integer(self, value: Any, what: str) -> int:
        if not self.is_int(value):
            raise PlanError(f"not a plan: {what} is {str(value)[:60]}, expected an integer")
        return int(value)

    def sizes(self, value: Any) -> tuple[int, ...]:
        sizes = tuple(self.integer(item, "a size") for item in self.sequence(value, "a shape"))
        if any(size < 0 for size in sizes):
            raise PlanError(f"not a plan: the shape {sizes} has a negative size")
        return sizes

    def positions(self, value: Any) -> tuple[int, ...]:
        runs = [self.integer(item, "a position") for item in self.sequence(value, "an index set")]
        starts, lengths = runs[::2], runs[1::2]
        if len(starts) != len(lengths) or any(n < 1 for n in lengths) or sum(lengths) > _MAX_POSITIONS:
            raise PlanError("not a plan: an index set is malformed")
        return tuple(at for start, n in zip(starts, lengths, strict=True) for at in range(start, start + n))

    def number(self, value: Any) -> Number | tuple[int, ...]:
        if isinstance(value, list):
            return tuple(self.integer(item, "a number") for item in value)
        if isinstance(value, float):
            return value
        return self.integer(value, "a value")

    def value(self, value: Any) -> Value:
        if isinstance(value, dict):
            if set(value) == {"each"}:
                return PerExecution(tuple(self.number(item) for item in self.sequence(value["each"], "the values")))
            if set(value) == {"ratio"}:
                top, bottom = self.sequence(value["ratio"], "a ratio", 2)
                ratio = Ratio(self.integer(top, "a numerator"), self.integer(bottom, "a denominator"))
                if ratio.denominator < 1:
                    raise PlanError("not a plan: a ratio has a denominator below 1")
                return ratio
            raise PlanError(f"not a plan: a value has the keys {sorted(value)[:3]}")
        return self.number(value)

    def attribute(self, value: Any) -> AttributeEdit:
        module, name, old, new = self.sequence(value, "an attribute", 4)
        edit = AttributeEdit(
            self.text(module, "a module"), self.text(name, "a name"), self.number(old), self.number(new)
        )
        if not all(part.isidentifier() or part.isdecimal() for part in edit.name.split(".")):
            raise PlanError(f"not a plan: {edit.name[:60]!r} is not the name of an attribute")
        if "__" in edit.name:
            raise PlanError(f"not a plan: the attribute {edit.name[:60]!r} is not one that a cut changes")
        return edit

    def call(self, value: Any) -> CallEdit:
        entry = self.mapping(value, "a call")
        if set(entry) != {"module", "path", "changes"}:
            raise PlanError(f"not a plan: a call has the keys {sorted(entry)[:5]}")
        steps = []
        for item in self.sequence(entry["path"], "a path"):
            function, call, ordinal = self.sequence(item, "a step", 3)
            steps.append(Step(
                self.text(function, "a function"), self.text(call, "a callee"), self.integer(ordinal, "an ordinal")
            ))  # fmt: skip
        if not steps:
            raise PlanError("not a plan: a call has an empty path")
        *via, last = steps
        site = CallSite(self.text(entry["module"], "a module"), last.function, last.call, last.ordinal, tuple(via))
        return CallEdit(site, tuple(self.change(item) for item in self.sequence(entry["changes"], "the changes")))

    def chosen(self, value: Any) -> Chosen:
        name, path = self.sequence(value, "a choice", 2)
        return Chosen(self.text(name, "an operator's name"), self.text(path, "an operator's place"))

    def change(self, value: Any) -> Change:
        kind, index, name, new = self.sequence(value, "a change", 4)
        if kind not in get_args(ArgumentKind):
            raise PlanError(f"not a plan: an argument of kind {str(kind)[:60]!r}, expected {get_args(ArgumentKind)}")
        name = self.text(name, "an argument's name")
        if name and not name.isidentifier():
            raise PlanError(f"not a plan: {name[:60]!r} is not the name of an argument")
        return Change(Argument(kind, self.integer(index, "an argument's index"), name), self.value(new))
