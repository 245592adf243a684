"""The package is a pipeline: no module imports one that stands after it in the flow of data."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prunegate

ROOT = Path(prunegate.__file__).parent

# Later ones may import earlier ones, never the reverse. A folder stands for all of its modules until a module of it
# is named on its own. Modules of one line do not know one another, except inside one folder.
LAYERS = (
    "errors",
    "files",
    "example",
    "tensors",
    "plan",
    "again",
    "choice",
    "elastic_kernel",
    "resolution",
    "gumbel",
    "stand_alone",
    "labels.unionfind",
    "labels.planes",
    "labels.record",
    "labels.shapes",
    "valueless",
    "labels.algebra",
    "labels.rules",
    "labels.heads",
    "labels.paths",
    "labels.trace",
    "labels",
    "slim",
    "streaming",
    "blocks",
    "polynomial",
    "flops",
    "groups",
    "operators",
    "gates",
    "cost",
    "masked",
    "sites",
    "install",
    "derive",
    "planning",
    "gated",
    "attaching",
    "select",
    "batches",
    "budget",
    "scores",
    "oneshot",
    "transfer",
    "least_squares",
    "refitting",
    "rederive",
    "builders",
    "checkpoint",
    "hub",
    "after_timm",
    "cli",
    "__main__",
)

# A slim model is cut, saved and loaded without the machinery that chose it.
SLIM_SIDE = ("plan", "slim.apply", "checkpoint")
SEARCH_SIDE = ("gumbel", "labels", "groups", "gates", "gated", "budget")


def modules() -> list[str]:
    """Dotted names below the package, such as ``labels.rules``; the package itself is left out."""
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if name]


def path_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(module: str) -> set[str]:
    """Modules of the package that a module's source imports anywhere, functions included."""
    known = set(modules())
    found = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; this package imports by full names"
            base = node.module or ""
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        inside = {target.removeprefix("prunegate.") for target in targets if target.startswith("prunegate.")}
        found |= inside & known
    return found - {module}


def layer(module: str) -> int:
    """Place of a module in LAYERS, by its own name or else by the nearest folder's."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in LAYERS:
            return LAYERS.index(name)
    raise AssertionError(f"prunegate.{module} has no place in LAYERS of {Path(__file__).name}: say where it stands")


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_stands_before_it(module: str) -> None:
    own = layer(module)
    late = [other for other in imports(module) if layer(other) > own and other not in module.split(".")[:1]]
    assert not late, f"prunegate.{module} imports {late}, which stand after it in the flow of data"


def test_every_layer_exists() -> None:
    assert [name for name in LAYERS if not path_of(name).exists()] == []


@pytest.mark.parametrize("module", SLIM_SIDE)
def test_slim_side_loads_without_the_search_side(module: str) -> None:
    """In a fresh process, because here other tests have imported everything."""
    unwanted = [f"prunegate.{name}" for name in SEARCH_SIDE]
    code = (
        f"import sys, prunegate.{module}\n"
        f"unwanted = {unwanted!r}\n"
        "print([n for n in sys.modules if any(n == u or n.startswith(u + '.') for u in unwanted)])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
