"""Files from strangers: mutated, truncated, oversized, nested and foreign ones are refused clearly, or they work.

``make test`` tries a few hundred from kept seeds; the whole count is marked slow. Every case is a function of its
number, so that a failure names the file that made it.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import state
import timm
import torch
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import prunegate
from prunegate import Plan, PruneGateError
from prunegate.checkpoint import _digest as digest_of_model
from tests.models import random_mask

SECONDS = 1.0
BYTES = 64 * 2**20
FULL = {"model": 3_000, "cut": 1_000, "resume": 6_000}
WEIRD: list[Any] = [None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -1e308, "", "os:system", "a" * 10_000, [],
                    {}, [[]], [{}], "\x00", "../../etc/passwd", {"tuple": []}, {"layer": "os:system"},
                    {"partial": {"target": "subprocess:Popen", "args": ["true"], "kwargs": {}}}]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A document with one to three of its places replaced, removed, repeated or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        stack = [value]
        while stack:
            item = stack.pop()
            keys = item.keys() if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
            for key in keys:
                places.append((item, key))
                stack.append(item[key])
        if not places:
            return rng.choice(WEIRD)
        container, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, container[key])
            case 1:
                container[rng.choice(["x", "", "__class__", "0"])] = container[key]
            case 2 if isinstance(container[key], int):
                container[key] += rng.choice([-1, 1, 2**20, 2**40, -(2**62)])
            case 3 if isinstance(container[key], str) and container[key]:
                at = rng.randrange(len(container[key]))
                container[key] = container[key][:at] + rng.choice("x:.\x00é") + container[key][at + 1 :]
            case 4:
                container[key] = nested(rng.choice([3, 900, 5000]))
            case _:
                container[key] = rng.choice(WEIRD)
    return value


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncated, flipped, spliced, with another header length, or of another kind altogether."""
    at = rng.randrange(len(data))
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case 2:
            return data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at:]
        case 3:
            return struct.pack("<Q", rng.choice([0, 1, len(data), 2**31, 2**40, 2**63])) + data[8:]
        case 4:
            head = json.dumps({"a": {"dtype": "F32", "shape": [2**rng.randrange(62)], "data_offsets": [0, 4]}}).encode()
            return struct.pack("<Q", len(head)) + head + b"\x00" * 4
        case 5:
            head = b"[" * rng.randrange(1, 50_000)
            return struct.pack("<Q", len(head)) + head
        case _:
            return rng.choice([b"", b"\x80\x04K\x01.", b"PK\x03\x04" + rng.randbytes(100), rng.randbytes(400)])


def dumped(value: Any) -> str:
    """JSON, also of what Python's own encoder would find too deep."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000 + "]" * 5000


class Target:
    """One reader with an intact file: what it takes apart, and how it is put together again."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        net = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8).eval()
        gated = prunegate.attach(net, torch.randn(1, 3, 32, 32)).eval()
        gated.mask = random_mask(gated, 0)
        self.net, self.plan = net, gated.plan()
        self.file, self.state, self.case = folder / "slim.st", folder / "state.st", folder / "case.st"
        prunegate.save(gated.export(), self.file)
        optimizer = torch.optim.AdamW(net.head.parameters())
        net.head(torch.randn(2, 64)).sum().backward() if net.head.in_features == 64 else None
        optimizer.step()
        state.write_state({"phase": "search", "at": {"epoch": 1, "index": 2}, "model": net.head.state_dict(),
                           "optimizer": optimizer.state_dict(), "random": state.capture_random(torch.device("cpu"))},
                          self.state)  # fmt: skip
        self.folder = folder

    def model(self, number: int) -> None:
        """``load`` of a file that was altered, by somebody who can make checksums in every second case."""
        rng = random.Random(number)
        if rng.random() < 0.5:
            self.case.write_bytes(mutated_bytes(self.file.read_bytes(), rng))
        else:
            with safe_open(self.file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
                document = json.loads(opened.metadata()["prunegate"])
            if rng.random() < 0.4:
                document["plan"] = dumped(mutated_json(json.loads(document["plan"]), rng))
            elif rng.random() < 0.3:
                name = rng.choice(sorted(tensors))
                own = tensors[name]
                tensors[name] = rng.choice([torch.zeros(0), own.half(), torch.zeros(3, 2), own[None]])
                tensors = {key: value.contiguous() for key, value in tensors.items()}
            else:
                document = mutated_json(document, rng)
            if isinstance(document, dict) and isinstance(document.get("digest"), str):
                try:
                    document["digest"] = digest_of_model(document, tensors)
                except RecursionError:
                    pass
            save_file(tensors, self.case, {"prunegate": dumped(document)})
        loaded = prunegate.load(self.case)
        assert isinstance(loaded, nn.Module)
        with torch.no_grad():
            assert loaded.float().eval()(torch.zeros(1, 3, 32, 32)).dim() == 2

    def cut(self, number: int) -> None:
        """``Plan.from_json`` and ``apply_plan`` of an altered plan."""
        rng = random.Random(number)
        text = self.plan.to_json()
        if rng.random() < 0.2:
            at = rng.randrange(len(text))
            text = rng.choice([text[:at], text[:at] + "[" * 20_000, text[:at] + rng.choice('0"{},:') + text[at + 1 :]])
        else:
            text = dumped(mutated_json(json.loads(text), rng))
        with torch.device("meta"):
            net = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8)
        slim = prunegate.apply_plan(net, Plan.from_json(text))
        assert slim(torch.zeros(1, 3, 32, 32, device="meta")).dim() == 2

    def resume(self, number: int) -> None:
        """The reader of training states, and the parts of a run that take one over."""
        rng = random.Random(number)
        if rng.random() < 0.5:
            self.case.write_bytes(mutated_bytes(self.state.read_bytes(), rng))
        else:
            with safe_open(self.state, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
                document = json.loads(opened.metadata()[state._KEY])
            document = mutated_json(document, rng)
            if isinstance(document, dict) and "digest" in document:
                try:
                    document["digest"] = state._digest(document, tensors)
                except (RecursionError, ValueError):
                    pass
            save_file(tensors, self.case, {state._KEY: dumped(document)})
        found = state.read_state(self.case)
        head = nn.Linear(self.net.head.in_features, 5)
        optimizer = torch.optim.AdamW(head.parameters())
        with state.restoring("the head"):
            head.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
            state.restore_random(found["random"], 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("hostile"))


def attack(target: Target, kind: str, number: int) -> bool:
    """Whether the file was refused; fails on any other end than a refusal or a model that works."""
    modules, files = set(sys.modules), set(target.folder.iterdir())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refused = False
    try:
        run: Callable[[int], None] = getattr(target, kind)
        run(number)
    except PruneGateError:
        refused = True
    assert time.process_time() - start < SECONDS, (kind, number)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BYTES // 1024, (kind, number)
    assert set(target.folder.iterdir()) <= files | {target.case}, (kind, number)
    known = ("torch", "timm", "torchvision", "transformers", "prunegate")
    imported = {name for name in set(sys.modules) - modules if name.split(".")[0] not in known}
    assert not imported, (kind, number, imported)
    return refused


def test_intact_files_are_read(target: Target) -> None:
    assert prunegate.load(target.file) is not None
    assert prunegate.apply_plan(target.net, Plan.from_json(target.plan.to_json())) is not None
    assert state.read_state(target.state)["phase"] == "search"


@pytest.mark.parametrize("kind", list(FULL))
@seed(20_260)
@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, 2**32))
@example(number=0)
def test_some_files_of_strangers(target: Target, kind: str, number: int) -> None:
    attack(target, kind, number)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(FULL))
def test_ten_thousand_files_of_strangers(target: Target, kind: str, record_property: Any) -> None:
    count = FULL[kind]
    refused = sum(attack(target, kind, number) for number in range(count))
    record_property("files", count)
    print(f"{kind}: {count} files, {refused} refused, {count - refused} work")
    assert refused > count // 2
