"""A sweep over budgets and seeds: one file of results, runs that are done are skipped, a failing one stops nobody."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sweep

RECIPE = '''
import json, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(given.get("--resume") or pathlib.Path(given["--output"], given["--experiment"]))
folder.mkdir(exist_ok=True)
calls = folder.parent / "calls.txt"
calls.write_text((calls.read_text() if calls.exists() else "") + " ".join(sys.argv[1:]) + "\\n")
if given.get("--seed") == "1" and not (folder.parent / "repaired").exists():
    sys.exit("the loss became NaN")
state = folder / "state"
if state.exists():
    [path.unlink() for path in state.iterdir()]
    state.rmdir()
one = lambda top1, flops: {"top1": top1, "flops": flops, "params": flops}
(folder / "report.json").write_text(json.dumps({"dense": one(90.0, 100), "slim": one(89.0, 50)}))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    monkeypatch.setattr(sweep, "_RECIPE", recipe)
    return tmp_path / "sweep"


def run(folder: Path) -> list[dict[str, str]]:
    sweep.main(["--engine", "serial", "--flops", "0.3", "0.5", "--seeds", "0", "1", "--output", str(folder), "--",
                "--model", "resnet18"])  # fmt: skip
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().splitlines()


def test_a_failing_run_is_recorded_and_the_others_go_on(folder: Path) -> None:
    rows = run(folder)
    assert [row["status"] for row in rows] == ["done", "failed"] * 2
    assert rows[1]["error"] == "exit status 1: the loss became NaN"
    assert float(rows[0]["flops_share"]) == 0.5
    assert calls(folder)[0].startswith("--model resnet18 --flops 0.3 --seed 0")


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(folder: Path) -> None:
    run(folder)
    (folder / "repaired").touch()
    assert [row["status"] for row in run(folder)] == ["done"] * 4
    assert len(calls(folder)) == 6
    run(folder)
    assert len(calls(folder)) == 6


def test_a_run_that_was_begun_goes_on(folder: Path) -> None:
    own = folder / "flops0.3-seed0"
    (own / "state").mkdir(parents=True)
    (own / "args.yaml").write_text("")
    (own / "state" / "a.safetensors").write_text("")
    (own / "report.json").write_text(json.dumps({}))
    run(folder)
    assert calls(folder)[0] == f"--resume {own}"


@pytest.mark.skipif("ray" in sys.modules, reason="Ray is here")
def test_ray_is_asked_for_by_name_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs Ray"):
        sweep.main(["--engine", "ray", "--output", str(folder)])


@pytest.mark.slow
def test_ray_gives_the_same_results(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an optional extra")
    serial = run(folder)
    for name in ("sweep.py", "state.py"):
        (tmp_path / name).write_text(Path(sweep.__file__).with_name(name).read_text())
    (tmp_path / "prune.py").write_text(RECIPE)
    command = [sys.executable, str(tmp_path / "sweep.py"), "--engine", "ray", "--flops", "0.3", "0.5", "--seeds", "0",
               "1", "--output", str(tmp_path / "ray"), "--", "--model", "resnet18"]  # fmt: skip
    environment = {**os.environ, "RAY_DISABLE_DASHBOARD": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=600)
    with (tmp_path / "ray" / "results.csv").open() as file:
        assert list(csv.DictReader(file)) == serial
