"""Runs that die, or have a bad day: what is left on disk, and that going on ends where an undisturbed run ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import options
import prune
import pytest
import state
import torch
from torch import nn

import prunegate
from prunegate import CheckpointError, files

FLAGS = ["--dataset", "digits", "--in-chans", "1", "--img-size", "16", "--mean", "0.5", "--std", "0.5", "--workers",
         "0", "--crop-pct", "1", "--model", "resnet10t", "--model-kwargs", "stem_width=8", "channels=(8,16,16,32)",
         "--device", "cpu", "--batch-size", "256", "--val-fraction", "0.2", "--seed", "3", "--dense-epochs", "1",
         "--search-epochs", "3", "--epochs", "1", "--opt", "adamw", "--lr", "1e-3", "--model-ema",
         "--model-ema-decay", "0.8", "--mixup", "0.2", "--drop", "0.1", "--recovery-interval", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("report.latencies", lambda models, inputs: dict.fromkeys(models, 1.0))


def flags(folder: Path, *more: str) -> list[str]:
    return [*FLAGS, "--output", str(folder.parent), "--experiment", folder.name, *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("report.latencies", lambda models, inputs: dict.fromkeys(models, 1.0))
        return prune.main(flags(tmp_path_factory.mktemp("runs") / "whole"))[0]


# ------------------------------------------------------------------------------------------------ killed


def _die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_an_epoch() -> None:
    check, seen = prune.check_labels, []

    def checked(*args: Any) -> None:
        seen.append(1)
        if len(seen) == 4 + 4 + 4:  # dense, the first epoch of the search, most of the second
            _die()
        check(*args)

    prune.check_labels = checked


def while_a_state_is_written() -> None:
    write, seen = files.save_file, []

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        write(tensors, path, metadata)
        seen.append(1)
        if len(seen) == 7:
            os.truncate(path, os.path.getsize(path) // 2)
            _die()

    files.save_file = half


def during_export() -> None:
    prunegate.GatedModel.export = _die


def _run(folder: Path, disturb: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    disturb()
    prune.main(flags(folder))


@pytest.mark.parametrize("disturb", [in_the_middle_of_an_epoch, while_a_state_is_written, during_export])
def test_a_killed_run_ends_as_if_nothing_had_happened(undisturbed: Path, tmp_path: Path, disturb: Any) -> None:
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, disturb))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((folder / "state").glob("*.safetensors"))
    assert not (folder / "slim.safetensors").exists()
    prune.main(["--resume", str(folder)])
    for name in ("summary.csv", "plan.json", "dense.safetensors", "slim.safetensors", "report.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not (folder / "state").exists()


# A process of a group, with latencies that are no part of what must be equal; argv[1] says how it dies, if it does.
RANK = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import prune, report
report.latencies = lambda models, inputs: dict.fromkeys(models, 1.0)
if sys.argv[1] != "lives":
    check, seen = prune.check_labels, []
    def checked(*given):
        seen.append(1)
        if len(seen) == 7 and os.environ["RANK"] == "1":
            if sys.argv[1] == "fails":
                raise RuntimeError("the disk of rank 1 is gone")
            os.kill(os.getpid(), signal.SIGKILL)
        check(*given)
    prune.check_labels = checked
prune.record(prune.main)(sys.argv[3:])
"""


def torchrun(script: Path, how: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), how, str(Path(prune.__file__).parent), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_two_ranks_go_on_where_one_was_killed(tmp_path: Path) -> None:
    script, whole, killed = tmp_path / "rank.py", tmp_path / "whole", tmp_path / "killed"
    done = torchrun(script, "lives", *flags(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    assert torchrun(script, "dies", *flags(killed)).returncode != 0
    assert list((killed / "state").glob("*.safetensors"))
    again = torchrun(script, "lives", "--resume", str(killed))
    assert again.returncode == 0, again.stderr[-3000:]
    for name in ("summary.csv", "plan.json", "dense.safetensors", "slim.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_rank_that_fails_stops_the_run_with_its_error(tmp_path: Path) -> None:
    failed = torchrun(tmp_path / "rank.py", "fails", *flags(tmp_path / "failed"))
    assert failed.returncode != 0
    assert "the disk of rank 1 is gone" in failed.stderr


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parse_args(["--resume", str(tmp_path)])
    assert "name the folder of a run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ bad days


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder, check, seen = tmp_path / "stopped", prune.check_labels, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def checked(*args: Any) -> None:
        seen.append(1)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        check(*args)

    monkeypatch.setattr(prune, "check_labels", checked)
    with pytest.raises(SystemExit, match=r"stopped on request after update 2.*--resume"):
        prune.main(flags(folder))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(prune, "check_labels", check)
    prune.main(["--resume", str(folder)])
    assert (folder / "slim.safetensors").read_bytes() == (undisturbed / "slim.safetensors").read_bytes()


def test_a_full_disk_costs_no_state_and_stops_no_training(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, write, seen = tmp_path / "full", files.save_file, []

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        seen.append(1)
        if 3 <= len(seen) <= 5:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", full)
    prune.main(flags(folder))
    assert capsys.readouterr().out.count("No space left on device") == 3
    assert (folder / "slim.safetensors").read_bytes() == (undisturbed / "slim.safetensors").read_bytes()


def test_the_last_good_state_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = state.Keeper(tmp_path, keep=1)
    assert keeper.save({"model": {"a": torch.ones(3)}}, "1") is None
    monkeypatch.setattr(files, "save_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert "full" in (keeper.save({"model": {"a": torch.zeros(3)}}, "2") or "")
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]
    assert keeper.latest()["model"]["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    check, seen = prune.check_labels, []

    def poisoned(labels: torch.Tensor, args: Any) -> None:
        seen.append(1)
        if len(seen) == 6:
            with torch.no_grad():
                models[0].get_classifier().bias[0] = value
        check(labels, args)

    models: list[nn.Module] = []
    create = prune.create_model
    monkeypatch.setattr(prune, "create_model", lambda *a, **k: models.append(create(*a, **k)) or models[0])
    monkeypatch.setattr(prune, "check_labels", poisoned)
    with pytest.raises(SystemExit, match=r"the loss and the logits became NaN.*2 of phase search.*state/1-00000"):
        prune.main(flags(tmp_path / "nan", "--recovery-interval", "0"))
    saved = state.Keeper(tmp_path / "nan" / "state").latest()
    assert all(bool(tensor.isfinite().all()) for tensor in saved["model"].values())


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    keeper = state.Keeper(tmp_path)
    with pytest.raises(CheckpointError, match="not finite: b"):
        keeper.save({"model": {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}}, "1")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_at_once() -> None:
    with pytest.raises(SystemExit, match="/proc/nothing/here cannot be written"):
        prune.main(flags(Path("/proc/nothing/here")))


def test_an_empty_part_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="lower --batch-size"):
        prune.main(flags(tmp_path / "a", "--batch-size", "5000"))


def test_classes_must_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="has 10 classes, the model 4"):
        prune.main(flags(tmp_path / "a", "--num-classes", "4"))
    monkeypatch.setattr(prune, "CLASSES", {})
    with pytest.raises(SystemExit, match="a label is 9"):
        prune.main(flags(tmp_path / "b", "--num-classes", "9"))


# ------------------------------------------------------------------------------------------------ the file


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    given = {
        "a": [1, 2.5, None, True, "x", (1, (2,))], 7: {"b": torch.arange(4, dtype=torch.bfloat16)},
        "nan": float("nan"), "inf": -float("inf"), "shared": [torch.ones(2)] * 2, "empty": torch.zeros(0, 3),
    }  # fmt: skip
    state.write_state(given, tmp_path / "s.safetensors")
    found = state.read_state(tmp_path / "s.safetensors")
    assert found["a"] == given["a"]
    assert torch.equal(found[7]["b"], given[7]["b"])
    assert found["nan"] != found["nan"]
    assert found["inf"] == given["inf"]
    assert found["empty"].shape == (0, 3)
    with (tmp_path / "s.safetensors").open("r+b") as file:  # what was read does not depend on the file any more
        file.write(bytes((tmp_path / "s.safetensors").stat().st_size))
    assert torch.equal(found[7]["b"], given[7]["b"])
    with pytest.raises(TypeError, match="cannot be part"):
        state.write_state({"a": object()}, tmp_path / "t.safetensors")


def test_old_states_make_room_and_broken_ones_are_passed_over(tmp_path: Path) -> None:
    keeper = state.Keeper(tmp_path, keep=2)
    for number in range(4):
        keeper.save({"model": {}, "number": number}, str(number))
    assert [path.stem for path in keeper.files()] == ["2", "3"]
    (tmp_path / "3.safetensors").write_bytes(b"broken")
    assert keeper.latest()["number"] == 2
    (tmp_path / "2.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no state in"):
        keeper.latest()
