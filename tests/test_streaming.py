"""Models that are never allocated: labelled, planned and cut on the meta device, their weights cut file by file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prunegate
from prunegate import CheckpointError, streaming
from tests.models import random_mask


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext2", "swin_tiny_patch4_window7_224"])
def test_without_values_everything_is_as_with_them(name: str) -> None:
    bare = prunegate.attach(on_meta(name))
    full = prunegate.attach(timm.create_model(name).eval())
    assert [(g.name, g.kind, g.size) for g in bare.groups] == [(g.name, g.kind, g.size) for g in full.groups]
    bare.mask = full.mask = mask = random_mask(full, 0)
    assert bare.cost.flops(mask) == full.cost.flops(mask)
    assert bare.cost.params(mask) == full.cost.params(mask)
    assert bare.plan() == full.plan()
    slim = bare.export()
    assert all(tensor.is_meta for tensor in (*bare.model.parameters(), *slim.parameters()))
    assert [tuple(p.shape) for p in slim.parameters()] == [tuple(p.shape) for p in full.export().parameters()]


def sharded(model: nn.Module, folder: Path, parts: int) -> None:
    """Weights as transformers and timm write them when there are many."""
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names, where = list(state), {}
    for part in range(parts):
        own = names[part::parts]
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file({name: state[name] for name in own}, folder / file)
        where |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def planned(name: str) -> tuple[nn.Module, prunegate.Plan, nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    gated = prunegate.attach(model).eval()
    gated.mask = random_mask(gated, 0)
    return model, gated.plan(), gated.export()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_weights_cut_in_files_are_those_of_the_cut_model(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    model, plan, slim = planned(name)
    sharded(model, tmp_path / "dense", 3)
    monkeypatch.setattr(streaming, "_PIECE", 4096)  # so that tensors come in several pieces
    bare = on_meta(name, num_classes=5)
    shards = prunegate.cut_files(bare, plan, tmp_path / "dense", tmp_path / "slim", shard_size=100_000)
    assert len(shards) > 1
    state = {key: value for shard in shards for key, value in load_file(shard).items()}
    wanted = slim.state_dict()
    assert state.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(state[key], value), key
    index = json.loads((tmp_path / "slim" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(wanted)
    again = prunegate.apply_plan(bare, prunegate.Plan.from_json((tmp_path / "slim" / "plan.json").read_text()))
    again.load_state_dict(state, assign=True)
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(again(x), slim(x))


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x).tanh())

    model, x = Tied(), torch.arange(9)
    gated = prunegate.attach(model, x).eval()
    gated.mask = random_mask(gated, 0)
    save_file({"table.weight": model.table.weight.detach()}, tmp_path / "dense.safetensors")
    (shard,) = prunegate.cut_files(model, gated.plan(), tmp_path / "dense.safetensors", tmp_path / "slim")
    state = load_file(shard)
    assert list(state) == ["table.weight"]
    assert torch.equal(state["table.weight"], gated.export().head.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, plan, _ = planned("test_vit")
    sharded(model, tmp_path / "dense", 2)
    bare, index = on_meta("test_vit", num_classes=5), tmp_path / "dense" / "model.safetensors.index.json"
    intact = index.read_text()

    def refused(match: str, **changes: Any) -> None:
        given = {"sources": tmp_path / "dense", "destination": tmp_path / "slim", "shard_size": 2**20} | changes
        with pytest.raises(CheckpointError, match=match):
            prunegate.cut_files(bare, plan, **given)
        assert not list(tmp_path.glob("slim/*"))

    refused("holds the dense weights", destination=tmp_path / "dense")
    refused("shard_size=0", shard_size=0)
    refused("has no", sources=tmp_path)
    for text, match in (
        ("[" * 5000, "is no index"),
        ("{}", "is no index"),
        (json.dumps({"weight_map": {"a": "../../etc/passwd"}}), "not a file beside it"),
        (json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}), "are not those of this"),
    ):
        index.write_text(text)
        refused(match)
    places = json.loads(intact)["weight_map"]
    places["head.bias"] = next(file for file in places.values() if file != places["head.bias"])
    index.write_text(json.dumps({"weight_map": places}))
    refused("the index says")
    index.write_text(intact)
    broken = tmp_path / "dense" / "model-00001-of-00002.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    refused("cannot be cut")


PROGRAM = '''
import json, sys, threading, time, torch, timm, prunegate
from pathlib import Path
from safetensors.torch import save_file
torch.set_num_threads(1)
folder, layers, shard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
with torch.device("meta"):
    model = timm.create_model("vit_giant_patch14_dinov2", img_size=224, depth=layers).to(torch.bfloat16).eval()
size = sum(p.numel() for p in model.parameters())
state = model.state_dict()
names, where = list(state), {}
for at in range(0, len(names), 40):
    file = f"model-{at:05d}.safetensors"
    (folder / "dense").mkdir(exist_ok=True)
    save_file({n: torch.full(state[n].shape, 0.5, dtype=state[n].dtype) for n in names[at : at + 40]},
              folder / "dense" / file)
    where |= dict.fromkeys(names[at : at + 40], file)
(folder / "dense" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
timm.create_model("test_vit"); prunegate.attach(timm.create_model("test_vit").eval())
before = most = anonymous()
done = False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
start = time.process_time()
gated = prunegate.attach(model)
mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
for group in gated.groups:
    mask[group.slice.start + 1 : group.slice.stop : 2] = False
gated.mask = mask
plan = gated.plan()
slim = prunegate.apply_plan(model, plan)
planned, labelled = most - before, time.process_time() - start
prunegate.cut_files(model, plan, folder / "dense", folder / "slim", shard_size=shard)
done = True; thread.join()
left = sum(p.numel() for p in slim.parameters())
assert left == gated.cost.params(mask)
assert all(p.is_meta for p in slim.parameters())
print(json.dumps({"parameters": size, "left": left, "planned": planned, "most": most - before, "seconds": labelled,
                  "all": time.process_time() - start}))
'''


@pytest.mark.parametrize(
    ("layers", "shard", "bound"), [(4, 2**24, 400), pytest.param(38, 2**26, 1000, marks=pytest.mark.slow)]
)
def test_a_model_is_cut_in_less_memory_than_it_has(tmp_path: Path, layers: int, shard: int, bound: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), str(layers), str(shard)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["most"] < bound
    written = sum(file.stat().st_size for file in (tmp_path / "slim").glob("*.safetensors"))
    assert abs(written - 2 * found["left"]) < 2**20
