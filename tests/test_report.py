"""The page of a run, as data, as text, and in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import prunegate
from prunegate.cli.main import main
from prunegate.cli.reporting import collect


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, prunegate.GatedModel]:
    """A folder as the recipe leaves it, and the gated model whose cut is in it."""
    folder = tmp_path_factory.mktemp("runs") / "small <run>"
    folder.mkdir()
    torch.manual_seed(0)
    gated = prunegate.attach(timm.create_model("test_resnet", num_classes=4).eval(), torch.zeros(1, 3, 64, 64))
    slim = prunegate.one_shot(gated, score="random", flops=0.5)
    prunegate.save(slim, folder / "slim.safetensors")
    (folder / "args.yaml").write_text(yaml.safe_dump({"model": "test_resnet", "flops": 0.5, "img_size": 64}))
    measured = {"top1": 90.0, "flops": 1, "params": 1, "file_bytes": 1000, "latency_ms": {"1": 2.0}}
    (folder / "report.json").write_text(json.dumps({"dense": measured, "slim": measured | {"top1": 88.5}}))
    with (folder / "summary.csv").open("w", newline="") as file:
        columns = "epoch phase train_loss eval_loss eval_top1 tau expected_flops target_flops".split()
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for epoch in range(6):
            search = {"tau": 1.0, "expected_flops": 5e6 - 1e5 * epoch, "target_flops": 5e6} if 1 < epoch < 4 else {}
            writer.writerow({"epoch": epoch, "phase": "search" if search else "dense", "train_loss": 2 / (epoch + 1),
                             "eval_loss": 2.1 / (epoch + 1), "eval_top1": 15.0 * epoch, **search})  # fmt: skip
    return folder, gated


def test_kept_units_are_those_of_the_cut(run: tuple[Path, prunegate.GatedModel]) -> None:
    folder, gated = run
    found = collect(folder)
    assert [(g["name"], g["units"], g["kept"]) for g in found["groups"]] == [
        (group.name, group.size, int(gated.mask[group.slice].sum())) for group in gated.groups
    ]
    assert found["flops"] == [gated.cost.flops(), gated.cost.flops(gated.mask)]
    assert sum(part["slim"] for part in found["parts"]) == found["flops"][1]
    assert sum(item["positions"] for item in found["frozen"]) == sum(item.count for item in gated.frozen)


def test_the_page_stands_alone(run: tuple[Path, prunegate.GatedModel], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(run[0]), "--out", str(page)]) == 0
    text = page.read_text()
    assert not re.search(r"""(?:src|href)=(?!["']?data:)|@import|url\(|https?://""", text)
    assert "small &lt;run&gt;" in text
    assert "small <run>" not in text
    seen = _Tags()
    seen.feed(text)
    assert seen.open == []
    assert seen.pictures
    assert all(seen.pictures), "a picture has no text"
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "svg":
            self.pictures.append(dict(attrs).get("aria-label"))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def browser() -> Any:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        pytest.skip("there is no chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield session
    session.quit()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_in_a_browser(run: tuple[Path, prunegate.GatedModel], tmp_path: Path, browser: Any) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(run[0]), "--out", str(page)]) == 0
    browser.set_window_size(1100, 900)
    browser.get(page.as_uri())
    find = browser.find_elements

    def column(at: int) -> list[str]:
        return [cell.text for cell in find("css selector", f"#groups tbody td:nth-child({at})")]

    groups = run[1].groups
    units = [group.size for group in groups]
    kept = [int(run[1].mask[group.slice].sum()) for group in groups]
    assert column(2) == [group.name for group in groups]
    assert [int(text) for text in column(5)] == kept
    # The picture shows these numbers: the bar's width is that of the row's share of the widest group.
    widths = [float(bar.rect["width"]) for bar in find("css selector", "#groups .kept")]
    whole = max(bar.rect["width"] for bar in find("css selector", "#groups .gone"))
    for width, count in zip(widths, kept, strict=True):
        assert width == pytest.approx(whole * count / max(units), abs=1.0)
    assert find("css selector", "#groups svg")[0].accessible_name.startswith(f"{groups[0].name}: {kept[0]} of")

    heading = find("css selector", "#groups th button")[4]
    heading.click()
    assert [int(text) for text in column(5)] == sorted(kept)
    heading.click()
    assert [int(text) for text in column(5)] == sorted(kept, reverse=True)
    assert find("css selector", "#groups th")[4].get_attribute("aria-sort") == "descending"

    backgrounds = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        backgrounds.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 25, 31)"]

    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
