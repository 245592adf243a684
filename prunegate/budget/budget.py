"""The budget of a search: what the user's loop calls once a step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunegate.budget.damage import marginal_damage, shared_out
from prunegate.budget.following import followed, warn_of, with_whole
from prunegate.budget.latency import LatencyTable
from prunegate.budget.learner import Learner, initial_ranks, magnitudes
from prunegate.budget.limits import MEGABYTE, PICOSECONDS, check_together, make_limits, make_widths, show, tile_of
from prunegate.budget.memory import MemoryModel
from prunegate.budget.mixing import Mixing
from prunegate.budget.nested import Levels, smallest_of
from prunegate.budget.projection import project
from prunegate.budget.promise import Exact, Promise
from prunegate.budget.ranks import averaged, from_first
from prunegate.budget.schedule import Schedule, ramp
from prunegate.budget.stopwatch import Timer
from prunegate.budget.tables import make_trial, table_for
from prunegate.budget.whole import Measured
from prunegate.errors import BudgetError, ExportError
from prunegate.gated import GatedModel
from prunegate.gates import NOISE_FLOOR
from prunegate.polynomial import Polynomial
from prunegate.select import Limit, Selection, Width, select

__all__ = ["Budget"]

_HELD_OPEN = 8.0
_TIE_BREAK = 1e-3
_STATE_VERSION = 1


class Budget:
    """Brings a gated model to a budget while the user trains it, and settles on the units that stay.

    The first steps (a tenth of all, 20 at most) run with every gate open and score the units. Then gates are drawn at
    random; the expected cost falls along a cubic schedule and is held on it by a shift of all logits; what the task's
    gradient says moves the logits against one another. After four fifths of the remaining steps the final mask is
    chosen, and the weights settle on it for the last fifth. The last :meth:`step` finishes.

    The logits belong to the budget: the user's optimizer, whatever it is, neither moves nor decays them.

    Groups of which units cannot go, because the model's own code cannot follow, stay whole; a warning names them and
    the place. A trial cut finds them, when the budget is made.

    Args:
        gated: What ``prunegate.attach`` returned.
        flops: Share of the dense model's FLOPs in (0, 1], or an absolute number of 1000 or more; one multiply-add is
            one FLOP, at the batch size of the example input. A list of them makes one search for all: see
            :meth:`mask_for`; the mask that it ends with is that of the smallest.
        params: The same for the number of parameters. At least one budget is needed, all of them hold.
        latency: Share of the dense model's latency in (0, 1], on the device where the model is.
        latency_ms: The same in milliseconds.
        memory_mb: Peak memory of an eval-mode forward at the example input's batch, in megabytes of 2**20 bytes:
            weights, input and activations, without the kernels' scratch space.
        latency_table: A ``LatencyTable`` of this device, or the path of one; without it the model's operators are
            measured at once, which takes from seconds to minutes.
        latency_check: Whether the final cut is measured beside the dense model, and the choice corrected until it is
            as fast as was asked for (a few seconds a cut, six cuts at most, when the mask is chosen). A table of
            another engine's times is checked by that engine: pass its timer of whole models (``timer(module, args,
            kwargs)`` gives milliseconds of one call). Where it cannot be measured, :meth:`report` says so.
        steps: Number of optimizer steps that the search takes; 20% of all training is a good choice.
        tau: Temperature of the relaxed gates that gradients flow through, a number or (start, end).
        noise: Scale of the logistic noise in the draws, a number or (start, end).
        round_to: Kept widths are multiples of this, except where a group is smaller: a number, ``"auto"`` (what the
            device likes: 8 or 16 elements, and more, up to 64, where that is at most an eighth of the group), or a
            mapping from patterns of group names to these.
        min_keep: What every group keeps at least: a share of its units (float), their number (int), or a mapping from
            patterns. One unit by default.
        max_keep: What every group keeps at most, likewise.
        ignore: Patterns of groups that are held open.
        calibration: Inputs of the model (labels beside them are not looked at), one or two batches as in training.
            With them the search starts from what is measured to change the output least: each group alone loses more
            and more of its units, six forwards of every batch for a group. Without them all groups start alike. Where
            logits were set, they say in which order a group's units go.

    Attributes:
        gated: The gated model.
        steps: Number of steps in all.
        step_count: Number of steps done.
        selection: The final choice, with its score and its distance to the relaxation's bound; ``None`` before.

    Raises:
        BudgetError: A value is malformed or out of reach, alone or beside the others; says what is reachable.
        ExportError: No cut of the model runs.

    Example:
        >>> import torch, prunegate
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2))
        >>> gated = prunegate.attach(net, torch.randn(1, 64))
        >>> budget = prunegate.Budget(gated, flops=0.5, steps=10)
        >>> optimizer = torch.optim.AdamW(gated.parameters())
        >>> for _ in range(10):
        ...     loss = gated(torch.randn(8, 64)).square().mean() + budget.loss()
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     budget.step()
        >>> int(gated.mask.sum())
        64
    """

    def __init__(self, gated: GatedModel, *, flops: float | Sequence[float] | None = None, params: float | None = None,
                 latency: float | None = None, latency_ms: float | None = None,
                 latency_table: LatencyTable | str | Path | None = None, latency_check: bool | Timer = True,
                 memory_mb: float | None = None, steps: int,
                 tau: float | tuple[float, float] = 1.0, noise: float | tuple[float, float] = (0.3, 0.0),
                 round_to: int | str | Mapping[str, Any] = 1, min_keep: float | Mapping[str, float] | None = None,
                 max_keep: float | Mapping[str, float] | None = None,
                 ignore: Collection[str] = (), calibration: Iterable[Any] | None = None) -> None:  # fmt: skip
        if not hasattr(gated, "prunegate") or not hasattr(gated, "cost"):
            raise BudgetError(
                f"a {type(gated).__name__} was given; expected the gated model that prunegate.attach returned "
                "(inside a wrapper such as DistributedDataParallel it is .module)"
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise BudgetError(f"steps={steps!r} was given; expected the number of optimizer steps, a whole number")
        self.gated = gated
        self.steps = steps
        self.step_count = 0
        self.selection: Selection | None = None
        self._gates = gated.prunegate
        self._tau, self._noise = ramp("tau", tau, positive=True), ramp("noise", noise, positive=False)
        patterns = (ignore,) if isinstance(ignore, str) else ignore
        params_of, tile = gated.cost.polynomials["params"], tile_of(gated.logits.device)
        widths = make_widths(gated.groups, params_of, tile, round_to, min_keep, max_keep, patterns)
        self._widths = followed(gated, widths)
        self._calibration = None if calibration is None else list(calibration)
        if self._calibration is not None and not self._calibration:
            raise BudgetError("calibration= has no batches; expected inputs of the model, a few dozen of them")
        if self._calibration is not None and any(width.one_of for width in widths):
            raise BudgetError("calibration= measures units, and this model has choices of operators; leave it out")
        flops, several = smallest_of("flops", flops, (params, latency, latency_ms, memory_mb))
        self._levels = None
        if several:
            made = [make_limits({"flops": each}, gated.cost.polynomials, self._widths)[0] for each in several]
            self._levels = Levels(made)
        self._asked = {"flops": flops, "params": params, "latency": latency, "latency_ms": latency_ms,
                       "memory_mb": memory_mb}  # fmt: skip
        self._memory = None if memory_mb is None else MemoryModel(gated)
        self._table: LatencyTable | None = None
        if latency is not None or latency_ms is not None:
            if latency is not None and latency_ms is not None:
                raise BudgetError("latency= and latency_ms= were both given; they say the same thing, pass one of them")
            self._table = table_for(gated, latency_table).part(gated)
        self._latency_check = latency_check
        self._costs, self._promise = self._make_promise(self._table)
        n = gated.logits.numel()
        self._learner = Learner(self._widths, n)
        self._mixing = self._make_mixing()
        self._squares = torch.zeros(n, dtype=torch.float64)
        self._scored = 0
        self._finished = False
        self._ranks: Tensor | None = None
        self._written: Tensor | None = None
        self._shift = 0.0
        self._quick: tuple[tuple[int, int], Tensor] | None = None
        self._held = torch.zeros(n, dtype=torch.bool)
        self._take(self._widths)
        self.schedule = Schedule.of(steps, score=not bool(gated.logits.detach().any()))
        self._gates.take_gradient()
        self._agree_on_draws()
        self._gates.selector = self._current_mask
        self._gates.tau, self._gates.noise = self._tau.start, self._noise.start
        self._gates.phase = "score"
        if self.schedule.scoring == 0:
            self._start_search()

    def _make_promise(self, table: LatencyTable | None) -> tuple[dict[str, Polynomial], Promise]:
        """The costs by name and the promise, with predicted times from ``table``."""
        gated, memory = self.gated, self._memory
        costs = dict(gated.cost.polynomials)
        exact: dict[str, Exact] = {}
        trial, untried = None, ""
        if table is not None:
            # The device was checked where the table came from; a resumed search may be on another.
            costs["latency"] = table.polynomial(gated, check=False)
            predict = table.predictor(gated, check=False)
            exact["latency"] = lambda mask: round(predict(mask) * PICOSECONDS)
        points = [] if memory is None else [memory.cost(point) for point in memory.likely()]
        if memory is not None:
            costs["memory"] = points[0]
            exact["memory"] = lambda mask: memory.peak(mask)[0]
        limits = make_limits(self._asked, costs, self._widths, exact)
        # The peak is where most is held at once: each such point must stay below the limit.
        limits += [Limit("memory", cost, limits[-1].most) for cost in points[1:]]
        if table is not None:
            whole = None if self._asked["latency"] is None else exact["latency"](gated.gate_map.start())
            trial, untried = make_trial(gated, table, self._latency_check, whole)
        promise = Promise(limits, self._widths, gated.gate_map.start(), exact, memory, trial, untried)
        check_together(promise.limits, self._widths)
        return costs, promise

    def _make_mixing(self) -> Mixing | None:
        costs = [limit.cost for limit in self._limits]
        return Mixing.of(self._widths, costs, self.gated.trace, self.gated.gate_map)

    @property
    def _limits(self) -> list[Limit]:
        return self._promise.limits

    # ------------------------------------------------------------------ the loop

    def loss(self) -> Tensor:
        """A scalar to add to the task's loss; regularisers of the gates enter here. Zero with the default recipe."""
        return self.gated.logits.new_zeros(())

    def step(self) -> None:
        """Moves on by one optimizer step: takes the logits' gradient, moves them, and holds the next target.

        Under ``torch.distributed`` the gradient is averaged over all ranks, so every rank must call it. A step whose
        gradient is not finite (a ``GradScaler`` skips it too) moves the schedule only.

        Raises:
            BudgetError: The search is over.
        """
        if self._finished:
            raise BudgetError(
                f"budget.step() was called after the search of {self.steps} steps had ended (step {self.step_count}); "
                "export the model, or make a new Budget with more steps"
            )
        gradient = averaged(self._gates.take_gradient(), self.gated.logits)
        self.step_count += 1
        if self.phase == "score":
            if gradient is not None:
                self._squares += gradient.pow(2)
                self._scored += 1
            if self.step_count >= self.schedule.scoring:
                self._start_search()
        elif self.phase == "search":
            self._move(gradient)
        elif self._levels is not None and self._levels.masks:
            self.gated.mask = self._levels.mask_of(self.step_count)
        if self.phase == "search" and self.step_count >= self.schedule.moving:
            self._settle()
        if self.step_count >= self.steps:
            self.finish()

    def finish(self) -> None:
        """Settles on the final mask at once, from the logits as they are. A second call changes nothing.

        Where the logits were never set, they start from the scores gathered so far and the weights' magnitudes.
        """
        if self._finished:
            return
        if self.phase == "score":
            self._start_search()
        if self.phase != "fixed" or self.selection is None:
            self._settle()
        if self._levels is not None:
            self.gated.mask = self._levels.masks[-1]
        self._finished = True

    def mask_for(self, flops: float) -> Tensor:
        """After a search for several budgets, the mask for any budget between the largest and the smallest.

        Args:
            flops: A share of the dense model's FLOPs, or an absolute number of 1000 or more.

        Returns:
            bool ``[n_gates]``; units that a smaller budget keeps, a larger one keeps too.

        Raises:
            BudgetError: The search was made for one budget, has not chosen yet, or does not reach so far.
        """
        if self._levels is None:
            raise BudgetError(
                "this search was made for one budget; a Budget(flops=[most, ..., least]) can be cut at any between"
            )
        return self._levels.mask_for(flops)

    # ------------------------------------------------------------------ what can be read

    @property
    def phase(self) -> str:
        """``"score"``, ``"search"`` or ``"fixed"``."""
        return self._gates.phase

    @property
    def finished(self) -> bool:
        """Whether the search is over."""
        return self._finished

    @property
    def tau(self) -> float:
        """The current temperature."""
        return self._gates.tau

    @property
    def noise(self) -> float:
        """The current scale of the noise."""
        return self._gates.noise

    @property
    def measured(self) -> Measured | None:
        """What the final cut was measured to take, under a budget on latency; ``None`` if it was not (yet)."""
        return self._promise.measured

    def target(self, name: str | None = None) -> float:
        """The value that the expected cost is held to in this step.

        Args:
            name: ``"flops"``, ``"params"``, ``"latency"`` (milliseconds) or ``"memory"`` (megabytes); the first budget
                if left out. A cost without a budget may be all of it.
        """
        name, cost = self._cost(name)
        for i, limit in enumerate(self._limits):
            if name == limit.name:
                return self._target_of(i) / _unit(name)
        return cost.dense / _unit(name)

    def expected(self, name: str | None = None) -> float:
        """The expected cost of this step's draw; the exact cost once the mask is chosen. Named as in :meth:`target`."""
        name, cost = self._cost(name)
        if self.phase == "search":
            return float(cost.expected(self._probabilities())) / _unit(name)
        return self._promise.used(Limit(name, cost, 0), self._gates.mask().cpu()) / _unit(name)

    def report(self) -> str:
        """One line per budget: how much of it is used, and why not more. Meant for people."""
        return self._promise.report(self._gates.mask().cpu(), self.selection)

    def __repr__(self) -> str:
        asked = ", ".join(
            f"{limit.name}={show(limit.name, self._promise.asked[limit.name])} of "
            f"{show(limit.name, self._promise.dense(limit))}"
            for limit in self._promise.named()
        )
        return f"Budget({asked}; step {self.step_count} of {self.steps}, {self.phase})"

    def param_groups(self, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups of the model's weights, the logits left out.

        Args:
            lr: Learning rate of both groups.
            weight_decay: Decay of the first group; ``None`` leaves it to the optimizer's default.

        Returns:
            Two groups: weights, and what is not decayed (vectors, and what the model's ``no_weight_decay`` names).
        """
        keep = getattr(self.gated, "no_weight_decay", None)
        undecayed = set(keep()) if callable(keep) else set()
        decayed: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.gated.named_parameters():
            if parameter is not self.gated.logits and parameter.requires_grad:
                (others if parameter.ndim <= 1 or name in undecayed else decayed).append(parameter)
        first: dict[str, Any] = {"params": decayed, "lr": lr}
        if weight_decay is not None:
            first["weight_decay"] = weight_decay
        return [first, {"params": others, "lr": lr, "weight_decay": 0.0}]

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """What a resumed search needs beside ``gated.state_dict()``: tensors, numbers and strings only."""
        return {
            "version": _STATE_VERSION,
            "limits": {limit.name: limit.most for limit in self._limits},
            "steps": self.steps,
            "scoring": self.schedule.scoring,
            "calibrated": self._calibration is not None,
            "step_count": self.step_count,
            "phase": self.phase,
            "finished": self._finished,
            "squares": self._squares.clone(),
            "scored": self._scored,
            "ranks": self._ranks,
            "written": self._written,
            "shift": self._shift,
            "learner": self._learner.state_dict(),
            "levels": None if self._levels is None else self._levels.state_dict(),
            "mixing": None if self._mixing is None else self._mixing.state_dict(),
            "latency": None if self._table is None else self._latency_state(self._table),
            "mask": self._gates.fixed_mask.cpu().clone(),
            "draws": [] if self._gates.counter is None else self._gates.counter.tolist(),
            "selection": None if self.selection is None else vars(self.selection).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes a search; load ``gated.state_dict()`` too.

        A search for a latency goes on with the table that it was begun with, whatever this budget was made with.

        Raises:
            BudgetError: The state is of another search (budgets, number of steps or gates differ).
        """
        try:
            table = self._saved_table(state)
            costs, promise = self._costs, self._promise
            if table is not None and table != self._table:
                costs, promise = self._make_promise(table)
            own = {"version": _STATE_VERSION, "limits": {limit.name: limit.most for limit in promise.limits},
                   "steps": self.steps, "number of gates": self._squares.numel()}  # fmt: skip
            saved = {key: state[key] for key in ("version", "limits", "steps")}
            saved["number of gates"] = state["squares"].numel()
            own["calibration"], saved["calibration"] = self._calibration is not None, state.get("calibrated", False)
            for key, value in own.items():
                if saved[key] != value:
                    raise BudgetError(
                        f"the state was saved with {key} {saved[key]}, this budget has {value}; make the Budget with "
                        "the same arguments on the same model"
                    )
            if table is not None:
                promise.load_state_dict(state["latency"]["promise"])
                self._table, self._costs, self._promise = table, costs, promise
                self._mixing = self._make_mixing()
            self._learner.load_state_dict(state["learner"])
            if self._levels is not None:
                self._levels.load_state_dict(state["levels"], self._widths)
            if self._mixing is not None:
                self._mixing.load_state_dict(state["mixing"])
            self.schedule = Schedule.of(self.steps, score=state["scoring"] > 0)
            self.step_count = int(state["step_count"])
            self._finished = bool(state["finished"])
            self._squares, self._scored = state["squares"].clone(), int(state["scored"])
            self._ranks, self._written, self._shift = state["ranks"], state["written"], float(state["shift"])
            self.selection = None if state["selection"] is None else Selection(**state["selection"])
            phase = state["phase"]
            self._gates.fixed_mask.copy_(state["mask"])
            self._gates.seed(*state["draws"])
        except (KeyError, TypeError, AttributeError) as error:
            raise BudgetError(f"this is not a state of a Budget: {error!r}; pass what state_dict() returned") from error
        # A budget that is made on logits that are set shifts them at once; what was saved stands.
        with torch.no_grad():
            if self._written is None:
                self.gated.logits.zero_()
            else:
                self.gated.logits.copy_(self._written)
        self._gates.phase = phase
        self._set_pace()

    def _latency_state(self, table: LatencyTable) -> dict[str, Any]:
        return {"table": table.to_json(), "promise": self._promise.state_dict()}

    def _saved_table(self, state: Mapping[str, Any]) -> LatencyTable | None:
        """The table in a state; ``None`` if it, or this search, is for no latency."""
        saved = state.get("latency")
        return None if saved is None or self._table is None else LatencyTable.from_json(saved["table"], "the state")

    # ------------------------------------------------------------------ inside

    def _agree_on_draws(self) -> None:
        """One seed for all ranks, from the first rank's generator; the draws themselves need no communication."""
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
        self._gates.seed(int(from_first(seed, self.gated.logits.device)))

    def _cost(self, name: str | None) -> tuple[str, Polynomial]:
        name = self._limits[0].name if name is None else name
        if name not in self._costs:
            raise BudgetError(f"there is no cost named {name!r}; expected one of {', '.join(self._costs)}")
        return name, self._costs[name]

    def _scale(self) -> float:
        return max(self._gates.noise, NOISE_FLOOR)

    def _probabilities(self) -> Tensor:
        logits = self.gated.logits.detach().cpu().double() / self._scale()
        return torch.sigmoid(logits) if self._mixing is None else self._mixing.chances(logits)

    def _set_pace(self) -> None:
        progress = self.schedule.progress(self.step_count)
        self._gates.tau, self._gates.noise = self._tau.at(progress), self._noise.at(progress)

    def _start_search(self) -> None:
        logits = self.gated.logits.detach().cpu().double()
        if not bool(logits.any()):
            gate_map, n = self.gated.gate_map, logits.numel()
            scores = [magnitudes(n, gate_map.dims, self.gated.named_parameters())]
            if gate_map.inner:
                scores[0] += magnitudes(n, gate_map.inner, self.gated.named_parameters())
            if self._scored:
                scores.append(self._squares / self._scored)
            logits = initial_ranks(scores, self._widths)
        if self._calibration is not None:
            damage = marginal_damage(self.gated, logits, self._widths, self._calibration)
            logits = shared_out(logits, damage, self._limits, self._widths)
        self._ranks = from_first(logits, self.gated.logits.device)
        self._gates.phase = "search"
        self._hold()

    def _current_ranks(self) -> Tensor:
        """The logits without the shift; a user, or a loaded state, may have changed them."""
        logits = self.gated.logits.detach().cpu()
        if self._ranks is None or self._written is None or not torch.equal(logits, self._written):
            self._ranks = logits.double() + (self._shift if self._mixing is None else self._mixing.taken(self._shift))
        return self._ranks

    def _move(self, gradient: Tensor | None) -> None:
        ranks = self._current_ranks()
        if gradient is not None:
            p = self._probabilities()
            # What binds is what a unit is charged for.
            ratios = [float(limit.cost.expected(p)) / self._target_of(i) for i, limit in enumerate(self._limits)]
            binding = self._limits[ratios.index(max(ratios))]
            gradient = gradient.masked_fill(self._held, 0.0)
            price = binding.cost.gradient(p)
            if self._mixing is None:
                self._ranks = self._learner.step(ranks, gradient, price, self._trust(binding, p))
            else:
                after = self._learner.step(ranks, self._mixing.without(gradient), price)
                progress = self.schedule.progress(self.step_count)
                self._ranks = self._mixing.step(ranks, after, gradient, progress)
        self._hold()

    def _trust(self, binding: Limit, p: Tensor) -> float:
        """How far the gradient may lead away from where the search started.

        An open gate's gradient says nothing about its removal: the weights are at rest with it, so it is noise. What
        shows which groups should have more comes from closed gates, of which there are few under a mild budget, and it
        is as far as the search has gone that what was measured on the whole network may have become wrong.
        """
        if self._calibration is None:
            return 1.0
        return max(0.0, 1 - float(binding.cost.expected(p)) / binding.cost.dense) ** 2

    def _target_of(self, index: int) -> float:
        limit = self._limits[index]
        start = limit.cost.dense if self._mixing is None else float(limit.cost.expected(self._mixing.start))
        most = limit.most if self._levels is None else self._levels.most(self.step_count)
        return self.schedule.target(self.step_count, start, most)

    def _hold(self) -> None:
        """Writes logits whose expected costs are on target, at the noise of the step to come."""
        self._listen()
        self._set_pace()
        assert self._ranks is not None
        ranks = self._ranks.masked_fill(self._held, _HELD_OPEN)
        costs = [(limit.cost, self._target_of(i)) for i, limit in enumerate(self._limits)]
        found = project(ranks, costs, self._scale(), self._widths, self._shift, self._mixing)
        self._shift = found.shift
        with torch.no_grad():
            self.gated.logits.copy_(found.logits.masked_fill(self._held, _HELD_OPEN))
        self._written = self.gated.logits.detach().cpu().clone()

    def _listen(self) -> None:
        """The logits as they are decide which choices are read, and so which get a bonus in those to come."""
        if self._mixing is not None and self._written is not None:
            self._mixing.listen(self.gated.logits.detach().cpu().double() / self._scale())

    def _scores(self, logits: Tensor) -> Tensor:
        """The chance that the search draws a unit; where chances saturate, the logits themselves still order units.

        With scores that ignore the noise, cheap units that the search had closed would push out costly ones that it
        had open, and the weights have adapted to what was open.
        """
        scores = torch.sigmoid(logits / self._scale()) + _TIE_BREAK * torch.sigmoid(logits)
        scores = scores.masked_fill(self._held, 1.0)
        if self._mixing is None:
            return self.gated.gate_map.worth(scores)
        # Where the target had to be reached by a bonus for what is costly, the final choice keeps the bonus.
        untilted = logits + max(self._shift, 0.0) * self._mixing.tilt
        mixed = self._mixing.score(scores, untilted, logits / self._scale())
        return self.gated.gate_map.worth(mixed)

    def _take(self, widths: list[Width]) -> None:
        """Takes over what each group may keep; groups that stay whole have no say."""
        self._widths = self._promise.widths = widths
        for width in widths:
            self._held[width.slice] = width.held

    def _settle(self) -> None:
        """Chooses the final mask, at the noise with which a search ends, whenever that is.

        Groups of which it removes units that cannot go, which a trial before the search did not find, stay whole.
        """
        self._settle_once()
        while whole := self._stays_whole():
            self._take(with_whole(self.gated.groups, self._widths, whole))
            try:
                self._settle_once()
            except BudgetError as error:  # a search that is nearly over must not end by it
                warn_of(whole, f". Then the budget cannot be met: {error}")
                return
            warn_of(whole)

    def _stays_whole(self) -> dict[str, str]:
        """The groups of which the chosen mask removes units that cannot go."""
        try:
            return self.gated.planner.whole_under(self.gated.mask.cpu())
        except ExportError:  # a search that is nearly over must not end by it: export() says what is wrong
            return {}

    def _settle_once(self) -> None:
        self._listen()
        self._gates.tau, self._gates.noise = self._tau.end, self._noise.end
        ranks = self._current_ranks().masked_fill(self._held, _HELD_OPEN)
        final = [(limit.cost, float(limit.most)) for limit in self._limits]
        found = project(ranks, final, self._scale(), self._widths, self._shift, self._mixing)
        self._shift = found.shift
        scores = self._scores(found.logits)
        self.selection = self._choose(scores)
        with torch.no_grad():
            self.gated.logits.copy_(found.logits.masked_fill(self._held, _HELD_OPEN))
        self._written = self.gated.logits.detach().cpu().clone()
        self.gated.mask = self.selection.mask
        if self._levels is not None:
            self._levels.settle(self._scores_under, self._widths)
            self.gated.mask = self._levels.masks[-1]

    def _choose(self, scores: Tensor) -> Selection:
        """The final choice, in which nothing is spent on operators whose output nothing reads."""
        selection = self._promise.choose(scores)
        while self._mixing is not None and self._mixing.spends_unread(scores, selection.mask):
            scores = self._mixing.without_unread(scores, selection.mask)
            selection = self._promise.choose(scores)
        return selection

    def _scores_under(self, limit: Limit) -> Tensor:
        """Scores at the chances with which the search meets a limit."""
        ranks = self._current_ranks().masked_fill(self._held, _HELD_OPEN)
        target = [(limit.cost, float(limit.most))]
        found = project(ranks, target, self._scale(), self._widths, self._shift, self._mixing)
        before, self._shift = self._shift, found.shift
        scores = self._scores(found.logits)
        self._shift = before
        return scores

    def _current_mask(self, flops: float | None = None) -> Tensor:
        if flops is not None:
            return self.mask_for(flops).to(self.gated.logits.device)
        return self._for_target()

    def _for_target(self) -> Tensor:
        """The selection for the current target, by one threshold: what evaluation in the middle of a search sees."""
        logits = self.gated.logits
        key = (self.step_count, logits._version)
        if self._quick is None or self._quick[0] != key:
            limits = [
                type(limit)(limit.name, limit.cost, int(self._target_of(i))) for i, limit in enumerate(self._limits)
            ]
            scores = self._scores(logits.detach().cpu().double())
            self._quick = (key, select(scores, limits, self._widths, thorough=False).mask)
        return self._quick[1].to(logits.device)


def _unit(name: str) -> int:
    return {"latency": PICOSECONDS, "memory": MEGABYTE}.get(name, 1)
