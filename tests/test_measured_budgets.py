"""Budgets on latency where the model of it is wrong: the final cut is measured, and the choice corrected."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import prunegate
from prunegate import Budget, BudgetError, GatedModel
from prunegate.budget import stopwatch, tables, whole
from prunegate.budget.latency import LatencyTable
from prunegate.budget.whole import Measured, measure
from tests.timers import Stopwatch, chain


def of_operator(function: Any, args: Any, kwargs: Any) -> float:
    """Milliseconds of an operator, by the sizes of its operands alone; calls it too."""
    function(*args, **kwargs)
    first, *others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return 0.001 + 1e-5 * first.numel() + (1e-5 * others[0].numel() if "convolution" in str(function) else 0.0)


class Engine:
    """Times whole models: the sum of their operators, which ``real`` makes something else of.

    The first model that it is asked for is the dense one.
    """

    def __init__(self, real: Any) -> None:
        self.real = real
        self.calls = 0
        self.dense: float | None = None

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> float:
        """Milliseconds of one call."""
        self.calls += 1
        with torch.no_grad(), Stopwatch(of_operator) as watch:
            model(*args, **kwargs)
        if self.dense is None:
            self.dense = watch.total
        return self.real(watch.total, self.dense)


def small() -> GatedModel:
    return chain(8, 48, 100, 80, 32)


def share_of(gated: GatedModel, real: Any) -> float:
    """What the exported model takes of the dense one, by an engine of its own."""
    engine = Engine(real)
    dense = whole.cut(gated, gated.gate_map.start())
    return measure(gated, dense, gated.export().eval(), engine).share


def slower(total: float, dense: float) -> float:
    """Every cut takes 15% longer than its operators."""
    return total if total >= dense else 1.15 * total


def with_a_start(total: float, dense: float) -> float:
    """What no cut saves; more of a small model."""
    return total + 0.1 * dense


def faster(total: float, dense: float) -> float:
    """Cuts take less than their operators."""
    return total if total >= dense else 0.85 * total


@pytest.mark.parametrize("real", [slower, with_a_start, faster])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_model_that_is_off_still_ends_within_the_limit(real: Any, round_to: int, share: float) -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    budget = Budget(gated, latency=share, latency_table=table, latency_check=Engine(real), steps=10, round_to=round_to)
    budget.finish()
    found = share_of(gated, real)
    assert 0.95 * share < found <= share
    assert budget.measured is not None
    assert budget.measured.share == pytest.approx(found)
    assert budget.expected("latency") == pytest.approx(found * table.predict(gated), rel=1e-6)
    assert f"measured: {budget.measured.slim_ms:.3f} ms, {found:.4f} of the dense model's" in budget.report()
    widths = [int(gated.mask[group.slice].sum()) for group in gated.groups]
    assert all(width % round_to == 0 for width in widths)


def test_without_a_check_the_same_model_is_too_slow() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    for check in (True, False):
        gated.mask = None
        budget = Budget(gated, latency=0.5, latency_table=table, latency_check=check, steps=10)
        budget.finish()
        assert 0.55 < share_of(gated, slower) < 0.6
        assert budget.measured is None
        why = "the table holds another engine's times" if check else "latency_check=False was given"
        assert f"predicted, not measured: {why}" in budget.report()


def test_milliseconds_are_those_that_were_measured() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    most = 0.6 * table.predict(gated)
    engine = Engine(lambda total, dense: 1.15 * total)
    budget = Budget(gated, latency_ms=most, latency_table=table, latency_check=engine, steps=10)
    budget.finish()
    assert budget.measured is not None
    assert 0.96 * most < budget.measured.slim_ms <= most
    slim = gated.export().eval()
    with torch.no_grad(), Stopwatch(of_operator) as watch:
        slim(gated.example_input)
    assert 1.15 * watch.total == pytest.approx(budget.measured.slim_ms)


def test_all_budgets_hold_and_the_other_may_bind() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    for flops, latency_binds in ((0.9, True), (0.2, False)):
        gated.mask = None
        engine = Engine(slower)
        budget = Budget(gated, latency=0.6, flops=flops, latency_table=table, latency_check=engine, steps=10)
        budget.finish()
        used = gated.cost.flops(gated.mask) / gated.cost.flops()
        found = share_of(gated, slower)
        assert found <= 0.6
        assert used <= flops
        assert (found > 0.57) == latency_binds
        assert (used > 0.99 * flops) != latency_binds
        assert engine.calls <= 1 + 2 * 6


def test_a_right_model_is_measured_once() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    engine = Engine(lambda total, dense: total)
    budget = Budget(gated, latency=0.5, latency_table=table, latency_check=engine, steps=10)
    budget.finish()
    assert engine.calls == 3  # does it work at all; dense, slim
    assert 0.48 < share_of(gated, engine.real) <= 0.5


def test_a_limit_that_no_cut_keeps_is_said_and_the_fastest_kept() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    engine = Engine(lambda total, dense: total + 0.5 * dense)
    budget = Budget(gated, latency=0.3, latency_table=table, latency_check=engine, steps=10)
    with pytest.warns(UserWarning, match=r"none of \d cuts keeps within the budget of .* Ask for at least that"):
        budget.finish()
    assert budget.measured is not None
    assert 0.3 < budget.measured.share < 0.4
    assert [int(gated.mask[group.slice].sum()) for group in gated.groups] == [1] * len(gated.groups)


def test_the_mask_of_the_last_fifth_is_the_measured_one() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    budget = Budget(gated, latency=0.5, latency_table=table, latency_check=Engine(slower), steps=50)
    masks = []
    for _ in range(50):
        budget.step()
        masks.append(gated.mask)
    assert all(torch.equal(mask, masks[-1]) for mask in masks[40:])
    assert not torch.equal(masks[39], masks[-1])
    assert share_of(gated, slower) <= 0.5


# ---------------------------------------------------------------------- timers that fail


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0, math.inf, None, True])
def test_timers_that_give_no_time_are_refused_at_once(bad: Any) -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    with pytest.raises(BudgetError, match=r"latency_check= gave .* expected milliseconds of one call"):
        Budget(gated, latency=0.5, latency_table=table, latency_check=lambda *_: bad, steps=10)
    assert gated.prunegate.phase == "open"


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf, None])
def test_timers_of_operators_that_give_no_time_are_refused(bad: Any) -> None:
    with pytest.raises(BudgetError, match=r"the timer gave .* for convolution.* expected milliseconds of one call"):
        LatencyTable.measure(small(), timer=lambda *_: bad)


def test_a_check_that_is_no_timer_is_refused() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    with pytest.raises(BudgetError, match=r"latency_check='yes' was given; expected True, False, or a function"):
        Budget(gated, latency=0.5, latency_table=table, latency_check="yes", steps=10)


def test_a_timer_that_fails_late_does_not_end_the_search() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)

    class Broken(Engine):
        def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> float:
            if self.calls > 1:
                raise OSError("the board does not answer")
            return super().__call__(model, args, kwargs)

    budget = Budget(gated, latency=0.5, latency_table=table, latency_check=Broken(slower), steps=10)
    with pytest.warns(UserWarning, match="not measured .*OSError: the board does not answer"):
        budget.finish()
    assert 0.49 * table.predict(gated) < table.predict(gated, gated.mask) <= 0.5 * table.predict(gated)
    assert "predicted, not measured: timing failed: OSError: the board does not answer" in budget.report()


# ---------------------------------------------------------------------- this device


def on_this_device(monkeypatch: pytest.MonkeyPatch, share: Any) -> GatedModel:
    """A model with a table of this device's own, where whole models take what ``share`` makes of a prediction."""
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    table.overhead[next(iter(_overhead(gated)))] = (0.0, 1.0)  # torch's own operators were timed

    def measured(own: GatedModel, dense: nn.Module, slim: nn.Module, timer: Any = None) -> Measured:
        engine = Engine(share)
        before = engine(dense, (own.example_input,), {})
        after = engine(slim, (own.example_input,), {})
        return Measured(before, after, after / before)

    monkeypatch.setattr(whole, "measure", measured)
    monkeypatch.setattr(LatencyTable, "measure", classmethod(lambda cls, gated, **_: table))
    return gated


def _overhead(gated: GatedModel) -> dict[str, Any]:
    from prunegate.budget.latency import _model_key
    from prunegate.budget.timed import find_operators

    return {_model_key(find_operators(gated)): None}


def test_cuts_are_measured_where_the_table_was(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = on_this_device(monkeypatch, slower)
    gated.train()
    budget = Budget(gated, latency=0.5, steps=10)
    budget.finish()
    assert 0.48 < share_of_engine(gated) <= 0.5
    assert gated.training
    assert all(module.training for module in gated.modules())


def share_of_engine(gated: GatedModel) -> float:
    engine = Engine(slower)
    dense = engine(whole.cut(gated, gated.gate_map.start()), (gated.example_input,), {})
    return engine(gated.export().eval(), (gated.example_input,), {}) / dense


def test_on_another_device_there_is_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = on_this_device(monkeypatch, slower)
    budget = Budget(gated, latency=0.5, steps=10)
    monkeypatch.setattr(whole, "device_name", lambda device: "another")
    with pytest.warns(UserWarning, match="not measured .*the model is on 'another' now"):
        budget.finish()
    assert 0.55 < share_of_engine(gated) < 0.6
    assert "predicted, not measured: the table was measured on" in budget.report()


def test_a_doubtful_table_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = on_this_device(monkeypatch, slower)
    table = LatencyTable.measure(gated)
    (key,) = table.overhead
    for factor, far in ((1.4, False), (0.7, False), (1.9, True), (0.5, True)):
        gated.mask = None
        table.overhead[key] = (0.0, factor)
        if not far:
            Budget(gated, latency=0.5, latency_table=table, steps=10)
            continue
        with pytest.warns(UserWarning, match=rf"operators take {factor:.2f} times .* measure again"):
            Budget(gated, latency=0.5, latency_table=table, steps=10)


def test_whole_models_are_timed_by_the_clock() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
    gated = prunegate.attach(net, (torch.randn(8, 64),))
    mask = torch.zeros(512, dtype=torch.bool)
    mask[:32] = True
    found = measure(gated, whole.cut(gated, gated.gate_map.start()), whole.cut(gated, mask))
    assert 0 < found.share < math.inf
    assert found.slim_ms > 0
    assert found.dense_ms > 0
    assert gated.prunegate.phase == "open"


def test_calls_take_turns_and_the_first_of_each_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    now = 0.0

    def call(name: str, first: float, others: float) -> None:
        nonlocal now
        now += first if seen[-1:] != [name] else others
        seen.append(name)

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now)
    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: now)
    calls = [lambda: call("dense", 9.0, 0.002), lambda: call("slim", 7.0, 0.001)]
    turns = stopwatch.time_in_turn(calls, cuda=False, least_seconds=100.0, least_rounds=2)
    assert turns.shape == (7, 2)  # of 16 seconds each
    assert turns == pytest.approx(np.tile([2.0, 1.0], (7, 1)))
    assert seen[6:14] == ["dense"] * 4 + ["slim"] * 4


def test_an_operators_time_is_that_of_the_undisturbed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def function(taken: float) -> None:
        nonlocal now
        now += taken

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now)
    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: now)
    times = itertools.cycle([0.001, 0.008, 0.008])
    found = stopwatch.time_operator(function, lambda: ((next(times),), {}), least_seconds=0.1)
    assert found == pytest.approx(1.0)


# ---------------------------------------------------------------------- resumed, and on several ranks


@pytest.mark.parametrize("stop", [3, 20, 42])
def test_a_resumed_search_has_the_table_and_the_mask(stop: int, tmp_path: Path) -> None:
    def run(gated: GatedModel, budget: Budget, first: int, last: int) -> None:
        for i in range(first, last):
            gradient = torch.randn(gated.logits.numel(), generator=torch.Generator().manual_seed(i))
            (gated.logits * gradient).sum().backward()
            budget.step()

    def begin(factor: float) -> tuple[GatedModel, Budget]:
        gated = small()
        table = LatencyTable.measure(gated, timer=lambda *call: factor * of_operator(*call) ** (1 / factor))
        return gated, Budget(gated, latency=0.5, latency_table=table, latency_check=Engine(slower), steps=45)

    whole_run, budget = begin(1.0)
    run(whole_run, budget, 0, 45)
    begun, first = begin(1.0)
    run(begun, first, 0, stop)
    torch.save({"model": begun.state_dict(), "budget": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, second = begin(1.2)  # measured again, with other results
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["budget"])
    run(resumed, second, stop, 45)
    assert torch.equal(resumed.mask, whole_run.mask)
    assert torch.equal(resumed.logits, whole_run.logits)
    assert second.measured == budget.measured
    assert second.report() == budget.report()


def test_a_state_of_another_latency_is_refused() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    state = Budget(gated, latency=0.5, latency_table=table, steps=10).state_dict()
    other = Budget(gated, latency=0.6, latency_table=table, steps=10)
    with pytest.raises(BudgetError, match="was saved with limits"):
        other.load_state_dict(state)
    assert other.target("latency") > 0
    with pytest.raises(BudgetError, match="was saved with limits"):
        Budget(gated, flops=0.5, steps=10).load_state_dict(state)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gated = small()
    plain = LatencyTable.measure

    def failing(cls: Any, gated: GatedModel, **_: Any) -> LatencyTable:
        raise RuntimeError("out of memory")

    LatencyTable.measure = classmethod(failing)
    with pytest.raises((BudgetError, RuntimeError)) as caught:
        tables.table_for(gated, None)
    assert ("out of memory" if rank == 0 else "the first process could not measure") in str(caught.value)

    def measured(cls: Any, gated: GatedModel, **_: Any) -> LatencyTable:
        # Every process would measure something else; of this only the first one's may count.
        return plain(gated, timer=lambda *call: (1 + rank) * of_operator(*call) ** (1 + 0.2 * rank))

    LatencyTable.measure = classmethod(measured)

    def timer(model: nn.Module, args: Any, kwargs: Any) -> float:
        assert rank == 0, "one process measures"
        return engine(model, args, kwargs)

    engine = Engine(slower)
    budget = Budget(gated, latency=0.5, latency_check=timer, steps=10)
    budget.finish()
    torch.save({"mask": gated.mask, "report": budget.report(), "share": budget.measured.share}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _rank_that_cannot_cut(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gated = small()
    table = LatencyTable.measure(gated, timer=of_operator)
    budget = Budget(gated, latency=0.5, latency_table=table, latency_check=Engine(slower), steps=10)
    cut = whole.cut

    def failing(gated: GatedModel, mask: Tensor) -> nn.Module:
        if rank == 1:
            raise RuntimeError("out of memory")
        return cut(gated, mask)

    whole.cut = failing
    with pytest.warns(UserWarning, match="out of memory" if rank else "another process could not make the cut model"):
        budget.finish()
    assert budget.measured is None
    torch.save(gated.mask, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_rank_that_cannot_cut_stops_the_measurements_of_all(tmp_path: Path) -> None:
    running = torch.multiprocessing.spawn(_rank_that_cannot_cut, (str(tmp_path),), nprocs=2, join=False)
    end = time.monotonic() + 120
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < end, "the ranks wait for each other"
    finally:
        for process in running.processes:
            process.kill()
    assert torch.equal(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))


def test_ranks_choose_the_same_mask_by_the_first_ones_measurements(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["mask"], second["mask"])
    assert first["report"] == second["report"]
    gated = small()
    gated.mask = first["mask"]
    assert share_of(gated, slower) == pytest.approx(first["share"])
    assert 0.48 < first["share"] <= 0.5
