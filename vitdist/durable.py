"""Files that appear with all their bytes or not at all: after a crash the old one stands, or the new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, renamed to `path` once its bytes are on disk; nothing is left of it when writing fails."""
    stage = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write the same name
    try:
        with stage.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a small file, its folder too where there is none; readers see the old one or the new one. Text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_folder(path: Path) -> None:
    """Make a folder's names durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
