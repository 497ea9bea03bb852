"""Copies of remote shards on a node's own disk: fetched once for all its ranks, verified, and bounded in bytes.

A copy is named by a hash of its full address and of its content, so train/0.tar and val/0.tar never meet, and a shard
that was packed anew is another copy. Whoever needs a shard first claims it (a lock that the kernel lets go when its
holder dies), downloads it beside its place and renames it; the others wait for that. Copies give way in the order they
were last read. Nothing is waited for without a limit: each download ends by itself.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from vitdist.data.storage.claims import claimed, is_claimed, locked
from vitdist.data.storage.remote import Patience, RemoteError, RemoteFile, check_address, shown
from vitdist.durable import sync_folder
from vitdist.errors import ResourceError

PARTIAL = ".partial"
CLAIM = ".claim"
LOCK = ".lock"
COPIES = "shards"
CHUNK = 1 << 20
POLL = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(ResourceError):
    """The cache's disk, or its bound, is too small."""

    def __init__(self, text: str) -> None:
        # torch's loader makes a worker's exception anew from its traceback; the message is the end of that
        super().__init__(text.rpartition("NoRoom: ")[2].strip())


@dataclass(frozen=True)
class Wanted:
    """A remote file as an index describes it."""

    address: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The file name of its copy."""
        digest = hashlib.sha256(f"{self.address}\n{self.sha256}".encode("utf-8", "surrogateescape")).hexdigest()
        return f"{digest[:40]}.{self.bytes}"


@dataclass(frozen=True)
class ShardCache:
    """A folder of copies. `limit` bounds their bytes, None does not; processes that share a folder share its copies."""

    folder: Path
    limit: int | None = None
    patience: Patience = field(default_factory=Patience)

    def open(self, wanted: Wanted) -> int:
        """A descriptor of the copy, fetched first where there is none; RemoteError, or NoRoom."""
        check_address(wanted.address)
        place = self.place(wanted)
        while True:
            descriptor = _open_copy(place, wanted.bytes)
            if descriptor is not None:
                touch(descriptor)
                return descriptor
            self.fetch(wanted)

    def fetch(self, wanted: Wanted, *, wait: bool = True) -> bool:
        """Make sure there is a copy. False when somebody else is fetching it and `wait` is not given."""
        place = self.place(wanted)
        if place.exists():
            return True
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with claimed(place.with_name(place.name + CLAIM), wait=wait) as mine:
                if mine and not place.exists():
                    self._download(wanted, place)
                return mine
        except OSError as error:
            if error.errno in _FULL:
                with suppress(OSError):
                    place.with_name(place.name + PARTIAL).unlink()
                raise self._no_room(wanted) from None
            raise NoRoom(f"data.cache_dir {self.folder} cannot be written ({error.strerror}); name another") from None

    def drop(self, wanted: Wanted) -> None:
        """Forget a copy whose bytes turned out to be others than were fetched."""
        with suppress(FileNotFoundError):
            self.place(wanted).unlink()

    def place(self, wanted: Wanted) -> Path:
        """Where the copy lies, or will."""
        return self.folder / COPIES / wanted.name[:2] / wanted.name

    def _download(self, wanted: Wanted, place: Path) -> None:
        """Fetch into a partial file, which a later try goes on with, and rename it once its hash is right."""
        partial = place.with_name(place.name + PARTIAL)
        self._reserve(wanted, partial)
        for _ in range(2):  # a part may be from another time: then once more from the beginning
            if self._filled(wanted, partial):
                os.replace(partial, place)
                sync_folder(place.parent)
                return
            os.truncate(partial, 0)
        partial.unlink()
        raise RemoteError(
            wanted.address, "changed", "it is not the file that was indexed; index the set again, or put the file back"
        )

    def _filled(self, wanted: Wanted, partial: Path) -> bool:
        try:
            return self._fill(wanted, partial) == wanted.sha256
        except RemoteError as error:
            if error.kind == "changed":
                return False
            partial.unlink()
            raise

    def _fill(self, wanted: Wanted, partial: Path) -> str:
        """The sha256 of the partial file when all of it has come, or "" when the server has more or less."""
        digest = hashlib.sha256()
        with open(partial, "r+b", buffering=0) as out:
            while data := out.read(CHUNK):
                digest.update(data)
            source = RemoteFile(wanted.address, start=out.tell(), size=wanted.bytes, patience=self.patience)
            try:
                while out.tell() <= wanted.bytes and (data := source.read(CHUNK)):
                    digest.update(data)
                    self._write(out, data, wanted)
                os.fsync(out.fileno())
            finally:
                source.close()
            return digest.hexdigest() if out.tell() == wanted.bytes else ""

    def _write(self, out: FileIO, data: bytes, wanted: Wanted) -> None:
        """Append; a full disk takes the oldest copies first."""
        view = memoryview(data)
        while view:
            try:
                view = view[out.write(view) :]
            except OSError as error:
                if error.errno not in _FULL or not self._evict(wanted.bytes):
                    raise

    def _reserve(self, wanted: Wanted, partial: Path) -> None:
        """Create the partial file, whose name counts in full from now on, once there is room for it."""
        if self.limit is not None and wanted.bytes > self.limit:
            raise NoRoom(
                f"data.cache_size is {self.limit} bytes and {shown(wanted.address)} has {wanted.bytes}; make it larger"
            )
        while True:
            with locked(self.folder / LOCK):
                if partial.exists() or self.limit is None or self._shrink(self.limit - wanted.bytes):
                    partial.touch()
                    return
            time.sleep(POLL)  # what others are fetching fills it; each of them ends

    def _evict(self, num_bytes: int) -> int:
        """Delete the oldest copies of at least so many bytes in all; how many bytes went."""
        with locked(self.folder / LOCK):
            before = self.num_bytes()
            self._shrink(before - num_bytes)
            return before - self.num_bytes()

    def _shrink(self, most: int) -> bool:
        """Delete the copies not read for longest until at most so many bytes are left; whether that could be done."""
        copies, total = [], 0
        for path, size in self._files():
            total += size
            with suppress(FileNotFoundError):
                copies.append((path.stat().st_mtime_ns, size, path))
        for _, size, path in sorted(copies):
            if total <= most:
                break
            if path.name.endswith(PARTIAL) and is_claimed(path.with_name(path.name.removesuffix(PARTIAL) + CLAIM)):
                continue
            with suppress(FileNotFoundError):
                path.unlink()
            total -= size
        return total <= most

    def num_bytes(self) -> int:
        """Bytes of all copies, those being fetched in full."""
        return sum(size for _, size in self._files())

    def _files(self) -> Iterable[tuple[Path, int]]:
        """Each copy once, also one that is renamed while this looks."""
        found = {}
        for path in (self.folder / COPIES).glob("??/*"):
            name = path.name.removesuffix(PARTIAL)
            if (size := name.rpartition(".")[2]).isdigit():
                found[name] = (path, int(size))
        return found.values()

    def _no_room(self, wanted: Wanted) -> NoRoom:
        free = shutil.disk_usage(self.folder).free
        return NoRoom(
            f"data.cache_dir {self.folder}: no room for {shown(wanted.address)}, {wanted.bytes} bytes are needed and "
            f"{free} free; free some space, or name another folder"
        )


def touch(descriptor: int) -> None:
    """Mark a copy as just read; one that may not be marked goes a little earlier."""
    with suppress(OSError):
        os.utime(descriptor)


def is_deleted(descriptor: int) -> bool:
    """Whether an open copy had to give way: its bytes stay on disk for as long as it is held."""
    return os.fstat(descriptor).st_nlink == 0


def _open_copy(place: Path, size: int) -> int | None:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if os.fstat(descriptor).st_size == size:
        return descriptor
    os.close(descriptor)
    with suppress(FileNotFoundError):
        place.unlink()  # somebody cut it
    return None
