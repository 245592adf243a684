"""Cutting along plans written by hand: tensors, what is tied, attributes, caches, and plans that do not fit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from prunegate import PlanError, apply_plan
from prunegate.plan import Argument, AttributeEdit, CallEdit, CallSite, Change, Plan
from prunegate.slim.apply import plan_of


class Tied(nn.Module):
    """Two names for one weight, a buffer, a plain tensor, a cache and a nested list of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.BatchNorm1d(4)
        self.scale = torch.arange(4.0)
        self.cache = {"cpu": torch.zeros(4)}
        self.info = [{"width": 4, "name": "a"}]
        self.sizes = [2, 4]

    def forward(self, index: Tensor) -> Tensor:
        """[N] to [N, 6]."""
        return self.head(self.norm(self.table(index)) * self.scale)


KEPT = (0, 2, 3)
PLAN = Plan(
    {"table.weight": (6, 4), "norm.weight": (4,), "norm.bias": (4,), "norm.running_mean": (4,),
     "norm.running_var": (4,), "scale": (4,)},
    {"table.weight": {1: KEPT}, "norm.weight": {0: KEPT}, "norm.bias": {0: KEPT}, "norm.running_mean": {0: KEPT},
     "norm.running_var": {0: KEPT}, "scale": {0: KEPT}},
    (AttributeEdit("", "info.0.width", 4, 3), AttributeEdit("", "sizes", (2, 4), (2, 3))),
)  # fmt: skip


def test_cut_by_hand() -> None:
    model = Tied().eval()
    model.norm.running_mean.normal_()
    index = torch.tensor([0, 5, 2])
    state = copy.deepcopy(model.state_dict())
    slim = apply_plan(model, PLAN)
    assert type(slim) is Tied
    assert slim.head.weight is slim.table.weight
    hidden = model.norm(model.table(index))[:, KEPT] * model.scale[list(KEPT)]
    torch.testing.assert_close(slim(index), hidden @ model.table.weight[:, KEPT].T)
    assert (slim.head.in_features, slim.table.embedding_dim, slim.norm.num_features) == (3, 3, 3)
    assert slim.info == [{"width": 3, "name": "a"}]
    assert slim.sizes == [2, 3]
    assert slim.cache == {}
    assert isinstance(slim.table.weight, nn.Parameter)
    # The given model is as it was.
    assert model.info == [{"width": 4, "name": "a"}]
    assert set(model.cache) == {"cpu"}
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_plan_is_carried_and_composed() -> None:
    model = Tied()
    slim = apply_plan(model, PLAN)
    assert plan_of(model) == Plan()
    assert plan_of(slim) == PLAN
    assert plan_of(copy.deepcopy(slim)) == PLAN
    again = Plan({"scale": (3,)}, {"scale": {0: (1,)}}, (AttributeEdit("", "sizes", (2, 3), (2, 1)),))
    twice = apply_plan(slim, again)
    at_once = apply_plan(model, plan_of(twice))
    assert torch.equal(twice.scale, at_once.scale)
    assert torch.equal(at_once.scale, torch.tensor([2.0]))
    assert twice.sizes == at_once.sizes == [2, 1]
    for name, tensor in twice.state_dict().items():
        assert torch.equal(tensor, at_once.state_dict()[name])


def test_skeleton_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Tied()
    slim = apply_plan(model, PLAN)
    assert slim.table.weight.shape == (6, 3)
    assert slim.table.weight.is_meta
    assert slim.head.weight is slim.table.weight


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    rows = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    hidden = (0, 2)
    stacked = tuple(5 * gate + unit for gate in range(rows) for unit in hidden)
    model = nn.Sequential(kind(3, 5, batch_first=True)).double()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    kept = {
        "0.weight_ih_l0": {0: stacked, 1: (1, 2)},
        "0.weight_hh_l0": {0: stacked, 1: hidden},
        "0.bias_ih_l0": {0: stacked},
        "0.bias_hh_l0": {0: stacked},
    }
    slim = apply_plan(model, Plan(shapes, kept))
    assert (slim[0].input_size, slim[0].hidden_size) == (2, 2)
    reference = kind(2, 2, batch_first=True).double()
    reference.load_state_dict({name.removeprefix("0."): value for name, value in slim.state_dict().items()})
    x = torch.randn(2, 7, 2, dtype=torch.float64)
    assert torch.equal(slim(x)[0], reference(x)[0])


def test_channels_last_and_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)).to(memory_format=torch.channels_last)
    plan = Plan(
        {"0.weight": (8, 1, 3, 3), "0.bias": (8,)},
        {"0.weight": {0: (0, 1, 6, 7)}, "0.bias": {0: (0, 1, 6, 7)}},
        (AttributeEdit("0", "groups", 4, 2),),
    )
    slim = apply_plan(model, plan)
    assert slim[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (slim[0].in_channels, slim[0].out_channels, slim[0].groups) == (2, 4, 2)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(slim(x[:, [0, 3]]), model(x)[:, [0, 1, 6, 7]])


class Padded(nn.Linear):
    """A layer whose width means something else than the size of its weight."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.out_features = 99


def test_attributes_that_mean_something_else_are_left_alone() -> None:
    model = nn.Sequential(Padded())
    kept = {"0.weight": {0: (1, 2), 1: (0, 3)}, "0.bias": {0: (1, 2)}}
    slim = apply_plan(model, Plan({"0.weight": (6, 4), "0.bias": (6,)}, kept))
    assert (slim[0].in_features, slim[0].out_features) == (2, 99)


@pytest.mark.parametrize(
    "plan",
    [
        Plan({"nothing": (4,)}, {"nothing": {0: (1,)}}),
        Plan({"scale": (5,)}, {"scale": {0: (1,)}}),
        Plan(attributes=(AttributeEdit("", "sizes", (2, 5), (2, 3)),)),
        Plan(attributes=(AttributeEdit("", "width", 2, 3),)),
        Plan(attributes=(AttributeEdit("nothing", "x", 2, 3),)),
        Plan(attributes=(AttributeEdit("", "info.1.width", 2, 3),)),
        Plan(attributes=(AttributeEdit("norm", "affine", 1, 0),)),
        Plan(calls=(CallEdit(CallSite("", "m:f", "view", 0), (Change(Argument("size"), 1),)),)),
        Plan(calls=(CallEdit(CallSite("nothing", "m:f", "view", 0), ()),)),
    ],
)
def test_plan_for_another_model_is_refused(plan: Plan) -> None:
    model = Tied()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(PlanError):
        apply_plan(model, plan)
    assert classes == [type(module) for module in model.modules()]
    assert model.sizes == [2, 4]
