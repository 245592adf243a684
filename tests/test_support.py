"""The README's support table is what the tool makes of the numbers of a sweep."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from tools import coverage, support

README = Path(__file__).parents[1] / "README.md"


def rows() -> list[coverage.Row]:
    good = dict(error=1e-15, costs_exact=True, gates=5, groups=1, same_class=True)
    return [
        coverage.Row("resnet", "resnet18", prunable=0.99, flops_left=0.3, **good),
        coverage.Row("vgg", "vgg11", prunable=0.789, flops_left=0.6, **good),
        coverage.Row("cait", "cait_xxs24_224", prunable=0.95, flops_left=0.5, **{**good, "error": 1e-7}),
        coverage.Row("transformers", "llama", prunable=0.96, flops_left=0.4, precision="float32",
                     **{**good, "error": 1e-7}),
    ]  # fmt: skip


def test_numbers_of_a_sweep_become_a_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="its version is printed; install it to run this test")
    source, readme = tmp_path / "coverage.json", tmp_path / "README.md"
    source.write_text(json.dumps([asdict(row) for row in rows()]))
    readme.write_text(f"before\n{support.BEGIN}\nold\n{support.END}\nafter\n")
    coverage.write_support(readme, [source])
    first, second = support.parse(support.section(readme.read_text()))
    assert first.models.startswith("timm 1.")
    assert (first.passed, first.total, first.prunable, first.least, first.halved, first.single) == (2, 3, 2, 78, 1, 0)
    assert (second.passed, second.total, second.single) == (1, 1, 1)
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")


def test_a_table_is_made_again_from_its_numbers() -> None:
    lines = [support.Support("timm 1.0: each family", 98, 98, 96, 80, 96, 0)]
    assert support.parse(support.table(lines)) == lines


def test_a_text_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="add the two lines"):
        support.rewrite("nothing here", [])


def test_the_readme_shows_what_the_tool_makes() -> None:
    text = README.read_text()
    if support.BEGIN not in text:
        pytest.skip("the README has no marked section yet")
    shown = support.section(text)
    assert shown == support.table(support.parse(shown))
    assert all(line.passed <= line.total for line in support.parse(shown))


def fragile(task: coverage.Task) -> coverage.Row:
    """Stands for a model that takes more memory than there is."""
    if task[2] == "too large":
        os.kill(os.getpid(), signal.SIGKILL)
    return coverage.Row(task[1], task[2])


def test_a_worker_that_is_killed_costs_its_own_row_only() -> None:
    names = ["a", "too large", "b", "c"]
    rows = list(coverage.in_processes([("timm", "family", name) for name in names], 2, fragile))
    assert sorted(row.model for row in rows) == sorted(names)
    assert {row.model: row.failure for row in rows if row.failure} == {
        "too large": "its process was killed; out of memory?"
    }
