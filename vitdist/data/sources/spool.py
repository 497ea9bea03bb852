"""What was fetched and is not packed yet: a few large files that grow, so that a killed packing loses nothing.

Every writer has two files of its own: the bytes, and a list with a line for each photograph, written after its bytes.
A line without its end is none; bytes without a line are passed over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vitdist.data.sources.photograph import FileSlice
from vitdist.errors import DataError, UsageError

BYTES, LIST = ".bytes", ".list"


@dataclass(frozen=True, slots=True)
class Spooled:
    """A photograph in a spool; it is checked when it is read."""

    place: FileSlice
    checksum: int

    @property
    def num_bytes(self) -> int:
        return self.place.length

    def read(self) -> bytes:
        data = self.place.read()
        if zlib.crc32(data) != self.checksum:
            folder = self.place.path.parent
            raise DataError(f"{self.place.path} is damaged; delete the folder {folder} and start again")
        return data


class Spool:
    """A folder of fetched photographs by address. `name` tells its writers apart; one at a time has it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self._name = folder, name
        self.found: dict[str, Spooled] = {}

    def __enter__(self) -> Spool:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._bytes = open(self.folder / (self._name + BYTES), "ab", buffering=0)
        try:
            fcntl.flock(self._bytes, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._bytes.close()
            raise UsageError(f"{self.folder}: another process fetches {self._name}; wait for it") from None
        self._list = open(self.folder / (self._name + LIST), "a+b", buffering=0)
        self._cut()
        for path in sorted(self.folder.glob(f"*{LIST}")):
            self.found.update(_read(path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_empty = os.fstat(self._bytes.fileno()).st_size == 0
        self._list.close()
        self._bytes.close()
        if is_empty:  # a table of files, or a mistake in it: no folder is left for nothing
            for suffix in (BYTES, LIST):
                (self.folder / (self._name + suffix)).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others fetch into it, or it is gone with its discarded bytes
                self.folder.rmdir()

    def add(self, address: str, data: bytes) -> None:
        """Keep a photograph. OSError when there is no room."""
        offset, checksum = os.fstat(self._bytes.fileno()).st_size, zlib.crc32(data)
        _write(self._bytes.fileno(), data)
        line = json.dumps([address, offset, len(data), checksum]).encode() + b"\n"
        _write(self._list.fileno(), line)
        place = FileSlice(self.folder / (self._name + BYTES), offset, len(data))
        self.found[address] = Spooled(place, checksum)

    def discard(self) -> None:
        """Delete the spool; files of others in its folder stay."""
        for path in [*self.folder.glob(f"*{BYTES}"), *self.folder.glob(f"*{LIST}")]:
            path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _cut(self) -> None:
        """Take the last line away where a kill left it unfinished."""
        self._list.seek(0)
        text = self._list.read()
        self._list.truncate(text.rfind(b"\n") + 1)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(path: Path) -> Iterator[tuple[str, Spooled]]:
    """The whole lines of a list whose bytes are all there."""
    content = path.with_name(path.name.removesuffix(LIST) + BYTES)
    size = content.stat().st_size if content.is_file() else 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            address, offset, length, checksum = json.loads(line)
            place = FileSlice(content, int(offset), int(length))
        except (ValueError, TypeError):
            raise DataError(f"{path} is damaged; delete the folder {path.parent} and start again") from None
        if place.offset + place.length <= size:
            yield str(address), Spooled(place, int(checksum))
