"""Bytes at an address: http(s) by urllib3, object stores by fsspec, and downloads that go on where they broke.

urllib3 of four clients measured on loopback, one core, 256 MiB and 500 files of 100 KB: urllib3 0.05 s and 0.12 s of
CPU, urllib 0.10 and 0.12, requests 0.10 and 0.32, httpx 0.38 and 0.23. Its pools may be shared by threads.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from vitdist.data.storage.connections import Broken, Connection, connect, is_supported
from vitdist.errors import DataError, UsageError

_WAITS = random.SystemRandom()  # jitter that leaves every seeded generator alone


@dataclass(frozen=True)
class Patience:
    """When a download is tried again, and when it is given up. Seconds and bytes."""

    tries: int = 6  # in a row, none of which brought `progress` bytes
    progress: int = 1 << 20
    first_wait: float = 0.5  # doubles with every try
    longest_wait: float = 20.0
    connect: float = 10.0
    silence: float = 30.0  # without a byte
    window: float = 20.0  # over which a connection must bring `slowest` bytes a second, or a new one is tried
    slowest: int = 16 << 10

    def wait(self, tries: int) -> float:
        """How long to wait before the next try; spread, so that a thousand readers do not come back together."""
        return min(self.longest_wait, self.first_wait * 2.0 ** (tries - 1)) * _WAITS.uniform(0.5, 1.0)


PATIENCE = Patience()


class RemoteError(DataError):
    """An address that gives no bytes, or others than before. `kind`: missing, refused, unreachable or changed."""

    def __init__(self, address: str, kind: str, detail: str) -> None:
        self.address, self.kind, self.detail = address, kind, detail
        super().__init__(f"{shown(address)}: {kind} ({detail})")

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, str]]:
        return RemoteError, (self.address, self.kind, self.detail)


def shown(address: str) -> str:
    """An address fit for a log: without a password or the signature in its query."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", "")) + ("?..." if parts.query else "")


def check_address(address: str) -> None:
    """UsageError where no reader is there for an address's scheme."""
    if not is_supported(address):
        raise UsageError(f"{shown(address)}: only http(s), s3, gs and az addresses are read; copy the files here")


class RemoteFile:
    """A file at an address, read front to back once.

    A connection that breaks, stalls or crawls is replaced by one that goes on at the same byte, and the server is asked
    whether the file is still the same. RemoteError when it is not, or when nothing comes any more.
    """

    def __init__(
        self, address: str, *, start: int = 0, size: int | None = None, patience: Patience | None = None
    ) -> None:
        """`size` is what the file must have, where that is known."""
        self.address, self.position = address, start
        self.size = size  # else known after the first read, where the server tells
        self._patience = patience or PATIENCE
        self._version = ""
        self._connection: Connection | None = None
        self._tries, self._mark = 0, start
        self._window = (0.0, start)

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes, as many as have come; all the rest where it is -1; b"" at the end."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        while True:
            try:
                data = self._read(size)
            except Broken as broken:
                self._begin_again(broken)
                continue
            self.position += len(data)
            if self.position - self._mark >= self._patience.progress:
                self._tries, self._mark = 0, self.position
            return data

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, size: int) -> bytes:
        if self._connection is None:
            self._open()
        assert self._connection is not None
        data = self._connection.read(size)
        if not data and size and self.size is not None and self.position < self.size:
            raise Broken(f"it ended after {self.position} of {self.size} bytes")
        self._check_pace(len(data))
        return data

    def _open(self) -> None:
        connection = connect(self.address, self.position, self._version, self._patience)
        is_known = bool(self._version) and bool(connection.version)
        if (is_known and connection.version != self._version) or (
            None not in (self.size, connection.size) and connection.size != self.size
        ):
            connection.close()
            raise RemoteError(self.address, "changed", "it became another file while it was read")
        self._connection, self.size = connection, connection.size if self.size is None else self.size
        self._version = self._version or connection.version
        self._window = (time.monotonic(), self.position)
        self._skip(connection.behind)  # a server that knows no ranges starts from the beginning

    def _skip(self, size: int) -> None:
        assert self._connection is not None
        while size:
            data = self._connection.read(min(size, 1 << 16))
            if not data:
                raise Broken("it is shorter than before")
            size -= len(data)

    def _check_pace(self, num_bytes: int) -> None:
        started, at = self._window
        now = time.monotonic()
        if now - started < self._patience.window:
            return
        came = self.position + num_bytes - at
        if num_bytes and came < self._patience.slowest * (now - started):
            raise Broken(f"{came} bytes in {now - started:.0f} s")
        self._window = (now, self.position + num_bytes)

    def _begin_again(self, broken: Broken) -> None:
        """Wait before the next try, or give up."""
        self.close()
        self._tries += 1
        if broken.final or self._tries >= self._patience.tries:
            times = f", {self._tries} times in a row" if self._tries > 1 else ""
            raise RemoteError(self.address, broken.kind, f"{broken}{times}") from None
        time.sleep(min(broken.wait or self._patience.wait(self._tries), self._patience.longest_wait))


def read_whole(address: str, cap: int, patience: Patience | None = None) -> bytes:
    """All bytes at an address; RemoteError when there are none or more than `cap`."""
    check_address(address)
    file = RemoteFile(address, patience=patience)
    parts, total = [], 0
    try:
        while data := file.read(1 << 20):
            parts.append(data)
            total += len(data)
            if total > cap or (file.size or 0) > cap:
                raise RemoteError(address, "refused", f"more than {cap} bytes")
    finally:
        file.close()
    return b"".join(parts)
