"""Ways of training that people use: each gives what the plain loop gives, or what dense training gives in that mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import prunegate

STEPS = 20


def build(name: str = "test_vit") -> prunegate.GatedModel:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8} if name == "test_vit" else {}
    return prunegate.attach(timm.create_model(name, num_classes=5, **size), torch.randn(1, 3, 32, 32)).train()


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(5, (size,), generator=generator)


def searching(name: str = "test_vit") -> tuple[prunegate.GatedModel, prunegate.Budget]:
    """A model whose gates are drawn: past the steps that score."""
    gated = build(name)
    budget = prunegate.Budget(gated, flops=0.5, steps=STEPS)
    gated.prunegate.seed(5)
    for step in range(4):
        nn.functional.cross_entropy(gated(batch(step)[0]), batch(step)[1]).backward()
        budget.step()
    gated.zero_grad()
    return gated, budget


def gradients(gated: prunegate.GatedModel, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    images, labels = batch(9)
    gated.zero_grad()
    gated.prunegate.seed(5)
    nn.functional.cross_entropy(run(images).float(), labels).backward()
    taken = gated.prunegate.take_gradient()
    assert taken is not None
    return {"logits": taken, **{n: p.grad.clone() for n, p in gated.named_parameters() if p.grad is not None}}


def near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name].float() - value).norm() / value.norm().clamp(min=1e-3))
        assert error < tolerance, (name, error)


def test_gradient_accumulation_sums_what_each_forward_drew() -> None:
    gated, budget = searching()
    parts = []
    for step in range(3):
        nn.functional.cross_entropy(gated(batch(step)[0]), batch(step)[1]).backward()
        parts.append(gated.prunegate.take_gradient())
    again, _ = searching()
    for step in range(3):
        nn.functional.cross_entropy(again(batch(step)[0]), batch(step)[1]).backward()
    torch.testing.assert_close(again.prunegate.take_gradient(), torch.stack(parts).sum(0))
    assert budget.phase == "search"


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_grad_scaler_changes_nothing_but_the_range(scale: float) -> None:
    def search(scaled: bool) -> Tensor:
        gated = build()
        budget = prunegate.Budget(gated, flops=0.5, steps=STEPS)
        gated.prunegate.seed(5)
        optimizer = torch.optim.SGD(gated.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6, enabled=scaled)
        for step in range(STEPS):
            loss = nn.functional.cross_entropy(gated(batch(step)[0]), batch(step)[1]) + budget.loss()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            budget.step()
        return gated.mask

    assert torch.equal(search(True), search(False))


def test_a_step_that_the_scaler_skips_moves_no_gate() -> None:
    gated, budget = searching()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: p.detach().clone() for name, p in gated.named_parameters()}
    ranks = budget.state_dict()["ranks"].clone()
    scaler.scale(100 * nn.functional.cross_entropy(gated(batch(0)[0]), batch(0)[1])).backward()
    scaler.step(optimizer)
    scaler.update()
    budget.step()
    assert scaler.get_scale() < 2.0**127
    assert torch.equal(budget.state_dict()["ranks"], ranks)
    assert all(torch.equal(p, before[n]) for n, p in gated.named_parameters() if n != "prunegate.logits")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_bfloat16_autocast_is_near_full_precision(name: str) -> None:
    gated, _ = searching(name)

    def low(images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gated(images)

    full, found = gradients(gated, gated), gradients(gated, low)
    assert found["logits"].dtype == torch.float32
    last = {"test_vit": "head.weight", "test_resnet": "fc.weight"}[name]
    assert nn.functional.cosine_similarity(found[last].flatten(), full[last].flatten(), 0) > 0.98


def test_channels_last_gives_the_same_gradients() -> None:
    gated, _ = searching("test_resnet")
    twin = copy.deepcopy(gated)
    expected = gradients(gated, gated)
    twin.to(memory_format=torch.channels_last)
    near(gradients(twin, lambda x: twin(x.contiguous(memory_format=torch.channels_last))), expected, 1e-3)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_checkpointed_activations_see_the_stored_sample(name: str) -> None:
    gated, _ = searching(name)
    expected = gradients(gated, gated)
    before = int(gated.prunegate.counter[1])
    gated.set_grad_checkpointing(True)
    near(gradients(gated, gated), expected, 1e-4)
    assert int(gated.prunegate.counter[1]) == before == 1, "the recomputation draws nothing"


def test_an_average_of_the_weights_follows_the_search() -> None:
    gated, budget = searching()
    ema = ModelEmaV3(gated, decay=0.0)
    while not budget.finished:
        nn.functional.cross_entropy(gated(batch(1)[0]), batch(1)[1]).backward()
        with torch.no_grad():
            for parameter in gated.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        gated.zero_grad()
        budget.step()
        ema.update(gated)
    ema.module.mask = gated.mask
    gated.eval()
    torch.testing.assert_close(ema.module.eval()(batch(2)[0]), gated(batch(2)[0]))
    ema.module.prunegate.seed(1)
    assert not torch.equal(ema.module.prunegate.counter, gated.prunegate.counter)


def test_compiled_search_has_no_break_and_is_compiled_once() -> None:
    torch._dynamo.reset()
    gated, budget = searching()
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.append(1)
        return graph.forward

    compiled = torch.compile(gated, fullgraph=True, backend=backend)
    drawn = []
    for step in range(8):
        optimizer_free_loss = nn.functional.cross_entropy(compiled(batch(step)[0]), batch(step)[1])
        optimizer_free_loss.backward()
        drawn.append(torch.cat([piece.detach().flatten() for piece in gated.prunegate.sample.pieces or ()]))
        tau, noise = gated.prunegate.tau, gated.prunegate.noise
        budget.step()
        assert (tau, noise) != (gated.prunegate.tau, gated.prunegate.noise)
    assert seen == [1], "temperature, noise, target and draw number moved without another compilation"
    assert not torch.equal(drawn[0], drawn[1])
    gated.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch(0)[0]), gated(batch(0)[0]), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_gradients_are_those_of_eager_code() -> None:
    torch._dynamo.reset()
    gated, _ = searching()
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    near(gradients(gated, compiled), gradients(gated, gated), 1e-3)
    torch._dynamo.reset()
