"""Photographs that a user points at: files, folders in the order people count, or bytes in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES = 256 << 20


class NotAPhotograph(ValueError):
    """A path that leads to no photograph; says why."""


@dataclass(frozen=True)
class Photograph:
    """A file that may or may not be readable, or the bytes of a picture; `name` is for people and always encodable."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    problem: str | None = None

    def read(self) -> bytes:
        """The file's bytes; NotAPhotograph or OSError."""
        if self.problem is not None:
            raise NotAPhotograph(self.problem)
        if self.data is not None:
            return self.data
        assert self.path is not None
        if not self.path.is_file():  # a pipe or a device would be waited for
            raise NotAPhotograph("no such file" if not self.path.exists() else "no regular file")
        if self.path.stat().st_size > MAX_BYTES:
            raise NotAPhotograph(f"larger than {MAX_BYTES >> 20} MiB")
        return self.path.read_bytes()


def find_photographs(paths: Iterable[Path]) -> Iterator[Photograph]:
    """Files as given, and of folders all JPEG, PNG and WebP files below, img2 before img10; without hidden ones."""
    for path in paths:
        if not path.is_dir():
            yield Photograph(shown(path), path)
            continue
        found = sorted(_below(path), key=lambda file: natural_key(str(file.relative_to(path))))
        if not found:
            yield Photograph(shown(path), path, problem="a folder without JPEG, PNG or WebP files")
        yield from (Photograph(shown(file), file) for file in found)


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sorts digits by their value and letters without regard to case."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts]


def shown(path: Path) -> str:
    """A path as text that every file and terminal in UTF-8 takes, also when its bytes are not UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES))
