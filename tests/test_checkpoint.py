"""Files: what is saved comes back bit for bit, and nothing else gets in."""

import copy
import functools
import json
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import prunegate
from prunegate import CheckpointError
from prunegate.plan import Plan
from prunegate.slim.apply import plan_of
from tests.buildable import Lists, Net, Offset, endless
from tests.models import random_mask

ROOT = Path(__file__).parents[1]


def slim_vit(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5, **kwargs).eval()
    gated = prunegate.attach(model).eval()
    gated.mask = random_mask(gated, 0)
    return gated.export().eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return slim_vit()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160)


@pytest.fixture
def file(vit: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "slim.safetensors"
    prunegate.save(vit, path)
    return path


def test_file_is_as_readable_as_any_other(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("")
    assert file.stat().st_mode == other.stat().st_mode


def test_outputs_bit_for_bit(vit: nn.Module, file: Path, image: torch.Tensor) -> None:
    twin = prunegate.load(file)
    with torch.no_grad():
        assert torch.equal(twin(image), vit(image))
    assert plan_of(twin) == plan_of(vit)
    assert type(twin) is type(vit)
    assert twin.num_features == vit.num_features
    assert not twin.training
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in vit.named_parameters()
    }
    assert list(file.parent.iterdir()) == [file]


def test_weights_do_not_depend_on_the_file_afterwards(file: Path, vit: nn.Module) -> None:
    again = prunegate.load(file)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    for name, tensor in vit.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # As torch allocates: kernels may add in another order at other addresses, and are slower there.
    assert all(parameter.data_ptr() % 64 == 0 for parameter in again.parameters())


def test_process_that_knows_no_gates(file: Path, vit: nn.Module, image: torch.Tensor, tmp_path: Path) -> None:
    torch.save(image, tmp_path / "x.pt")
    code = (
        "import sys, torch, prunegate; model = prunegate.load(sys.argv[1]);"
        "y = model(torch.load(sys.argv[2])); torch.save(y.detach(), sys.argv[2]);"
        # A file is tried out for the shapes of its tensors; what skips computing there labels nothing.
        "shapes = {'prunegate.labels', 'prunegate.labels.shapes'};"
        "print([n for n in sys.modules if n.startswith(('prunegate.g', 'prunegate.labels')) and n not in shapes])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(tmp_path / "x.pt")], capture_output=True, text=True, check=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "x.pt"), vit(image))


def test_pruned_twice_saves_one_plan(vit: nn.Module, tmp_path: Path, image: torch.Tensor) -> None:
    gated = prunegate.attach(copy.deepcopy(vit)).eval()
    gated.mask = random_mask(gated, 1)
    twice = gated.export().eval()
    prunegate.save(twice, tmp_path / "twice.safetensors")
    twin = prunegate.load(tmp_path / "twice.safetensors")
    with torch.no_grad():
        assert torch.equal(twin(image), twice(image))
    assert plan_of(twin).dense["patch_embed.proj.weight"][0] == timm.create_model("test_vit").embed_dim


def test_edited_forwards_are_edited_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_beit" if timm.is_model("test_beit") else "shvit_s1", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    gated = prunegate.attach(model, x).eval()
    gated.mask = random_mask(gated, 0)
    slim = gated.export().eval()
    assert plan_of(slim).calls
    prunegate.save(slim, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(prunegate.load(tmp_path / "a.safetensors")(x), slim(x))


def test_dense_model_and_changed_head(tmp_path: Path, image: torch.Tensor) -> None:
    model = timm.create_model("test_vit", num_classes=5, drop_path_rate=0.1)
    model.reset_classifier(4)
    prunegate.save(model, tmp_path / "a.safetensors")
    twin = prunegate.load(tmp_path / "a.safetensors")
    assert twin.training
    assert isinstance(twin.blocks[-1].drop_path1, type(model.blocks[-1].drop_path1))
    with torch.no_grad():
        assert torch.equal(twin.eval()(image), model.eval()(image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_kept(vit: nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    model = copy.deepcopy(vit).to(dtype)
    prunegate.save(model, tmp_path / "a.safetensors")
    twin = prunegate.load(tmp_path / "a.safetensors")
    assert {p.dtype for p in twin.parameters()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_memory_format_is_kept(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet").to(memory_format=torch.channels_last).eval()
    prunegate.save(model, tmp_path / "a.safetensors")
    twin = prunegate.load(tmp_path / "a.safetensors")
    assert [p.stride() for p in twin.parameters()] == [p.stride() for p in model.parameters()]


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    model = Net(6, out=(2,)).eval()
    model.out.bias.requires_grad_(False)
    model.steps.add_(7)
    index = torch.tensor([0, 4, 2])
    expected = model(index)
    builder = functools.partial(Net, 6, out=(2,), act=nn.ReLU)
    prunegate.save(model, tmp_path / "a.safetensors", builder=builder)
    twin = prunegate.load(tmp_path / "a.safetensors", allow=("tests.buildable",))
    assert torch.equal(twin(index), expected)
    assert twin.head.weight is twin.table.weight
    assert int(twin.steps) == 7
    assert torch.equal(twin.shift, model.shift)
    assert "shift" not in twin.state_dict()
    assert not twin.out.bias.requires_grad
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert "kept" not in opened.keys()
        assert sum((name.endswith("weight") and "table" in name) or "head" in name for name in opened.keys()) == 1


def test_tables_that_a_forward_makes(tmp_path: Path) -> None:
    """A buffer outside the state dict that is of another size from the first forward on."""
    torch.manual_seed(0)
    model = timm.create_model("convit_tiny", num_classes=5).eval()
    gated = prunegate.attach(model).eval()
    gated.mask = random_mask(gated, 0)
    slim, image = gated.export().eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = slim(image)
    assert slim.blocks[0].attn.rel_indices.shape[1] == 196
    prunegate.save(slim, tmp_path / "slim.safetensors")
    assert torch.equal(prunegate.load(tmp_path / "slim.safetensors").eval()(image), before)


@pytest.mark.parametrize("cut", [False, True], ids=["dense", "cut"])
def test_tables_of_sizes_that_do_not_fit_are_refused(tmp_path: Path, cut: bool) -> None:
    """A cut model is tried on the example that it was attached with; of a dense one sizes are those of its builder."""
    path, model = tmp_path / "a.safetensors", Offset()
    if cut:
        gated = prunegate.attach(model, torch.zeros(1, 4))
        gated.mask = random_mask(gated, 0)
        model = gated.export()
    prunegate.save(model, path, builder=Offset)
    prunegate.load(path, allow=("tests.buildable",))
    forge(path, lambda tensors, document: tensors.update(offset=torch.zeros(2)))
    refused(path, "does not run" if cut else "offset", allow=("tests.buildable",))


def test_constructor_that_needs_values(tmp_path: Path) -> None:
    model, x = Lists(0.25), torch.randn(3, 4)
    prunegate.save(model, tmp_path / "a.safetensors", builder=functools.partial(Lists, rate=0.25))
    twin = prunegate.load(tmp_path / "a.safetensors", allow=["tests.buildable:Lists"])
    assert torch.equal(twin(x), model(x))
    assert twin.rates == model.rates


def test_recurrent_layers(tmp_path: Path) -> None:
    model = nn.LSTM(3, 4)
    prunegate.save(model, tmp_path / "a.safetensors", builder=functools.partial(nn.LSTM, 3, 4))
    twin = prunegate.load(tmp_path / "a.safetensors", allow=("torch.nn",))
    assert all(a is b for a, b in zip(twin._flat_weights, twin.parameters(), strict=True))
    x = torch.randn(5, 2, 3)
    assert torch.equal(twin(x)[0], model(x)[0])


def test_torchvision_needs_no_allowance(tmp_path: Path) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=3).eval()
    builder = functools.partial(torchvision.models.shufflenet_v2_x0_5, num_classes=3, weights=None)
    prunegate.save(model, tmp_path / "a.safetensors", builder=builder)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(prunegate.load(tmp_path / "a.safetensors")(x), model(x))


def test_compiled_model_is_saved_as_itself(vit: nn.Module, tmp_path: Path, image: torch.Tensor) -> None:
    prunegate.save(torch.compile(vit, backend="eager"), tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(prunegate.load(tmp_path / "a.safetensors")(image), vit(image))


# ---------------------------------------------------------------------- refused on saving


def local_builder() -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return Net()

    return build


@pytest.mark.parametrize(
    ("model", "builder", "says"),
    [
        (Net, None, "builder="),
        (Net, lambda: Net(), "lambda"),
        (Net, local_builder(), "another process"),
        (Net, functools.partial(Net, width=4), "does not build it again"),
        (Net, functools.partial(Net, act=torch.zeros(1)), "cannot be written"),
        (Net, functools.partial(Net, width=2**30), "larger than"),
        (lambda: nn.Linear(2, 2, device="meta"), functools.partial(nn.Linear, 2, 2), "meta device"),
        (lambda: prunegate.attach(timm.create_model("test_vit")), None, "gated"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    model: Callable[[], nn.Module], builder: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        prunegate.save(model(), tmp_path / "a.safetensors", builder=builder)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(file: Path, vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("prunegate.files.save_file", half)
    with pytest.raises(CheckpointError, match="disk full"):
        prunegate.save(vit, file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(CheckpointError, match="cannot be written"):
        prunegate.save(vit, file.parent / "nothing" / "a.safetensors")


# ---------------------------------------------------------------------- refused on loading


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return tensors, json.loads(opened.metadata()["prunegate"])


def forge(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Rewrites a file as somebody would who knows how the checksum is made."""
    from prunegate.checkpoint import _digest

    tensors, document = parts(path)
    change(tensors, document)
    if isinstance(document.get("digest"), str):
        document["digest"] = _digest(document, tensors)
    save_file(tensors, path, {"prunegate": json.dumps(document)})


def refused(path: Path, match: str = ".", allow: tuple[str, ...] = ()) -> None:
    start = time.process_time()  # the machine may be busy with other tests
    with pytest.raises(CheckpointError, match=match):
        prunegate.load(path, allow)
    assert time.process_time() - start < 2


def test_foreign_files(tmp_path: Path, vit: nn.Module) -> None:
    path = tmp_path / "a.safetensors"
    refused(path, "no file")
    refused(tmp_path, "no file")
    contents = {
        "empty": b"",
        "text": b"hello world, this is no model",
        "pickle": pickle.dumps({"a": 1}),
        "long header": struct.pack("<Q", 2**62) + b"{}",
        "deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    }
    for content in contents.values():
        path.write_bytes(content)
        refused(path)
    torch.save(vit.state_dict(), path)
    refused(path)
    save_file({"a": torch.zeros(2)}, path)
    refused(path, "not one that prunegate")
    save_file({"a": torch.zeros(2)}, path, {"prunegate": "[" * 100_000})
    refused(path)
    save_file({"a": torch.zeros(2)}, path, {"prunegate": "[]"})
    refused(path, "altered")


def test_truncated_and_altered_files(file: Path) -> None:
    whole = file.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.999):
        file.write_bytes(whole[: int(len(whole) * share)])
        refused(file)
    file.write_bytes(whole + b"more")
    refused(file)
    for at in (len(whole) - 1, len(whole) // 2, len(whole) - 10_000):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(file, "altered")
    at = whole.index(b'\\"num_classes\\"')
    file.write_bytes(whole[: at + 2] + b"x" + whole[at + 3 :])
    refused(file, "altered")


def set_builder(target: str, *args: Any, **kwargs: Any) -> Callable[[dict, dict], None]:
    def change(tensors: dict, document: dict) -> None:
        document["builder"] = {"target": target, "args": list(args), "kwargs": kwargs}

    return change


def set_key(**values: Any) -> Callable[[dict, dict], None]:
    return lambda tensors, document: document.update(values)


def set_plan(change: Callable[[dict], None]) -> Callable[[dict, dict], None]:
    def apply(tensors: dict, document: dict) -> None:
        plan = json.loads(document["plan"])
        change(plan)
        document["plan"] = json.dumps(plan)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        set_builder("os:system", "true"),
        set_builder("timm:list_models"),
        set_builder("timm.models:load_checkpoint", "x"),
        set_builder("timm:create_model", "hf-hub:timm/resnet18"),
        set_builder("timm:create_model", "no_such_model"),
        set_builder("timm:create_model", "test_vit", pretrained=True),
        set_builder("timm:create_model", "test_vit", checkpoint_path="/etc/passwd"),
        set_builder("timm:create_model", "test_vit", embed_dim=2**40),
        set_builder("timm:create_model", "test_vit", depth=2**19),
        set_builder("timm:create_model", "vit_giant_patch14_224"),
        set_builder("timm:create_model", "test_vit", act_layer={"layer": "subprocess:Popen"}),
        set_builder("timm:create_model", "test_vit", act_layer={"layer": "tests.buildable:Net"}),
        set_builder("timm:create_model", "test_vit", act_layer={"code": "1"}),
        set_builder("timm:create_model", "test_vit", nothing=1),
        set_builder("timm:create_model", "test_vit", num_classes=6),
        set_builder("torchvision.models.resnet:resnet18"),
        set_builder("torchvision.models.resnet:load_state_dict_from_url", "http://localhost"),
        set_builder("transformers.models.bert.modeling_bert:torch.load", "x"),
        set_builder("tests.buildable:Net"),
        set_key(builder={"target": "timm:create_model"}),
        set_key(builder=None),
        set_key(format=99),
        set_key(more=1),
        set_key(digest=0),
        set_key(plan=Plan().to_json()),
        set_key(plan="{}"),
        set_key(aliases={"a": "b"}),
        set_plan(lambda plan: plan["dense"].update({"pos_embed": [1, 101, 2**50]})),
        set_plan(lambda plan: plan["sets"].append([0, 2**60])),
        lambda tensors, document: tensors.pop("pos_embed"),
        lambda tensors, document: tensors.update(more=torch.zeros(2)),
        lambda tensors, document: tensors.update(pos_embed=torch.zeros(2, 2)),
        lambda tensors, document: tensors.update(pos_embed=torch.zeros_like(tensors["pos_embed"], dtype=torch.int64)),
    ],
)  # fmt: skip
def test_forged_files(file: Path, change: Callable[[dict, dict], None]) -> None:
    with suppress(ImportError):  # how long a library that may be named takes to import is its own affair
        import_module("transformers.models.bert.modeling_bert")
    forge(file, change)
    refused(file)


@pytest.mark.parametrize("argument", [{"pretrained": True}, {"checkpoint_path": "/etc/passwd"}, {"cache_dir": "/"}])
def test_no_weights_are_fetched_or_read(file: Path, argument: dict[str, Any]) -> None:
    forge(file, set_builder("timm:create_model", "test_vit", num_classes=5, **argument))
    refused(file, "a file of ours never does that")


def test_endless_constructor_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    prunegate.save(endless(2), path, builder=functools.partial(endless, 2))
    forge(path, set_builder("tests.buildable:endless", 2**20))
    refused(path, "far more", ("tests.buildable",))


def test_only_what_the_allowed_module_defines(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    prunegate.save(endless(2), path, builder=functools.partial(endless, 2))
    forge(path, set_builder("tests.buildable:nn.Linear", 1, 1))
    refused(path, "not defined in", ("tests.buildable",))
    forge(path, set_builder("tests.buildable_not:Net"))
    refused(path, "allow=", ("tests.buildable",))


def test_edits_are_derived_again_for_another_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit_relpos" if timm.is_model("test_vit_relpos") else "shvit_s1").eval()
    size = model.pretrained_cfg["input_size"]
    gated = prunegate.attach(model).eval()
    gated.mask = random_mask(gated, 0)
    slim = gated.export().eval()
    path = tmp_path / "a.safetensors"
    prunegate.save(slim, path)
    calls, attributes = plan_of(slim).calls, plan_of(slim).attributes
    assert calls
    assert attributes
    x = torch.randn(2, *size)
    changes = [
        lambda plan: [call["path"][-1].__setitem__(1, "gone") for call in plan["calls"]],
        lambda plan: [edit.__setitem__(1, "gone") for edit in plan["attributes"]],
        lambda plan: plan["calls"].append({"module": "", "path": [["os:system", "f", 0]], "changes": []}),
        lambda plan: plan["attributes"].append(["", "pretrained_cfg", 1, 2]),
    ]
    for change in changes:
        prunegate.save(slim, path)
        forge(path, set_plan(change))
        twin = prunegate.load(path)
        with torch.no_grad():
            assert torch.equal(twin(x), slim(x))
        assert set(plan_of(twin).calls) == set(calls)
        assert set(plan_of(twin).attributes) == set(attributes)


def test_other_version_of_the_source_is_named(file: Path) -> None:
    forge(file, lambda tensors, document: document["versions"].update(timm="0.1"))
    assert prunegate.load(file) is not None
    gone = ["timm.models.vision_transformer:VisionTransformer.forward", "gone", 0]
    forge(file, set_plan(lambda plan: plan["calls"].append({"module": "", "path": [gone], "changes": []})))
    forge(file, set_plan(lambda plan: plan.pop("example")))
    forge(file, lambda tensors, document: document["pretrained_cfg"].update(input_size=None))
    refused(file, "timm 0.1 then")


def test_transformers_keep_their_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is installed for the whole suite only")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    gated = prunegate.attach(model, x).eval()
    gated.mask = random_mask(gated, 0)
    slim = gated.export().eval()
    path = tmp_path / "a.safetensors"
    prunegate.save(slim, path)
    twin = prunegate.load(path)
    assert twin.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(twin(**x).logits, slim(**x).logits)

    def fetch(tensors: dict, document: dict) -> None:
        document["builder"]["args"][0]["attention"] = "somebody/kernel"

    forge(path, fetch)
    refused(path, "implementation of attention")


# ------------------------------------------------------------------------------------------------ what cannot run


@pytest.mark.parametrize("with_example", [True, False])
def test_edits_after_which_the_model_cannot_run_are_made_anew(
    vit: nn.Module, file: Path, image: torch.Tensor, with_example: bool
) -> None:
    def spoil(plan: dict[str, Any]) -> None:
        edit = next(edit for edit in plan["attributes"] if edit[1] == "attn_dim")
        edit[3] = edit[2] + 1
        if not with_example:
            del plan["example"]

    forge(file, set_plan(spoil))
    assert torch.equal(prunegate.load(file)(image), vit(image))
    plan = Plan.from_json(parts(file)[1]["plan"])
    if with_example:
        with pytest.raises(prunegate.PlanError, match=r"does not run on the input.*shape"):
            prunegate.apply_plan(timm.create_model("test_vit", num_classes=5), plan)


def test_a_file_without_an_example_is_read(vit: nn.Module, file: Path, image: torch.Tensor) -> None:
    forge(file, set_plan(lambda plan: plan.pop("example")))
    assert torch.equal(prunegate.load(file)(image), vit(image))


@pytest.mark.parametrize(
    "example",
    [[[[[[[[[[0]]]]]]]]], {"tensor": [2**50], "type": "float32"}, {"tensor": [1, -1], "type": "float32"},
     {"tensor": [1], "type": "object"}, {"layer": "os:system"}],
)  # fmt: skip
def test_examples_that_are_none_are_refused(file: Path, example: Any) -> None:
    forge(file, set_plan(lambda plan: plan.update(example=example)))
    refused(file, "example input")
