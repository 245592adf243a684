"""Rewritten methods: they compute what the edit says, read like the original, and travel like any class."""

import copy
import inspect
import linecache
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prunegate import PlanError
from prunegate.plan import Argument, CallEdit, CallSite, Change, PerExecution, Ratio, Step
from prunegate.slim.edits import Edit, apply_edits, edit_module, edits_of, original_class, wrap_calls
from prunegate.slim.source import read_source
from tests.slim.forwards import Child, Everything, Grandchild, Parent, Rebound

HERE = "tests.slim.forwards"
FORWARD = f"{HERE}:Parent.forward"
EVERYTHING = f"{HERE}:Everything.forward"


def site(function: str, call: str, ordinal: int = 0, module: str = "", via: tuple[Step, ...] = ()) -> CallSite:
    return CallSite(module, function, call, ordinal, via)


def edit(call: str, kind: str, index: int, value: object, ordinal: int = 0, name: str = "",
         function: str = EVERYTHING) -> Edit:  # fmt: skip
    return Edit(site(function, call, ordinal), (Change(Argument(kind, index, name), value),))


class Recorder:
    """Calls through and remembers with what."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, function, *args, **kwargs):
        self.calls.append((function, args, kwargs))
        return function(*args, **kwargs)


@pytest.mark.parametrize("cls", [Parent, Child, Grandchild])
def test_wraps_and_changes_combine(cls: type) -> None:
    torch.manual_seed(0)
    model, x = cls(), torch.randn(3, 4)
    before = model(x)
    calls = ["softmax", "__matmul__", "layer_norm", "mean", "reshape"]
    recorders = {site(FORWARD, call): Recorder() for call in calls}
    wrap_calls(model, recorders)
    assert torch.equal(model(x), before)
    functions = [recorder.calls[0][0] for recorder in recorders.values()]
    assert functions == [torch.Tensor.softmax, torch.Tensor.__matmul__, nn.functional.layer_norm, torch.Tensor.mean,
                         torch.Tensor.reshape]  # fmt: skip
    assert recorders[site(FORWARD, "mean")].calls[0][2] == {"dim": 1}
    edit_module(model, [
        edit("reshape", "size", 1, 4, function=FORWARD), edit("reshape", "size", 2, 2, function=FORWARD),
        edit("layer_norm", "argument", 1, (4,), name="normalized_shape", function=FORWARD),
        edit("layer_norm", "argument", 4, 1e-3, name="eps", function=FORWARD),
    ])  # fmt: skip
    assert recorders[site(FORWARD, "reshape")].calls[0][1][1:] == (-1, 2, 4)
    got = model(x)
    assert recorders[site(FORWARD, "reshape")].calls[1][1][1:] == (-1, 4, 2)
    y = model.linear(x).reshape(-1, 4, 2)
    expected = nn.functional.layer_norm(y.softmax(-1) @ y.transpose(1, 2), (4,), eps=1e-3).mean(1) * 3
    extra = x.mean(0).mul(3).sum() if cls is not Parent else 0
    assert torch.equal(got, expected + extra)
    assert not got.requires_grad, "the decorator no longer acts"


def test_free_function_is_rewritten_for_one_module_only() -> None:
    model, other, x = Child(), Child(), torch.randn(3, 4)
    other.load_state_dict(model.state_dict())
    recorder = Recorder()
    place = site(f"{HERE}:centre", "mean", via=(Step(f"{HERE}:Child.forward", "centre", 0),))
    wrap_calls(model, {place: recorder})
    before = other(x)
    assert recorder.calls == []
    assert torch.equal(model(x), before)
    assert len(recorder.calls) == 1
    scaled = Edit(site(f"{HERE}:centre", "__mul__", via=place.via), (Change(Argument("argument", 1), 5),))
    edit_module(model, [scaled])
    assert torch.allclose(model(x) - before, 2 * x.mean(0).sum().expand(3, 2))
    assert torch.equal(other(x), before)


def run(*edits: Edit) -> str:
    """Source of a forward with these edits."""
    model = Everything()
    edit_module(model, edits)
    source = inspect.getsource(type(model).forward)
    changed = [
        line.strip() for line in source.splitlines() if line not in inspect.getsource(Everything.forward).splitlines()
    ]
    return "\n".join(changed)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (edit("view", "size", -1, 6), "a = x.view(*x.shape[:-1], 3, 6)"),
        (edit("chunk", "split", 0, (2, 4, 6)), "b, c, d = x.split((2, 4, 6), dim=-1)"),
        (edit("__getitem__", "stop", 1, 3, 1), "e = x[:, : 3] + x[..., 2:6]"),
        (edit("__getitem__", "start", 1, 3, 2), "e = x[:, : self.width] + x[..., 3:6]"),
        (edit("__getitem__", "start", 1, 1, 1), "e = x[:, 1:self.width] + x[..., 2:6]"),
        (edit("__mul__", "argument", 1, 5), "n = x.shape[0] * 5"),
        (
            edit("reshape", "size", 0, Ratio(3, 2), 1),
            "f = [piece.reshape(((n) * 3 // 2), 2) for piece in (b, c)]",
        ),
        (edit("narrow", "argument", 3, 2, name="length"), "out = out + x.narrow(1, 0, 2).sum()"),
        (edit("__itruediv__", "argument", 1, 7), "out /= 7"),
        (
            edit("scaled_dot_product_attention", "argument", 6, 0.5, name="scale"),
            "return out + F.scaled_dot_product_attention(a, a, a, scale=0.5).sum()",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_the_argument_changes_in_the_text(change: Edit, line: str) -> None:
    assert run(change) == line


def test_sequence_of_sizes_and_values_for_each_execution() -> None:
    model, x = Everything(), torch.arange(24.0).reshape(2, 12)
    dense = model(x)
    edit_module(model, [edit("narrow", "argument", 3, PerExecution((2, 4)), name="length")])
    assert torch.allclose(model(x), dense + (x[:, :2].sum() - x[:, :4].sum()) / 4)
    assert torch.equal(model(x), model(x)), "the values start again in each run"
    model = Everything()
    edit_module(model, [edit("reshape", "size", 1, 4, name="sequence"), edit("reshape", "size", 2, 3, name="sequence")])
    seen: list[torch.Size] = []
    place = site(EVERYTHING, "scaled_dot_product_attention")
    wrap_calls(model, {place: lambda f, *a: (seen.append(a[0].shape), f(*a))[1]})
    model(x)
    assert seen == [(2, 4, 3)]


def test_added_keyword_that_differs_each_time_keeps_places_in_order() -> None:
    model, x = Everything(), torch.randn(2, 12)
    place = "scaled_dot_product_attention"
    edit_module(model, [edit(place, "argument", 6, PerExecution((0.5,)), name="scale")])
    source = read_source(type(model).forward)
    assert source is not None
    assert [node.ordinal for node in source.calls if node.call == place] == [0]
    last = [node.call for node in source.calls if node.ordinal >= 0][-4:]
    assert last == ["__itruediv__", place, "sum", "__add__"]
    seen: list[float] = []
    wrap_calls(model, {site(EVERYTHING, place): lambda f, *a, **k: (seen.append(k["scale"]), f(*a, **k))[1]})
    model(x)
    assert seen == [0.5]


def test_branches_on_training_stay() -> None:
    model, x = Everything(), torch.randn(2, 12)
    edit_module(model, [edit("narrow", "argument", 3, 2, name="length")])
    a, b = model.train()(x), model.eval()(x)
    assert not torch.equal(a, b)


def test_stored_bound_method_is_bound_again() -> None:
    model, x = Rebound(), torch.randn(3, 4)
    edit_module(model, [edit("reshape", "size", 0, 3, function=f"{HERE}:Rebound.forward_b"),
                        edit("reshape", "size", 1, 4, function=f"{HERE}:Rebound.forward_b")])  # fmt: skip
    assert model(x).shape == (3, 4)
    assert copy.deepcopy(model)(x).shape == (3, 4)


def test_classes_of_torch() -> None:
    norm = nn.LayerNorm(4)
    recorder = Recorder()
    wrap_calls(norm, {site("torch.nn.modules.normalization:LayerNorm.forward", "layer_norm"): recorder})
    x = torch.randn(2, 4)
    assert torch.equal(norm(x), nn.LayerNorm(4)(x))
    assert recorder.calls[0][0] is nn.functional.layer_norm
    conv = nn.Conv2d(2, 2, 1, bias=False)
    edit_module(conv, [edit("conv2d", "argument", 6, 2, 1, "groups", "torch.nn.modules.conv:Conv2d._conv_forward")])
    conv.weight = nn.Parameter(torch.ones(2, 1, 1, 1))
    image = torch.randn(1, 2, 3, 3)
    assert torch.equal(conv(image), image)


def test_names_prints_and_sharing() -> None:
    a, b, c = Everything(), Everything(), Everything()
    edit_module(a, [edit("narrow", "argument", 3, 2, name="length")])
    edit_module(b, [edit("narrow", "argument", 3, 2, name="length")])
    edit_module(c, [edit("narrow", "argument", 3, 3, name="length")])
    assert type(a) is type(b)
    assert type(a) is not type(c)
    assert isinstance(a, Everything)
    assert original_class(a) is Everything
    assert repr(a) == repr(Everything())
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(a), name) == getattr(Everything, name)
    assert type(a).forward.__qualname__ == "Everything.forward"
    assert inspect.signature(type(a).forward) == inspect.signature(Everything.forward)


def test_source_is_found_at_the_line_that_runs() -> None:
    model = Everything()
    edit_module(model, [edit("narrow", "argument", 3, 99, name="length")])
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, 12))
    frame = next(entry for entry in caught.traceback if entry.frame.code.name == "forward")
    linecache.checkcache()
    line = linecache.getline(str(frame.frame.code.raw.co_filename), frame.lineno + 1)
    assert line.strip() == "out = out + x.narrow(1, 0, 99).sum()"


def test_deepcopy_and_pickle() -> None:
    model, x = Child(), torch.randn(3, 4)
    edit_module(model, [
        edit("reshape", "size", 1, 4, function=FORWARD), edit("reshape", "size", 2, 2, function=FORWARD),
        edit("layer_norm", "argument", 1, (4,), name="normalized_shape", function=FORWARD),
    ])  # fmt: skip
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert twin.linear.weight is not model.linear.weight
        assert torch.equal(twin(x), model(x))


def test_pickle_into_another_process(tmp_path: Path) -> None:
    model, x = Rebound(), torch.randn(3, 4)
    edit_module(model, [edit("reshape", "size", 0, 3, function=f"{HERE}:Rebound.forward_b"),
                        edit("reshape", "size", 1, 4, function=f"{HERE}:Rebound.forward_b")])  # fmt: skip
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps((model, x)))
    code = (
        "import pickle, sys; model, x = pickle.loads(open(sys.argv[1], 'rb').read());"
        "import inspect; inspect.getsource(type(model).forward_b); print(tuple(model(x).shape))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "(3, 4)"


def test_compiles_without_a_break() -> None:
    model, x = Everything(), torch.randn(2, 12)
    edit_module(model, [edit("narrow", "argument", 3, PerExecution((2, 4)), name="length"),
                        edit("__getitem__", "start", 1, 0, 1), edit("view", "size", -1, 4)])  # fmt: skip
    wrap_calls(model, {site(EVERYTHING, "scaled_dot_product_attention"): lambda f, *a: f(*a) * 2})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_edits_add_up_and_later_ones_win() -> None:
    model = Everything()
    edit_module(model, [edit("view", "size", -1, 6)])
    edit_module(model, [edit("view", "size", -1, 5), edit("view", "size", -2, 2)])
    assert {change.argument.index: change.value for change in edits_of(model)[0].changes} == {-1: 5, -2: 2}
    assert "a = x.view(*x.shape[:-1], 2, 5)" in inspect.getsource(type(model).forward)


@pytest.mark.parametrize(
    "bad",
    [
        edit("view", "size", 0, 6, ordinal=3),
        edit("view", "size", 0, 6, function=f"{HERE}:Everything.backward"),
        edit("view", "split", 0, (1, 2)),
        edit("narrow", "start", 0, 2),
        edit("cat", "argument", 4, 2),
        Edit(site("os:system", "f", via=(Step(EVERYTHING, "view", 0),)), ()),
    ],
)
def test_what_is_not_there_is_refused_and_nothing_changes(bad: Edit) -> None:
    model = Everything()
    with pytest.raises(PlanError):
        edit_module(model, [bad])
    assert type(model) is Everything


def test_module_that_is_not_there() -> None:
    with pytest.raises(PlanError, match="no module 'a'"):
        apply_edits(Everything(), [CallEdit(site(EVERYTHING, "view", module="a"), ())])
