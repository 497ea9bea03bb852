"""Reads a shard once, front to back: its samples with their checksums, and the hash of all its bytes."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vitdist.data.index import IMAGE_SUFFIXES
from vitdist.data.storage.keys import split_name
from vitdist.data.storage.remote import RemoteFile, check_address
from vitdist.data.storage.tar import DamagedShard, Member, scan
from vitdist.errors import DataError

MAX_IMAGE = 256 << 20
MAX_TEXT = 1 << 20
TEXT_SUFFIXES = ("json", "cls")


class Readable(Protocol):
    """An open file or a download."""

    def read(self, size: int = -1, /) -> bytes: ...


@dataclass
class Found:
    """One sample of a shard being read: its image, and its small text members by suffix."""

    key: str
    image: Member | None = None
    suffix: str = ""
    checksum: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardContent:
    """What one pass over a shard gave."""

    bytes: int
    sha256: str
    samples: list[Found]
    num_imageless: int = 0


class HashedFile:
    """A file read front to back that hashes every byte it passes; it cannot seek back."""

    def __init__(self, file: Readable) -> None:
        self.file, self.position, self.digest = file, 0, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        while self.position < offset and self.read(min(1 << 20, offset - self.position)):
            pass
        return self.position


def read_shard(path: str | Path) -> ShardContent:
    """Every sample of a tar file with checksums, in one pass; DamagedShard, or DataError when it cannot be opened."""
    try:
        with open(path, "rb") as file:
            return read_stream(file, str(path), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from None


def read_remote(address: str) -> ShardContent:
    """The same from an address; a connection that breaks is replaced."""
    check_address(address)
    file = RemoteFile(address)
    try:
        return read_stream(Whole(file), address)
    finally:
        file.close()


class Whole:
    """A download whose reads are as long as asked, but for the last."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        parts, left = [], size
        while left and (data := self._file.read(left if left > 0 else 1 << 20)):
            parts.append(data)
            left -= len(data) if left > 0 else 0
        return b"".join(parts)


def read_stream(file: Readable, shard: str, size: int | None = None) -> ShardContent:
    """The same for an open file or a download; its length is needed only to see damage earlier."""
    hashed = HashedFile(file)
    found = list(_samples(hashed, shard, size))
    samples = [sample for sample in found if sample.image is not None]
    return ShardContent(hashed.position, hashed.digest.hexdigest(), samples, len(found) - len(samples))


def _samples(file: HashedFile, shard: str, size: int | None) -> Iterator[Found]:
    """Neighbouring members of one key are one sample, as for `webdataset`."""
    current: Found | None = None
    for member in scan(file, shard, size):
        names = split_name(member.name)
        if names is None:
            continue
        key, suffix = names
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Found(key)
        _take(current, suffix, member, file, shard)
    if current is not None:
        yield current


def _take(sample: Found, suffix: str, member: Member, file: HashedFile, shard: str) -> None:
    """Read a member that is one of ours; all others are passed over unread by anything but the hash."""
    if suffix in IMAGE_SUFFIXES:
        if sample.image is not None:
            raise DamagedShard(shard, "twice", member.start, f"{sample.key!r} has a second image, {member.name!r}")
        _check_cap(member, MAX_IMAGE, shard)
        sample.image, sample.suffix = member, suffix
        sample.checksum = zlib.crc32(_whole(file, member, shard))
    elif suffix in TEXT_SUFFIXES:
        _check_cap(member, MAX_TEXT, shard)
        sample.texts[suffix] = _whole(file, member, shard)


def _check_cap(member: Member, cap: int, shard: str) -> None:
    if member.length > cap:
        raise DamagedShard(shard, "too large", member.start, f"{member.name!r} has {member.length} bytes (cap {cap})")


def _whole(file: HashedFile, member: Member, shard: str) -> bytes:
    data = file.read(member.length)
    if len(data) < member.length:
        raise DamagedShard(shard, "cut", member.start, f"the file ends inside {member.name!r}")
    return data
