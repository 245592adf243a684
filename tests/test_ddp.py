"""Several processes: the same gates everywhere without a message, the gradients of one process with all the data."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import prunegate

STEPS = 20
BATCH = 4


def build() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(5, (BATCH,), generator=generator)


def drawn(gated: prunegate.GatedModel) -> Tensor:
    assert gated.prunegate.sample.pieces is not None
    return torch.cat([piece.detach().flatten() for piece in gated.prunegate.sample.pieces])


def search(run: nn.Module, gated: prunegate.GatedModel, rank: int, world: int, accumulate: int = 1) -> dict[str, Any]:
    """One search; ``rank`` -1 sees the batches of all ranks joined, as one process would."""
    budget = prunegate.Budget(gated, flops=0.5, steps=STEPS)
    gated.prunegate.seed(11)  # a single process and a group agree on seeds of their own
    optimizer = torch.optim.SGD(run.parameters(), lr=0.05)
    seen: dict[str, list[Tensor]] = {"draws": [], "logits": [], "masks": [], "gradients": []}
    run.train()
    for step in range(STEPS):
        for part in range(accumulate):
            ranks = range(world) if rank < 0 else [rank]
            pairs = [batch(step * accumulate + part, each) for each in ranks]
            images, labels = (torch.cat(each) for each in zip(*pairs, strict=True))
            last = part == accumulate - 1
            with nullcontext() if last or not isinstance(run, DistributedDataParallel) else run.no_sync():
                loss = nn.functional.cross_entropy(run(images), labels) + budget.loss()
                (loss / accumulate).backward()
            seen["draws"].append(drawn(gated))
        seen["gradients"].append(torch.cat([p.grad.flatten() for p in gated.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
        seen["logits"].append(gated.logits.detach().clone())
        seen["masks"].append(gated.mask)
    return {**{name: torch.stack(values) for name, values in seen.items()}, "plan": gated.plan().to_json()}


def _ranks(rank: int, folder: str, accumulate: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gated = prunegate.attach(build())
    torch.manual_seed(rank)  # whatever else the ranks draw, gates are the same
    replica = DistributedDataParallel(gated)  # find_unused_parameters is off
    torch.save(search(replica, gated, rank, 2, accumulate), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_ranks_are_one_process_with_both_batches(tmp_path: Path, accumulate: int) -> None:
    torch.multiprocessing.spawn(_ranks, (str(tmp_path), accumulate), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["plan"] == second["plan"]
    for name in ("draws", "logits", "masks", "gradients"):
        assert torch.equal(first[name], second[name]), name
    moving = first["draws"][4 * accumulate : -6 * accumulate]
    assert not torch.equal(moving[0], moving[1]), "every forward has a sample of its own"
    gated = prunegate.attach(build())
    alone = search(gated, gated, -1, 2, accumulate)
    torch.testing.assert_close(alone["gradients"][0], first["gradients"][0], rtol=1e-4, atol=1e-6)
    # Later steps start from weights that differ in their last bits.
    torch.testing.assert_close(alone["gradients"][:6], first["gradients"][:6], rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(alone["logits"][:6], first["logits"][:6], rtol=1e-3, atol=1e-3)


def _seeds(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gated = prunegate.attach(build())
    torch.manual_seed(100 + rank)
    prunegate.Budget(gated, flops=0.5, steps=STEPS)
    torch.save(gated.prunegate.counter, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_budget_agrees_on_one_seed_that_follows_the_users(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_seeds, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    gated = prunegate.attach(build())
    torch.manual_seed(100)
    prunegate.Budget(gated, flops=0.5, steps=STEPS)
    assert torch.equal(gated.prunegate.counter, first)
    torch.manual_seed(101)
    prunegate.Budget(gated, flops=0.5, steps=STEPS)
    assert not torch.equal(gated.prunegate.counter, first)


def test_draws_go_on_where_a_saved_search_stopped() -> None:
    def steps(gated: prunegate.GatedModel, budget: prunegate.Budget, count: int) -> list[Tensor]:
        found = []
        for step in range(count):
            loss = nn.functional.cross_entropy(gated(batch(step, 0)[0]), batch(step, 0)[1])
            loss.backward()
            budget.step()
            found.append(drawn(gated))
        return found

    gated = prunegate.attach(build()).train()
    budget = prunegate.Budget(gated, flops=0.5, steps=STEPS)
    steps(gated, budget, 6)
    weights, state = {k: v.clone() for k, v in gated.state_dict().items()}, budget.state_dict()
    rest = steps(gated, budget, 5)
    torch.manual_seed(77)
    twin = prunegate.attach(build()).train()
    resumed = prunegate.Budget(twin, flops=0.5, steps=STEPS)
    twin.load_state_dict(weights)
    resumed.load_state_dict(state)
    for expected, found in zip(rest, steps(twin, resumed, 5), strict=True):
        assert torch.equal(expected, found)


def _fails(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gated = prunegate.attach(build()).train()
    budget = prunegate.Budget(gated, flops=0.5, steps=STEPS)
    replica = DistributedDataParallel(gated)
    for step in range(STEPS):
        if rank == 1 and step == 3:
            raise RuntimeError("the disk of rank 1 is gone")
        replica(batch(step, rank)[0]).sum().backward()
        budget.step()


def test_a_rank_that_fails_stops_the_others_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"the disk of rank 1 is gone|Connection closed by peer"):
        torch.multiprocessing.spawn(_fails, (str(tmp_path),), nprocs=2)


def _sharded(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gated = prunegate.attach(build())
    mesh = init_device_mesh("cpu", (2,))
    for block in gated.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(gated, mesh=mesh, ignored_params={gated.logits})
    budget = prunegate.Budget(gated, flops=0.5, steps=STEPS)
    gated.prunegate.seed(11)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05)
    gated.train()
    found, gradients = [], []
    for step in range(STEPS):
        images, labels = batch(step, rank)
        loss = nn.functional.cross_entropy(gated(images), labels) + budget.loss()
        loss.backward()
        found.append(drawn(gated))
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in gated.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
    state = {"draws": torch.stack(found), "mask": gated.mask, "gradients": torch.stack(gradients)}
    torch.save(state, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_sharded_parameters_train_as_replicated_ones(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sharded, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["draws"], second["draws"])
    assert torch.equal(first["mask"], second["mask"])
    gated = prunegate.attach(build())
    alone = search(gated, gated, -1, 2)
    assert torch.equal(alone["draws"][:5], first["draws"][:5])
    torch.testing.assert_close(alone["gradients"][:5], first["gradients"][:5], rtol=1e-2, atol=1e-4)
