"""Bytes of samples, read at their offsets and checked against the index before anybody looks at them."""

from __future__ import annotations

import errno
import logging
import os
import time
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vitdist.data.index import Split, key_of, read_key
from vitdist.data.storage.cache import is_deleted, touch
from vitdist.data.storage.keys import split_name
from vitdist.data.storage.remote import RemoteError
from vitdist.data.storage.remote_set import needed, wanted_shard
from vitdist.data.storage.shard_content import MAX_IMAGE
from vitdist.data.storage.tar import BLOCK, MAX_HEADER_BLOCKS, DamagedShard, usual_name

MAX_OPEN_FILES = 64
ONE_REQUEST = 1 << 20  # a header is read with its data, and cut off by a copy, up to this length
AGAIN = MAX_OPEN_FILES  # evicted shards that were wanted again before as many others were opened: a cache too small
FORGET = 60.0  # seconds after which a shard that could not be fetched is asked for again


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    """One sample that could not be used, and why. `kind` is one of a few words that counts are kept by."""

    row: int
    shard: str
    offset: int
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"shard {self.shard}, sample {self.row} at byte {self.offset}: {self.kind} ({self.detail})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class DamagedSample(Exception):
    """Raised by `read`; policy (stop or replace) is the caller's."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(str(damage))
        self.damage = damage


class ShardReader:
    """Reads samples of one split by row. Keeps a bounded number of shards open; belongs to one process."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._samples = np.asarray(split.samples)  # no memmap: those make one of each row, twenty times as slow
        self._open: OrderedDict[int, int] = OrderedDict()
        self._is_remote = split.is_remote
        self._failed: dict[int, tuple[float, RemoteError]] = {}
        self._refilled: set[int] = set()
        self._num_opened = self._num_again = 0
        self._evicted: dict[int, int] = {}

    def read(self, row: int) -> bytes:
        """The image's bytes, exactly as indexed; DamagedSample otherwise. ResourceError where a cache has no room."""
        record = self._record(row)
        shard, num_blocks, _, offset, length, _, _, checksum = record.item()
        head = min(num_blocks, MAX_HEADER_BLOCKS) * BLOCK  # read with the data: one request
        start = offset - head
        if start < 0:
            raise self.damaged(row, "index", f"its header would begin {-start} bytes before the shard")
        try:
            header, data = self._member(shard, start, head, length)
            is_whole = zlib.crc32(data) == checksum
            if not is_whole and self._is_remote and self._refill(shard):
                header, data = self._member(shard, start, head, length)
                is_whole = zlib.crc32(data) == checksum
        except RemoteError as error:
            raise self.damaged(row, error.kind, error.detail) from None
        except OverflowError:
            raise self.damaged(row, "index", f"no file has a byte {start}") from None
        except OSError as error:
            raise self.damaged(row, "unreadable", error.strerror or str(error)) from None
        if len(data) != length:
            raise self.damaged(row, "truncated", f"{len(data)} of {length} bytes are there")
        if not is_whole:
            raise self.damaged(row, "checksum", "these are not the bytes that were indexed")
        self._check_header(row, header, record, length)
        return data

    def key(self, row: int) -> str:
        """The sample's key as its tar header has it; DamagedSample when the header is not the row's."""
        record = self._record(row)
        try:
            return read_key(self._file(int(record["shard"])), record)
        except (OSError, OverflowError, DamagedShard, RemoteError) as error:
            raise self.damaged(row, "header", str(error)) from None

    def _record(self, row: int) -> np.void:
        """A row of the table, which may be a stranger's."""
        record: np.void = self._samples[row]
        shard, _, _, _, length, *_ = record.item()
        if shard >= len(self._split.shards):
            raise self.damaged(row, "index", f"it names shard {shard} of {len(self._split.shards)}")
        if length > MAX_IMAGE:
            raise self.damaged(row, "too large", f"{length} bytes (cap {MAX_IMAGE})")
        return record

    def damaged(self, row: int, kind: str, detail: str) -> DamagedSample:
        """The record of a damage at a row, ready to raise."""
        record, shards = self._samples[row], self._split.shards
        shard = shards[record["shard"]].path if record["shard"] < len(shards) else self._split.table.path
        return DamagedSample(Damage(row, shard, int(record["offset"]), kind, detail))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    __del__ = close  # a loader that ended keeps no shard open in its process

    def _member(self, shard: int, start: int, head: int, length: int) -> tuple[bytes, bytes]:
        """(header blocks, image) of a member, as far as the file goes."""
        if length > ONE_REQUEST:
            return self._pread(shard, head, start), self._pread(shard, length, start + head)
        found = self._pread(shard, head + length, start)
        return found[:head], found[head:]

    def _check_header(self, row: int, header: bytes, record: np.void, length: int) -> None:
        name = usual_name(header, length)
        if name is not None and split_name(name) is not None:
            return
        try:
            key_of(header, record)
        except DamagedShard as error:
            raise self.damaged(row, "header", error.detail) from None

    def _pread(self, shard: int, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._file(shard), length, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # network file systems answer EIO once when a server fails over: open anew and ask again
            os.close(self._open.pop(shard))
            return os.pread(self._file(shard), length, offset)

    def _file(self, shard: int) -> int:
        descriptor = self._open.get(shard)
        if descriptor is None:
            descriptor = self._open_shard(shard)
            # a block of the plan needs all of a shard soon: let the kernel read it ahead, front to back
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            self._open[shard] = descriptor
            if len(self._open) > MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(shard)
            if self._is_remote:
                touch(descriptor)  # the cache lets those go that were not read for longest
        return descriptor

    def _open_shard(self, shard: int) -> int:
        wanted = wanted_shard(self._split, shard) if self._is_remote else None
        if wanted is None:
            # a pipe in a shard's place would be waited for
            return os.open(self._split.shard_file(shard), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._let_go_of_evicted(shard)
        until, failure = self._failed.get(shard, (0.0, None))
        if failure is not None and time.monotonic() < until:
            raise failure
        try:
            return needed(self._split.cache, wanted.address).open(wanted)
        except RemoteError as error:
            self._failed[shard] = (time.monotonic() + FORGET, error)
            raise

    def _let_go_of_evicted(self, wanted: int) -> None:
        """Close copies that had to give way, and say so once when they are wanted again right after that."""
        for number in [number for number, descriptor in self._open.items() if is_deleted(descriptor)]:
            os.close(self._open.pop(number))
            self._evicted[number] = self._num_opened
        self._num_opened += 1
        self._num_again += self._num_opened - self._evicted.pop(wanted, -AGAIN) < AGAIN
        if self._num_again == AGAIN:
            log.warning("data.cache_size is smaller than what is read at once: shards are fetched again and again")

    def _refill(self, shard: int) -> bool:
        """Fetch a copy whose bytes went bad on this node once more; False where that was done, or it is no copy."""
        wanted = wanted_shard(self._split, shard)
        if wanted is None or self._split.cache is None or shard in self._refilled:
            return False
        self._refilled.add(shard)
        self._split.cache.drop(wanted)
        os.close(self._open.pop(shard))
        return True
