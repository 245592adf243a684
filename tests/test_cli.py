"""The command line: what it prints, writes and returns, in this process and in fresh ones."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import prunegate
from prunegate.cli.deployment import deploy, open_onnx
from prunegate.cli.main import main
from tests import models

ROOT = Path(__file__).parents[1]
SIZE = ["--input-size", "3", "64", "64"]
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)


@pytest.fixture(scope="module")
def slim_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "slim.safetensors"
    assert main(["prune", "test_resnet", "--flops", "0.5", "--score", "random", "--out", str(path)]) == 0
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(6):
        Image.effect_noise((80, 70), 90).convert("RGB").save(tmp_path / f"{i}.png")
    return tmp_path


def output(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_inspect_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "test_resnet", "--json"]) == 0
    found = output(capsys)
    model = models.timm.create_model("test_resnet").eval()
    assert found["flops"] == sum(part["flops"] for part in found["parts"])
    assert found["flops"] == prunegate.count_flops(model, torch.zeros(1, *model.pretrained_cfg["input_size"]))
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert main(["inspect", "test_resnet"]) == 0
    assert "What can be pruned" in capsys.readouterr().out


def test_prune_repairs_and_writes_file_and_folder(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "s.safetensors", tmp_path / "hub"
    command = ["prune", "test_resnet", "--params", "0.6", "--data", str(pictures), "--refit", "--score", "taylor",
               "--round-to", "auto"]  # fmt: skip
    assert main([*command, "--out", str(file), "--hub", str(folder), "--json"]) == 0
    found = output(capsys)
    assert found["slim"]["params"] <= 0.6 * found["dense"]["params"]
    assert found["refitted_layers"] > 3
    widths = [m.out_channels for m in prunegate.load(file).modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(prunegate.load(file)(x), prunegate.load(folder)(x))


def test_bench_compares_with_the_dense_model(slim_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(slim_file), "--batch", "1", "2", "--seconds", "0", "--json"]) == 0
    found = output(capsys)
    assert found["slim"]["flops"] <= found["dense"]["flops"] / 2
    assert set(found["dense"]["milliseconds"]) == {"1", "2"}
    assert all(value > 0 for value in found["slim"]["milliseconds"].values())


@needs_onnx
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_what_is_exported_computes_the_same(name: str, tmp_path: Path) -> None:
    model = models.build(name).float()  # as timm initialises some, their outputs are all zero
    slim = prunegate.one_shot(model, score="random", flops=0.6)
    records = deploy(slim, torch.randn(1, 3, 160, 160), tmp_path, ["onnx", "pt2"])
    assert [record["target"] for record in records] == ["torch", "onnx", "pt2"]
    assert all(record["error"] <= 1e-4 for record in records)
    assert all(Path(record["file"]).stat().st_size > 1000 for record in records[1:])


@needs_onnx
def test_export_command_checks_and_times(
    slim_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(slim_file), "--to", "onnx", "int8", "--check", "--bench", "--data", str(pictures)]
    assert main([*command, "--out", str(tmp_path), "--json"]) == 0
    torch_itself, plain, eight_bits = output(capsys)["targets"]
    assert plain["error"] <= 1e-4
    assert 0 < eight_bits["bytes"] < plain["bytes"]
    assert eight_bits["same"] in [i / 6 for i in range(7)]
    for record in (torch_itself, plain, eight_bits):
        assert record["milliseconds"] > 0
        assert record["dense_milliseconds"] > 0
    assert {path.name for path in tmp_path.glob("*.onnx")} == {"slim.onnx", "slim.int8.onnx"}


@needs_onnx
def test_eight_bits_are_compared_on_the_images(tmp_path: Path) -> None:
    """A classifier of two means: 6 images are told apart by far, one by less than a step of eight bits."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4]))
    images = torch.zeros(7, 2, 2, 2)
    for i in range(6):
        images[i, i % 2] = 10.0
    images[6, 1], images[6, 0] = 5.0, 5.0 + 1e-4
    (_, eight) = deploy(net, images[:1], tmp_path, ["int8"], calibration=images)
    found = open_onnx(Path(eight["file"]))(images).argmax(1)
    assert eight["same"] == pytest.approx(float((found == net(images).argmax(1)).float().mean()))
    assert found[:6].tolist() == [0, 1] * 3
    assert eight["same"] >= 6 / 7 - 1e-6


@needs_onnx
def test_what_is_timed_beside_is_the_dense_model(tmp_path: Path) -> None:
    """A model 40 times as wide takes longer in every form."""

    def layers(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 64)).eval()

    records = deploy(layers(100), torch.randn(64, 64), tmp_path, ["onnx"], bench=True, dense=layers(4000))
    assert all(record["dense_milliseconds"] > record["milliseconds"] for record in records)


def test_torchscript_is_refused_as_long_as_torch_calls_it_deprecated(tmp_path: Path) -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="`torch.jit.script` is deprecated"):
        torch.jit.script(torch.nn.Linear(2, 2))
    with pytest.raises(prunegate.ExportError, match="torchscript was given; expected some of onnx, pt2"):
        deploy(torch.nn.Linear(3, 2), torch.randn(1, 3), tmp_path, ["torchscript"])


def test_a_wrong_export_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunegate.cli import deployment

    monkeypatch.setitem(deployment.TARGETS, "onnx", lambda model, *_: lambda batch: model(batch).detach() + 1e-2)
    with pytest.raises(prunegate.ExportError, match="onnx differs"):
        deploy(torch.nn.Linear(3, 2), torch.randn(1, 3), tmp_path, ["onnx"])


@needs_onnx
@pytest.mark.parametrize("far", [1.0, 500.0])
def test_eight_bits_are_not_spent_on_a_far_off_value(far: float, tmp_path: Path) -> None:
    """One value of 500 among 36,864 below 1 would leave nothing of the others; without it full ranges are exact."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(576, 4, bias=False)).eval()
    images = torch.rand(64, 1, 24, 24)
    images[5, 0, 3, 3] = far
    (_, eight) = deploy(net, images[:1], tmp_path, ["int8"], calibration=images)
    with torch.no_grad():
        found, wanted = (run(images[6:]) for run in (open_onnx(Path(eight["file"])), net))
    # The output itself has a far value, and too few others to leave it out: half a step of it is 0.05.
    assert float((found - wanted).abs().max()) < (0.02 if far == 1 else 0.08)


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", models.FAST + models.SLOW)
def test_all_networks_are_exported(name: str, tmp_path: Path) -> None:
    model = models.build(name).float()  # as timm initialises some, their outputs are all zero
    slim = prunegate.one_shot(model, flops=0.5)
    x = prunegate.gated.example_input_of(model)
    deploy(slim, x, tmp_path, ["onnx", "pt2", "compile", "int8"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["inspect", "resnet999"], 1, "neither a file nor a timm model"),
        (["prune", "test_resnet"], 1, "no budget was given"),
        (["prune", "test_resnet", "--flops", "0.5", "--refit"], 1, "need pictures"),
        (["prune", "test_resnet", "--flops", "0.001"], 1, "out of reach"),
        (["bench", "nothing.safetensors"], 1, "neither a file"),
        (["report", "nowhere"], 1, "has no slim.safetensors"),
        (["dance"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)
def test_failures_have_exit_codes_and_reasons(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if code == 2:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    else:
        assert main(arguments) == code
    assert words in capsys.readouterr().err


def test_failures_are_json_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "resnet999", "--json"]) == 1
    assert output(capsys)["kind"] == "PruneGateError"


@pytest.mark.parametrize("command", ["", "inspect", "prune", "export", "bench", "report"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert f"prunegate {command}".strip() in capsys.readouterr().out.split("examples:")[1]


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "prunegate", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("prunegate ")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert config["project"]["scripts"]["prunegate"] == "prunegate.cli.main:main"


USE = """
import torch, prunegate
from prunegate.cli.main import main
from prunegate.gumbel.backends import backends
print(prunegate.__file__)
print(backends()["cpu"])
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
gated = prunegate.attach(net, torch.zeros(1, 8))
gated.mask = torch.arange(16) % 3 > 0
print(gated.export()[0].out_features)
raise SystemExit(main(["inspect", "test_resnet"]))
"""


@pytest.mark.slow
def test_wheel_and_sdist_install_from_a_clean_folder(tmp_path: Path) -> None:
    """Built from what git tracks, installed without this repository, used from another folder."""
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]
    source = tmp_path / "source"
    for name in files:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pytest.importorskip("build", reason="the package `build` is not installed")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source], check=True)
    wheel, sdist = next((tmp_path / "dist").glob("*.whl")), next((tmp_path / "dist").glob("*.tar.gz"))
    package = {name for name in files if name.startswith("prunegate/") and (ROOT / name).exists()}
    with zipfile.ZipFile(wheel) as archive:
        assert package <= set(archive.namelist())
    with tarfile.open(sdist) as archive:
        found = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {*package, "pyproject.toml", "README.md", "LICENSE"} <= found
    for each in (wheel, sdist, source):
        place = tmp_path / f"target-{each.name}"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--target", place, each], check=True, cwd=tmp_path)
        done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(place)})  # fmt: skip
        assert done.returncode == 0, done.stderr
        where, backend, kept, *command = done.stdout.splitlines()
        assert where == str(place / "prunegate/__init__.py")
        assert backend.startswith("available") or shutil.which("cc") is None
        assert int(kept) < 16
        assert any("What can be pruned" in line for line in command)
