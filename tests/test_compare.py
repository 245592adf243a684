"""The comparison: nothing leaks between its parts of the data, nothing exceeds a budget, its arithmetic is right."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import prunegate

ROOT = Path(__file__).parents[1]
# Last, for that folder has a module of the name of a standard one.
sys.path.append(str(ROOT / "tools"))

import compare  # noqa: E402
from comparison import images, methods, networks, peers, report, training  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fashion-MNIST's files, with 15,500 training images that are told apart by their first pixels."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 15_500), ("t10k", 30)):
        pixels = np.zeros((n, 28, 28), np.uint8)
        pixels[:, 0, 0], pixels[:, 0, 1] = np.arange(n) % 250, np.arange(n) // 250
        labels = rng.integers(0, 10, n).astype(np.uint8)
        for kind, data in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, data.ndim]) + b"".join(size.to_bytes(4, "big") for size in data.shape)
            with gzip.open(tmp_path / f"{name}-{kind}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(header + data.tobytes())
    return tmp_path


# ------------------------------------------------------------------------------------------------ data


def test_validation_images_are_never_trained_on(folder: Path) -> None:
    tuning, validation = images.load(folder, 28)
    first, second = ({tuple(row) for row in part.images[:, 0, 0, :2].tolist()} for part in (tuning, validation))
    assert (len(first), len(second)) == (10_240, 5_000)
    assert not first & second


def test_images_keep_their_labels(folder: Path) -> None:
    tuning, _ = images.load(folder, 28)
    numbers = ((tuning.images[:, 0, 0, :2] * 0.353 + 0.286) * 255).round() @ torch.tensor([1.0, 250.0])
    written = np.random.default_rng(0).integers(0, 10, 15_500)
    np.testing.assert_array_equal(tuning.labels.numpy(), written[numbers.long().numpy()])


def test_small_images_are_means_of_the_large(folder: Path) -> None:
    large, _ = images.load(folder, 28)
    small, _ = images.load(folder, 14)
    oracle = large.images[:9].reshape(9, 14, 2, 14, 2).mean((2, 4))
    torch.testing.assert_close(small.images[:9, 0], oracle)


def test_batches_depend_on_the_seed_alone_and_show_every_image_once() -> None:
    numbers = torch.arange(60.0)
    data = images.Images(torch.stack([numbers, -numbers], 1).reshape(60, 1, 1, 2), numbers.long())
    first, again, other = ([*data.batches(20, 3, seed)] for seed in (0, 0, 1))
    for (x, _), (y, _) in zip(first, again, strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(first[0][1], other[0][1])
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(60))
    mirrored = torch.cat([x[:, 0, 0, 0] < 0 for x, _ in first])
    assert 10 < int(mirrored.sum()) < 50
    for x, labels in first:
        assert torch.equal(x[:, 0, 0].abs().amax(1), labels.float())


def test_without_the_files_it_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        images.load(tmp_path, 28)


# ------------------------------------------------------------------------------------------------ peers


class _Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_peer_gets_the_largest_cut_within_the_budget() -> None:
    """Also where costs do not fall with the share, and where some cuts do not run."""

    def odd(share: float) -> nn.Module | None:
        return None if 0.3 < share < 0.35 else _Wide(900 if share < 0.2 else round(1000 * share))

    best = peers._largest([odd], torch.zeros(1, 4), 4 * 512, {})
    assert 505 <= best.layer.out_features <= 512


def test_a_later_way_to_cut_is_tried_only_where_the_first_falls_short() -> None:
    def first(share: float) -> nn.Module:
        return _Wide(400)

    def second(share: float) -> nn.Module:
        return _Wide(500)

    assert peers._largest([first, second], torch.zeros(1, 4), 4 * 510, {}).layer.out_features == 500
    assert peers._largest([first, second], torch.zeros(1, 4), 4 * 410, {}).layer.out_features == 400
    with pytest.raises(RuntimeError, match="no cut"):
        peers._largest([first, second], torch.zeros(1, 4), 4 * 100, {})


def test_what_was_tried_for_one_budget_is_not_tried_again_for_another() -> None:
    tried: list[float] = []

    def cut(share: float) -> nn.Module:
        tried.append(share)
        return _Wide(round(1000 * share))

    costs: peers.Costs = {}
    peers._largest([cut], torch.zeros(1, 4), 4 * 300, costs)
    first = len(tried)
    assert peers._largest([cut], torch.zeros(1, 4), 4 * 700, costs).layer.out_features in range(697, 701)
    assert len(tried) - first <= first - 15
    assert costs[0, tried[0]] == 4 * round(1000 * tried[0])


def test_torch_pruning_stays_within_the_budget_and_removes_heads() -> None:
    pytest.importorskip("torch_pruning")
    dense, example = networks.NETWORKS["deit-small"].fresh(0), torch.zeros(1, 1, 14, 14)
    whole = prunegate.count_flops(dense, example)
    batches = [(torch.randn(8, 1, 14, 14), torch.arange(8))]
    slim = peers.torch_pruning(dense, example, 0.4 * whole, batches, {}, taylor=True, everywhere=False)
    assert 0.3 * whole < prunegate.count_flops(slim, example) <= 0.4 * whole
    assert slim(torch.randn(3, 1, 14, 14)).shape == (3, 10)
    assert sum(block.attn.num_heads for block in slim.blocks) < 16
    assert prunegate.count_flops(dense, example) == whole


def test_torch_pruning_merges_patches_from_what_it_kept() -> None:
    """Each of four neighbours loses the same channels that the patches lost, by the weights that are left."""
    pytest.importorskip("torch_pruning")
    dense, example = networks.NETWORKS["swin"].fresh(0), torch.zeros(1, 1, 28, 28)
    most = 0.4 * prunegate.count_flops(dense, example)
    slim = peers.torch_pruning(dense, example, most, [], {}, taylor=False, everywhere=False)
    assert 0.9 * most < prunegate.count_flops(slim, example) <= most

    def kept(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Which rows are left."""
        return torch.tensor([int((before == row).flatten(1).all(1).nonzero()) for row in after])

    channels = kept(dense.patch_embed.proj.weight, slim.patch_embed.proj.weight)
    rows = torch.cat([32 * neighbour + channels for neighbour in range(4)])
    (before, after) = (model.layers[1].downsample.reduction.weight for model in (dense, slim))
    outputs = kept(before[:, rows], after)
    assert 2 <= len(channels) < 32
    assert 2 <= len(outputs) < 64
    assert [module.num_heads for module in slim.modules() if hasattr(module, "qkv")] == [2, 2, 4, 4]


# ------------------------------------------------------------------------------------------------ methods


def _cell(**more: object) -> methods.Cell:
    network = networks.NETWORKS["deit-small"]
    data = images.made_up(network.size, 200)
    recipe = training.Recipe(steps=10, dense_steps=4, batch=16)
    return methods.Cell(network, network.fresh(0).eval(), 0.4, 0, recipe, data, data.part(50), **more)


def test_a_refit_comes_once_before_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    refit = prunegate.refit

    def noted(slim: nn.Module, dense: nn.Module, batches: list[torch.Tensor]) -> object:
        seen.append((dense, [batch.clone() for batch in batches]))
        return refit(slim, dense, batches)

    monkeypatch.setattr(prunegate, "refit", noted)
    cell = _cell()
    methods.METHODS["prunegate"](cell)
    assert not seen
    methods.METHODS["prunegate, refit"](cell)
    (dense, (found,)) = seen[0]
    assert len(seen) == 1
    assert dense is cell.dense
    assert torch.equal(found, torch.cat([images for images, _ in list(cell.scoring())[:4]]))


@pytest.mark.parametrize("method", ["prunegate", "prunegate, refit", "one-shot combined", "one-shot random",
                                    "from scratch"])  # fmt: skip
def test_methods_take_equally_many_steps_and_leave_the_dense_network_alone(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (taken.append(1), step(self, *a)))
    cell = _cell()
    before = {name: value.clone() for name, value in cell.dense.state_dict().items()}
    outcome = methods.METHODS[method](cell)
    assert len(taken) == (10 if method != "from scratch" else 10 + 4 + 10)
    assert prunegate.count_flops(outcome.model, cell.example) <= cell.most
    for name, value in cell.dense.state_dict().items():
        assert torch.equal(value, before[name])


def test_training_learns_and_the_rate_ends_at_nought() -> None:
    torch.manual_seed(0)
    data = images.made_up(14, 400)
    model, recipe = nn.Sequential(nn.Flatten(), nn.Linear(196, 10)), training.Recipe(lr=1e-2, batch=32)
    optimizer = training.optimizer_for(model, recipe)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    training.train(model, training.batches_for(data, recipe, 60, 0), optimizer, recipe, range(60), 60)
    assert training.accuracy(model, data) > 95
    rates = [recipe.rate(step, 60) for step in range(61)]
    assert max(rates) == recipe.lr == rates[3]
    assert rates[60] == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------------------ report and runs


def test_paired_differences_are_those_of_a_paired_test() -> None:
    ours, theirs = {0: 90.0, 1: 91.5, 2: 89.0, 7: 10.0}, {0: 89.0, 1: 91.0, 2: 89.5, 8: 99.0}
    mean, error, seeds = report.paired(ours, theirs)
    test = stats.ttest_rel([90.0, 91.5, 89.0], [89.0, 91.0, 89.5])
    assert (mean, seeds) == (pytest.approx(1 / 3), 3)
    assert mean / error == pytest.approx(test.statistic)


def test_the_best_peer_is_judged_on_the_seeds_that_both_have() -> None:
    found = {"prunegate": {0: 80.0, 1: 82.0}, "torch-pruning a": {0: 79.0, 1: 80.0, 2: 99.0},
             "torch-pruning b": {0: 78.0, 1: 81.5}, "kirigami": {0: 95.0}, "one-shot": {0: 99.0, 1: 99.0},
             "torch-pruning c + distillation": {0: 99.0, 1: 99.0}}  # fmt: skip
    assert report.best_peer(found) == "torch-pruning b"
    assert report.best_peer({"prunegate": {0: 1.0}, "torch-pruning a": {1: 1.0}}) is None


def test_the_summary_says_where_it_is_behind(tmp_path: Path) -> None:
    rows = [{"network": "n", "budget": 1.0, "method": "dense", "seed": 0, "share": 1.0, "validation": 90.0}]
    for budget, gain in ((0.5, -1.0), (0.3, 1.0), (0.15, 0.0)):
        for seed in range(3):
            for method, value in (("prunegate", 80.0 + gain), ("torch-pruning x", 80.0 + (-1) ** seed * 0.1)):
                rows.append({"network": "n", "budget": budget, "method": method, "seed": seed, "share": budget,
                             "before": 10.0, "validation": value})  # fmt: skip
    report.write_report(rows, {}, tmp_path, {"steps": 3})
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| n |")]
    assert [line.split("|")[-2].strip() for line in lines] == ["behind", "ahead", "no difference shown"]
    assert "-1.03 ± 0.07" in lines[0]
    report.write_report([row for row in rows if row["seed"] == 1], {}, tmp_path, {"steps": 3})
    text = (tmp_path / "table.md").read_text()
    assert "| -0.90 | 1 | one seed |" in text
    assert "nan" not in text


def _run(tmp_path: Path, *more: str) -> None:
    compare.main(["--smoke", "--networks", "deit-small", "--budgets", "0.4", "--methods", "one-shot random",
                  "one-shot magnitude", "--output", str(tmp_path), *more])  # fmt: skip


def test_a_run_resumes_and_reads_the_test_set_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(cell: methods.Cell) -> methods.Outcome:
        calls.append(cell.seed)
        if cell.seed == 1:
            raise ValueError("cannot do this")
        return methods.Outcome(cell.dense, 10.0)

    monkeypatch.setattr(compare, "METHODS", {name: partial(failing) for name in methods.METHODS})
    _run(tmp_path, "--seeds", "0")
    _run(tmp_path, "--seeds", "0", "1")
    assert calls == [0, 0, 1, 1]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows if row["seed"] == 0] == ["dense", "one-shot random", "one-shot magnitude"]
    assert rows[-1]["error"] == "ValueError: cannot do this"
    assert "cannot do this" in (tmp_path / "table.md").read_text()
    _run(tmp_path, "--seeds", "0", "1", "--test")
    assert "(test)" in (tmp_path / "table.md").read_text()
    assert len(json.loads((tmp_path / "test.json").read_text())) == 4
    with pytest.raises(SystemExit, match="has been read"):
        _run(tmp_path, "--seeds", "0", "1", "--test")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_seeds_may_share_dense_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def noting(cell: methods.Cell) -> methods.Outcome:
        seen[cell.seed] = next(cell.dense.parameters()).detach().clone()
        return methods.Outcome(cell.dense, 10.0)

    monkeypatch.setattr(compare, "METHODS", dict.fromkeys(methods.METHODS, noting))
    _run(tmp_path, "--seeds", "4", "5", "6", "--dense-seeds", "0", "1")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows if row["method"] == "dense"] == [0, 1]
    assert [row["dense_seed"] for row in rows if row["method"] == "one-shot random"] == [0, 1, 0]
    assert torch.equal(seen[4], seen[6])
    assert not torch.equal(seen[4], seen[5])


def test_results_of_another_recipe_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": 7}))
    with pytest.raises(SystemExit, match="another recipe"):
        _run(tmp_path)


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/compare.py"), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "smoke/rows.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} >= {"dense", "prunegate", "torch-pruning taylor global", "from scratch"}
    assert all(row["share"] <= 0.4 for row in rows if "error" not in row and row["method"] != "dense")
