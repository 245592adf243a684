"""Files that get to their place in one step: a reader finds the old one or the new one, whole, whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["put_tensors", "put_text"]


def put_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file.

    Args:
        path: Its place.
        tensors: On the CPU, contiguous or channels-last, none sharing memory with another.
        metadata: What its header says besides.

    Raises:
        OSError: It cannot be written; what was at ``path`` is still there.
    """
    with _beside(path) as file:
        file.touch()
        mode = file.stat().st_mode  # what the user's umask gives; safetensors makes files that only their owner reads
        try:
            save_file(dict(tensors), file, dict(metadata))
        except SafetensorError as error:  # how a full disk looks from there
            raise OSError(str(error)) from error
        file.chmod(mode)


def put_text(path: Path, text: str) -> None:
    """Writes a text file.

    Raises:
        OSError: It cannot be written; what was at ``path`` is still there.
    """
    with _beside(path) as file:
        file.write_text(text)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Where to write; what is there afterwards is on the disk and in the place of ``path``."""
    file = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield file
        _sync(file)
        file.replace(path)
        with suppress(PermissionError):  # some systems do not open folders
            _sync(path.parent)
    finally:
        with suppress(OSError):
            file.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
