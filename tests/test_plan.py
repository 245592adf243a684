"""Plans: data that goes to JSON and back, composes as cutting does, and refuses what it did not write."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunegate import PlanError
from prunegate.plan import Argument, AttributeEdit, CallEdit, CallSite, Change, PerExecution, Plan, Ratio, Step

SITE = CallSite("blocks.0", "package.module:Block.forward", "reshape", 2)


def change(value: object, kind: str = "size") -> Change:
    return Change(Argument(kind, 1), value)


FULL = Plan(
    {"a.weight": (4, 3), "b": (5,)},
    {"a.weight": {0: (0, 2, 3), 1: (1,)}, "b": {0: (0, 4)}},
    (AttributeEdit("a", "out_features", 4, 3), AttributeEdit("", "shape", (4, 2), (3, 2))),
    (
        CallEdit(SITE, (change(3), Change(Argument("argument", 6, "scale"), 0.125))),
        CallEdit(
            CallSite("", "m:f", "__getitem__", 0, (Step("m:M.forward", "f", 1),)),
            (change(PerExecution((1, 2)), "stop"), change(Ratio(3, 4)), Change(Argument("split"), (1, 2))),
        ),
    ),
)


def test_json_and_back() -> None:
    text = FULL.to_json()
    assert Plan.from_json(text) == FULL
    assert Plan.from_json(text).to_json() == text
    assert Plan.from_json(Plan().to_json()) == Plan()
    assert hash(Plan.from_json(text)) == hash(FULL)


def test_index_sets_that_tensors_share_are_stored_once() -> None:
    kept = tuple(range(0, 2000, 2))
    one = Plan({"a": (2000,)}, {"a": {0: kept}})
    many = Plan({f"a{i}": (2000,) for i in range(50)}, {f"a{i}": {0: kept} for i in range(50)})
    assert len(many.to_json()) < 1.5 * len(one.to_json())


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, int], list[int], list[int], list[int], list[int]]:
    """A shape, and for each dimension what a first and then a second cut keep."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))

    def subset(size: int) -> list[int]:
        return sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))

    first = [subset(size) for size in shape]
    second = [subset(len(kept)) for kept in first]
    return shape, first, second


@given(cuts())
@settings(max_examples=60, deadline=None)
def test_composed_plan_keeps_what_two_cuts_keep(drawn: tuple) -> None:
    shape, first, second = drawn
    array = np.arange(shape[0] * shape[1]).reshape(shape)
    one = Plan({"w": shape}, {"w": {0: tuple(first[0]), 1: tuple(first[1])}})
    middle = array[np.ix_(*first)]
    two = Plan({"w": middle.shape}, {"w": {0: tuple(second[0]), 1: tuple(second[1])}})
    both = one.compose(two)
    expected = middle[np.ix_(*second)]
    assert np.array_equal(array[np.ix_(*both.kept["w"].values())], expected)
    assert both.dense["w"] == shape
    assert both.shape("w") == expected.shape


def test_compose_merges_attributes_and_calls() -> None:
    first = Plan(
        attributes=(AttributeEdit("m", "heads", 8, 6),), calls=(CallEdit(SITE, (change(6), change(9, "stop"))),)
    )
    second = Plan(
        {"t": (4,)},
        {"t": {0: (1,)}},
        (AttributeEdit("m", "heads", 6, 2), AttributeEdit("n", "x", 1, 2)),
        (CallEdit(SITE, (change(2),)),),
    )
    both = first.compose(second)
    assert both.attributes == (AttributeEdit("m", "heads", 8, 2), AttributeEdit("n", "x", 1, 2))
    assert both.calls == (CallEdit(SITE, (change(2), change(9, "stop"))),)
    assert both.kept == {"t": {0: (1,)}}
    ratios = Plan(calls=(CallEdit(SITE, (change(Ratio(3, 4)),)),))
    assert ratios.compose(Plan(calls=(CallEdit(SITE, (change(Ratio(2, 3)),)),))).calls == (
        CallEdit(SITE, (change(Ratio(1, 2)),)),
    )


@pytest.mark.parametrize(
    "second",
    [
        Plan({"b": (5,)}, {"b": {0: (1,)}}),
        Plan(attributes=(AttributeEdit("a", "out_features", 4, 2),)),
    ],
    ids=["shape", "attribute"],
)
def test_compose_refuses_a_plan_for_another_model(second: Plan) -> None:
    with pytest.raises(PlanError, match="expects"):
        FULL.compose(second)


@pytest.mark.parametrize(
    ("dense", "kept"),
    [
        ({"a": (3,)}, {}),
        ({}, {"a": {0: (0,)}}),
        ({"a": (3,)}, {"a": {1: (0,)}}),
        ({"a": (3,)}, {"a": {0: ()}}),
        ({"a": (3,)}, {"a": {0: (0, 3)}}),
        ({"a": (3,)}, {"a": {0: (-1, 1)}}),
        ({"a": (3,)}, {"a": {0: (1, 1)}}),
        ({"a": (3,)}, {"a": {0: (2, 1)}}),
    ],
)
def test_parts_that_do_not_fit_are_refused(dense: dict, kept: dict) -> None:
    with pytest.raises(PlanError):
        Plan(dense, kept)


def damaged() -> list[object]:
    """Documents that differ from a good one in one place."""

    def with_(**parts: object) -> dict:
        return {**json.loads(FULL.to_json()), **parts}

    call = json.loads(FULL.to_json())["calls"][0]
    return [
        [],
        None,
        with_(format=2),
        with_(format=True),
        with_(more=1),
        with_(sets=[[0]]),
        with_(sets=[[0, 2**40]]),
        with_(sets=[[0, 0]]),
        with_(sets=[["0", 1]]),
        with_(dense={"a.weight": [4, 3], "b": [-5]}),
        with_(dense={"a.weight": 4, "b": [5]}),
        with_(kept={"a.weight": {"0": 99}, "b": {"0": 0}}),
        with_(kept={"a.weight": {"x": 0}, "b": {"0": 0}}),
        with_(kept={"a.weight": {"0": True}, "b": {"0": 0}}),
        with_(attributes=[["a", "x", 1]]),
        with_(attributes=[["a", "x; import os", 1, 2]]),
        with_(attributes=[["a", "__class__", 1, 2]]),
        with_(attributes=[["a", "x", "1", 2]]),
        with_(attributes=[["a", "x", True, 2]]),
        with_(calls=[{**call, "path": []}]),
        with_(calls=[{**call, "path": [["f", "g", "0"]]}]),
        with_(calls=[{**call, "extra": 1}]),
        with_(calls=[{**call, "changes": [["rename", 0, "", 1]]}]),
        with_(calls=[{**call, "changes": [["size", 0, "a b", 1]]}]),
        with_(calls=[{**call, "changes": [["size", 0, "", "os"]]}]),
        with_(calls=[{**call, "changes": [["size", 0, "", {"ratio": [1, 0]}]]}]),
        with_(calls=[{**call, "changes": [["size", 0, "", {"code": [1]}]]}]),
    ]


@pytest.mark.parametrize("document", damaged(), ids=lambda document: str(document)[-60:])
def test_foreign_documents_are_refused(document: object) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": NaN}', b"\xff\xfe\x00"], ids=range(5))
def test_foreign_texts_are_refused(text: str | bytes) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)
