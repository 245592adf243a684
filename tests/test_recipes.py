"""The recipes: data that does not leak, records that others can read, and the whole way on a tiny network."""

from __future__ import annotations

import csv
import gzip
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import options
import plots
import progress
import prune
import pytest
import report
import timm
import torch
from data import create_loaders, split_off
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

import prunegate

ROOT = Path(__file__).parents[1]
DATA = ["--dataset", "digits", "--in-chans", "1", "--img-size", "32", "--mean", "0.5", "--std", "0.5",
        "--workers", "0", "--crop-pct", "1"]  # fmt: skip
TINY = [*DATA, "--model", "resnet10t", "--model-kwargs", "stem_width=8", "channels=(8,16,16,32)", "--device", "cpu",
        "--batch-size", "128", "--val-fraction", "0.2"]  # fmt: skip


def loaders(*more: str) -> tuple[Namespace, list[torch.utils.data.DataLoader]]:
    args = options.parse_args([*DATA, *more])
    args.distributed = False
    config = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,), "interpolation": "nearest", "crop_pct": 1.0,
              "crop_mode": "center"}  # fmt: skip
    return args, list(create_loaders(args, config, torch.device("cpu")))


# ------------------------------------------------------------------------------------------------ command line


def test_arguments_come_back_from_their_file(tmp_path: Path) -> None:
    args = options.parse_args(["--model", "resnet18", "--flops", "0.4", "--scale", "0.5", "1", "--model-kwargs", "a=2"])
    options.write_args(args, tmp_path / "args.yaml")
    assert vars(options.parse_args(["--config", str(tmp_path / "args.yaml")])) == vars(args)


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    options.write_args(options.parse_args(["--lr", "0.5"]), tmp_path / "args.yaml")
    assert options.parse_args(["--config", str(tmp_path / "args.yaml"), "--lr", "0.25"]).lr == 0.25


def test_half_the_flops_is_the_budget_where_none_is_named() -> None:
    assert options.parse_args([]).flops == 0.5
    assert options.parse_args(["--params", "0.5"]).flops is None


# ------------------------------------------------------------------------------------------------ data


def test_split_off_divides_without_overlap() -> None:
    kept, held = split_off(101, 0.2, seed=3)
    assert len(held) == 20
    assert sorted(kept + held) == list(range(101))
    assert split_off(101, 0.2, seed=3) == (kept, held)
    assert split_off(101, 0.2, seed=4) != (kept, held)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 1.0])
def test_split_off_refuses_an_empty_side(fraction: float) -> None:
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_off(50, fraction, seed=0)


def test_the_three_parts_of_the_digits_share_no_image() -> None:
    _, parts = loaders("--no-aug", "--batch-size", "1", "-vb", "64", "--val-fraction", "0.1")
    images = [torch.cat([batch for batch, _ in part]).flatten(1) for part in parts]
    assert [len(part) for part in images] == [1293, 144, 360]
    source = load_digits().data * (255 / 16)
    unique = {tuple(row) for row in source.round().astype(int)}
    found = [{tuple(row) for row in part.mul(255).round().int().tolist()} for part in images]
    assert len(unique) == len(source), "the data set itself repeats no image, so sets of pixels tell images apart"
    assert set.union(*found) == unique
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]


def test_only_training_images_are_augmented() -> None:
    _, (train, validation, test) = loaders("--batch-size", "32")
    for part in (validation, test):
        torch.testing.assert_close(next(iter(part))[0], next(iter(part))[0], rtol=0, atol=0)
    raw = {tuple(row) for row in (load_digits().data * (255 / 16)).round().astype(int)}
    shown = {tuple(row) for row in next(iter(train))[0].flatten(1).mul(255).round().int().tolist()}
    assert not shown <= raw


@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_of_idx_files_is_read(tmp_path: Path, packed: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    for prefix, part in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        count = len(labels[part]).to_bytes(4, "big")
        side = (8).to_bytes(4, "big")
        files = {"images-idx3": b"\0\0\x08\x03" + count + side + side + pixels[part].tobytes(),
                 "labels-idx1": b"\0\0\x08\x01" + count + labels[part].tobytes()}  # fmt: skip
        for kind, content in files.items():
            name = f"{prefix}-{kind}-ubyte" + (".gz" if packed else "")
            (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    _, (train, _, test) = loaders("--dataset", "fashion-mnist", "--data-dir", str(tmp_path), "--batch-size", "4")
    assert len(train.dataset) == 27
    images, targets = next(iter(test))
    np.testing.assert_array_equal(images.squeeze(1).mul(255).round().numpy().astype(np.uint8), pixels[30:34])
    assert targets.tolist() == labels[30:34].tolist()


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data-dir names the folder"):
        loaders("--dataset", "fashion-mnist", "--data-dir", str(tmp_path))


# ------------------------------------------------------------------------------------------------ records


def test_summary_has_the_columns_of_timm_first(tmp_path: Path) -> None:
    log = progress.RunLog(tmp_path)
    log.epoch(phase="dense", train_loss=2.0, eval_loss=1.0, eval_top1=50.0, eval_top5=90.0, lr=0.1)
    log.epoch(phase="search", train_loss=1.5, tau=1.0, expected_flops=3e6, target_flops=2e6)
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert rows[0]["expected_flops"] == ""
    assert float(rows[1]["expected_flops"]) == 3e6


def test_only_the_first_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = progress.RunLog(tmp_path, primary=False)
    log.epoch(phase="dense", train_loss=2.0)
    assert list(log.batches([1, 2], 2, "title", {})) == [1, 2]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1_820_000_000, "1.82G"), (37_200_000, "37.2M")])
def test_counts_are_shown_compactly(number: float, text: str) -> None:
    assert progress.compact(number) == text


def test_pictures_are_drawn(tmp_path: Path) -> None:
    plots.plot_kept(["a", "b"], [8, 16], [4, 16], tmp_path / "kept.png")
    log = progress.RunLog(tmp_path)
    log.epoch(phase="dense", train_loss=2.0, train_top1=10.0, eval_loss=1.0, eval_top1=50.0)
    log.epoch(phase="search", train_loss=1.0, train_top1=20.0, expected_flops=3e6, target_flops=2e6, tau=1.0)
    plots.plot_curves(log.rows, tmp_path / "curves.png")
    for name in ("kept.png", "curves.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_latency_tells_a_large_model_from_a_small_one() -> None:
    models = {"large": nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), "small": nn.Linear(512, 512)}
    found = report.latencies(models, torch.randn(64, 512), seconds=0.1)
    assert list(found) == ["large", "small"]
    assert found["large"] > 2 * found["small"]


# ------------------------------------------------------------------------------------------------ the whole way


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    output = tmp_path_factory.mktemp("runs")
    return prune.main([*TINY, "--dense-epochs", "1", "--search-epochs", "3", "--epochs", "1", "--flops", "0.5",
                       "--params", "0.6", "--kd-model-name", "dense", "--output", str(output), "--experiment", "tiny",
                       "--seed", "1"])  # fmt: skip


def test_run_leaves_its_files(run: tuple[Path, nn.Module]) -> None:
    folder, _ = run
    expected = {"slim.safetensors", "dense.safetensors", "plan.json", "summary.csv", "args.yaml", "report.json",
                "kept.png", "curves.png"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == expected


def test_run_meets_its_budgets(run: tuple[Path, nn.Module]) -> None:
    folder, slim = run
    dense = timm.create_model("resnet10t", num_classes=10, in_chans=1, stem_width=8, channels=(8, 16, 16, 32))
    image = torch.zeros(1, 1, 32, 32)
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in (("dense", dense), ("slim", slim))}
    measured = json.loads((folder / "report.json").read_text())
    assert measured["dense"]["flops"] == prunegate.count_flops(dense, image)
    assert measured["slim"]["flops"] == prunegate.count_flops(slim, image) <= 0.5 * measured["dense"]["flops"]
    assert measured["slim"]["params"] == count["slim"] <= 0.6 * count["dense"]
    assert measured["dense"]["params"] == count["dense"]
    assert measured["slim"]["file_bytes"] == (folder / "slim.safetensors").stat().st_size
    assert type(slim) is type(dense)


def test_run_saves_what_it_returns(run: tuple[Path, nn.Module]) -> None:
    folder, slim = run
    loaded = prunegate.load(folder / "slim.safetensors").eval()
    images = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), slim.eval()(images), rtol=0, atol=0)


def test_plan_turns_the_dense_model_into_the_slim_one(run: tuple[Path, nn.Module]) -> None:
    folder, slim = run
    dense = timm.create_model("resnet10t", num_classes=10, in_chans=1, stem_width=8, channels=(8, 16, 16, 32))
    dense.load_state_dict(load_file(folder / "dense.safetensors"))
    cut = prunegate.apply_plan(dense, prunegate.Plan.from_json((folder / "plan.json").read_text()))
    assert {k: v.shape for k, v in cut.state_dict().items()} == {k: v.shape for k, v in slim.state_dict().items()}


def test_summary_follows_the_search_to_its_target(run: tuple[Path, nn.Module]) -> None:
    folder, _ = run
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["dense", *["search"] * 3, "finetune"]
    targets = [float(row["target_flops"]) for row in rows if row["phase"] == "search"]
    dense = json.loads((folder / "report.json").read_text())["dense"]["flops"]
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == pytest.approx(0.5 * dense, rel=1e-3)


def test_one_cycle_and_one_optimizer_span_search_and_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, rates = [], []
    create = prune.create_optimizer_v2

    def noted(*args: object, **options: object) -> torch.optim.Optimizer:
        made.append(create(*args, **options))
        made[-1].register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return made[-1]

    monkeypatch.setattr(prune, "create_optimizer_v2", noted)
    monkeypatch.setattr("report.latencies", lambda models, inputs: dict.fromkeys(models, 1.0))
    prune.main([*TINY, "--search-epochs", "1", "--epochs", "2", "--opt", "adamw", "--lr", "0.01", "--output",
                str(tmp_path), "--kd-model-name", "dense", "--kd-distill-type", "feature"])  # fmt: skip
    _, tuned = made
    steps = len(rates)
    assert steps == 3 * 8
    oracle = [0.005 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert rates == pytest.approx(oracle, abs=1e-9)
    # A distillation's projection is as wide as the network that it serves, so it is made again.
    counts = {int(state["step"]) for state in tuned.state.values()}
    assert counts == {steps, steps * 2 // 3}


def test_refit_repairs_the_cut_before_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("report.latencies", lambda models, inputs: dict.fromkeys(models, 1.0))
    images = torch.from_numpy(load_digits().images).float()[:500, None] / 8 - 1
    images = nn.functional.interpolate(images, 32)
    errors = []
    for flags in ([], ["--refit", "200"]):
        folder, slim = prune.main([*TINY, "--dense-epochs", "2", "--search-epochs", "2", "--epochs", "0", "--flops",
                                   "0.3", *flags, "--output", str(tmp_path)])  # fmt: skip
        dense = timm.create_model("resnet10t", stem_width=8, channels=(8, 16, 16, 32), in_chans=1, num_classes=10)
        dense.load_state_dict(load_file(folder / "dense.safetensors"))
        with torch.no_grad():
            wanted, found = dense.eval()(images), slim(images)
        errors.append(float((found - wanted).square().mean() / wanted.var()))
    assert errors[1] < 0.8 * errors[0]


def test_second_process_repeats_the_outputs(run: tuple[Path, nn.Module], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, slim = run
    images = torch.randn(4, 1, 32, 32)
    with torch.inference_mode():
        outputs = slim.eval()(images)
    save_file({"images": images, "outputs": outputs}, tmp_path / "right.safetensors")
    save_file({"images": images, "outputs": outputs + 1e-6}, tmp_path / "wrong.safetensors")

    def reopen(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "recipes/reopen.py", folder / "slim.safetensors", tmp_path / name]
        return subprocess.run(command, capture_output=True, text=True, env=_one_thread())

    right = reopen("right.safetensors")
    assert "equal bit for bit" in right.stdout, right.stderr
    wrong = reopen("wrong.safetensors")
    assert wrong.returncode != 0
    assert "outputs differ" in wrong.stderr


def _one_thread() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--mixup 0.2 --cutmix 0.5 --grad-accum-steps 3",
        "--model-ema --model-ema-decay 0.9 --opt adamw --lr 1e-3 --weight-decay 0.05",
        "--amp --amp-dtype bfloat16 --channels-last --clip-grad 1.0",
        "--kd-model-name dense --kd-distill-type feature --task-loss-weight 0.5",
        "--params 0.4 --round-to 4 --refit 64",
        "--val-split train --grad-checkpointing",
    ],
)
def test_flags_of_timm_work_together_with_pruning(flags: str, tmp_path: Path) -> None:
    folder, slim = prune.main([*TINY, "--dense-epochs", "1", "--search-epochs", "2", "--epochs", "1", *flags.split(),
                               "--output", str(tmp_path)])  # fmt: skip
    measured = json.loads((folder / "report.json").read_text())
    assert measured["slim"]["flops"] < measured["dense"]["flops"]
    assert torch.isfinite(slim(torch.randn(2, 1, 32, 32))).all()


@pytest.mark.slow
def test_two_processes_agree_and_one_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "recipes/prune.py", *TINY, "--search-epochs", "2", "--epochs", "1", "--output", tmp_path,
               "--experiment", "two"]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=_one_thread())
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "two" / "report.json").read_text())
    assert measured["slim"]["flops"] <= 0.5 * measured["dense"]["flops"]
    assert done.stdout.count("search   epoch") == 2


@pytest.mark.slow
def test_two_processes_refit_to_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "refits.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        "import prune\n"
        "_, slim = prune.main(sys.argv[2:])\n"
        "torch.save(slim.state_dict(), f'{sys.argv[1]}/' + __import__('os').environ['RANK'])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path,
               *TINY, "--search-epochs", "2", "--epochs", "0", "--refit", "64", "--output", tmp_path]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=_one_thread())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refitted layers: " in done.stdout
    first, second = (torch.load(tmp_path / rank) for rank in "01")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_negative_number_of_images_to_refit_on_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parse_args(["--refit", "-5"])
    assert "--refit -5: expected a number of images" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ tools


def test_inspect_adds_up(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools/inspect.py", "resnet18", "--json", "--input-size", "3", "64", "64"]
    done = subprocess.run(command, capture_output=True, text=True, env=_one_thread())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = timm.create_model("resnet18")
    assert found["flops"] == prunegate.count_flops(model, torch.zeros(1, 3, 64, 64))
    assert found["flops"] == sum(part["flops"] for part in found["parts"])
    assert found["params"] == sum(part["params"] for part in found["parts"])
    assert found["params"] == sum(parameter.numel() for parameter in model.parameters())
    # Four streams, and the hidden width of each of the eight blocks.
    assert found["gates"] == sum(group["units"] for group in found["groups"]) == 64 + 128 + 256 + 512 + 2 * 960
    hidden = next(group for group in found["groups"] if group["name"] == "layer1.0.conv1")
    assert hidden["flops_of_one"] == 2 * 64 * 9 * 16 * 16 + 2 * 16 * 16
    assert hidden["params_of_one"] == 2 * 64 * 9 + 2
    assert {(item["tensor"], item["dim"]) for item in found["frozen"]} >= {("conv1.weight", 1), ("fc.weight", 0)}


def test_inspect_prints_tables_and_leaves_the_standard_module_alone() -> None:
    command = [sys.executable, ROOT / "tools/inspect.py", "resnet10t"]
    done = subprocess.run(command, capture_output=True, text=True, env={**_one_thread(), "COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    for title in ("What can be pruned", "What cannot be pruned, and why", "What each part costs"):
        assert title in done.stdout


def test_other_tools_get_the_standard_inspect_module() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import inspect; print(inspect.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == Path(json.__file__).parents[1]
