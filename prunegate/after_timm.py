"""Registers slim models with timm once timm is there: importing it only to register a name would take seconds."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

__all__ = ["when_timm_is_imported"]


def _register() -> None:
    importlib.import_module("prunegate.hub").register_with_timm()


class _Loader(importlib.abc.Loader):
    """Loads timm as its own loader does, and registers afterwards."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # resources and sources are asked of the loader, too

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the first import of timm."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def when_timm_is_imported() -> None:
    """Registers slim models with timm now, if it is imported, or else when it will be."""
    if hasattr(sys.modules.get("timm"), "create_model"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
