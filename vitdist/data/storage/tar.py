"""A tar header reader for bytes nobody vouches for: bounded, strict, and unable to write or run anything.

Shards come from strangers and from failing disks, and `tarfile` ends silently where an archive is cut or a header is
zeroed. Here whatever is not a regular member behind a sound header is damage with a name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from vitdist.errors import DataError

BLOCK = 512
MAX_LONG = 64 * 1024  # bytes of a pax or GNU long-name header
MAX_EXTRAS = 3  # such headers before one member: a global, a pax or long name, a long link
MAX_HEADER_BLOCKS = 1 + MAX_EXTRAS * (1 + MAX_LONG // BLOCK)
MAX_TAIL = 1 << 20  # zero bytes a writer may pad an archive with: GNU tar's largest usual record
_ZERO = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_OTHER = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a block device", b"6": "a pipe"}


class DamagedShard(DataError):
    """A tar file that cannot be trusted from `offset` on; `kind` is one of a small set of words for counting."""

    def __init__(self, shard: str, kind: str, offset: int, detail: str) -> None:
        self.shard, self.kind, self.offset, self.detail = shard, kind, offset, detail
        super().__init__(f"{shard}: {kind} at byte {offset}: {detail}")

    def __reduce__(self) -> tuple[type[DamagedShard], tuple[str, str, int, str]]:
        return DamagedShard, (self.shard, self.kind, self.offset, self.detail)


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file in a tar: its first header block at `start`, its bytes at [offset, offset + length)."""

    name: str
    start: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Where the next member's header begins."""
        return self.offset + -(-self.length // BLOCK) * BLOCK


class Source(Protocol):
    """What a tar is read from: a file, or a decompressing stream that can only seek forward."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...


def scan(file: Source, shard: str, size: int | None = None, *, pass_over: bool = False) -> Iterator[Member]:
    """Members of a tar; the bytes of the one just yielded may be read from `file`, which stands at their beginning.

    `size` is the file's length, None for a stream whose length shows only at its end. Links and devices are damage,
    or never followed but passed over where an archive may hold some.
    """
    position = 0
    while True:
        entry = _Entry(shard, position, pass_over)
        found = entry.read(file)
        if found is None:
            _check_tail(file, shard, position)
            return
        member, is_file = found
        if size is not None and member.offset + member.length > size:
            raise DamagedShard(shard, "cut", member.start, f"{member.name!r} ends beyond the end of the file")
        if is_file:
            yield member
        position = member.end
        reached = file.seek(position)
        if reached < position or (size is not None and position > size):
            raise DamagedShard(shard, "cut", member.start, f"the file ends inside {member.name!r}")


def parse_header(header: bytes, shard: str = "shard", start: int = 0) -> Member:
    """The one member whose header blocks (extensions included) are `header`; DamagedShard when they are not."""
    found = _Entry(shard, start).read(_Bytes(header))
    if found is None or not found[1] or found[0].offset - start != len(header):
        raise DamagedShard(shard, "header", start, "no regular member begins and ends its header here")
    return found[0]


def usual_name(block: bytes, length: int) -> str | None:
    """The name in a usual header block of a regular member of `length` bytes; None where parse_header has to look.

    What it accepts parse_header accepts with the same result, in a third of its time: readers ask for every sample.
    """
    is_usual = (
        len(block) == BLOCK
        and block[156:157] == b"0"
        and block[345:346] == b"\0"
        and block[124:136] == b"%011o\0" % length
    )
    total = _sum(block[:148]) + 8 * 32 + _sum(block[156:345]) + _sum(block[345:])
    return _text(block[:100]) if is_usual and block[148:156] == b"%06o\0 " % total else None


class _Bytes:
    """Header bytes in memory as a Source."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def read(self, size: int = -1, /) -> bytes:
        piece = self.data[self.position : self.position + size]
        self.position += len(piece)
        return piece

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.position = offset
        return offset


class _Entry:
    """The header blocks of one member: extensions (long names, pax records) first, its own last."""

    def __init__(self, shard: str, start: int, pass_over: bool = False) -> None:
        self.shard, self.start, self.position, self.pass_over = shard, start, start, pass_over
        self.long_name: str | None = None
        self.long_size: int | None = None

    def damage(self, kind: str, detail: str) -> DamagedShard:
        return DamagedShard(self.shard, kind, self.position, detail)

    def read(self, file: Source) -> tuple[Member, bool] | None:
        """(member, is it a file), or None at the end-of-archive block; folders are the only other entries."""
        for num_extras in range(MAX_EXTRAS + 1):
            block = file.read(BLOCK)
            if len(block) < BLOCK:
                raise self.damage("cut", "the file ends without an end-of-archive block")
            if block == _ZERO:
                if num_extras:
                    raise self.damage("header", "an extended header is followed by nothing")
                return None
            size, kind = self._check(block)
            self.position += BLOCK
            if kind not in (b"x", b"g", b"L", b"K"):
                return self._member(block, size, kind)
            self._extend(self._payload(file, size), kind)
        raise self.damage("header", f"more than {MAX_EXTRAS} extended headers before one member")

    def _check(self, block: bytes) -> tuple[int, bytes]:
        """(size, type) of a header block whose checksum holds."""
        stated = self._number(block[148:156], "checksum")
        rest = block[:148] + b" " * 8 + block[156:]
        total = _sum(rest[:256]) + _sum(rest[256:])
        # some old tars summed signed characters; asked second, for it costs as much as all the rest of a header
        if stated != total and stated != total - 256 * sum(byte > 127 for byte in rest):
            raise self.damage("header", "its checksum is wrong")
        return self._number(block[124:136], "size"), block[156:157]

    def _number(self, field: bytes, what: str) -> int:
        """A header number: octal digits, or base 256 as GNU tar writes sizes from 8 GiB on."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.split(b"\0", 1)[0].strip(b" ")
        if not digits or digits.translate(None, b"01234567"):
            raise self.damage("header", f"its {what} is no number")
        return int(digits, 8)

    def _payload(self, file: Source, size: int) -> bytes:
        if size > MAX_LONG:
            raise self.damage("header", f"an extended header of {size} bytes (at most {MAX_LONG} are read)")
        padded = -(-size // BLOCK) * BLOCK
        data = file.read(padded)
        if len(data) < padded:
            raise self.damage("cut", "the file ends inside an extended header")
        self.position += padded
        return data[:size]

    def _extend(self, data: bytes, kind: bytes) -> None:
        if kind == b"L":
            self.long_name = _text(data)
        elif kind == b"x":
            records = self._records(data)
            if "path" in records:
                self.long_name = _text(records["path"])
            if "size" in records:
                self.long_size = self._number_of(records["size"])
        elif kind == b"g" and {"path", "size"} & set(self._records(data)):
            raise self.damage("header", "a global header that renames or resizes every member")

    def _records(self, data: bytes) -> dict[str, bytes]:
        """pax records, each "LENGTH KEY=VALUE\\n"."""
        records: dict[str, bytes] = {}
        while data:
            digits, space, _ = data.partition(b" ")
            length = self._number_of(digits) if space else 0
            if not len(digits) + 2 < length <= len(data) or data[length - 1 : length] != b"\n":
                raise self.damage("header", "a pax record that is none")
            key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
            if not equals or key.startswith(b"GNU.sparse"):
                raise self.damage("header", "a sparse file or a pax record without a value")
            records[key.decode("utf-8", "replace")] = value
            data = data[length:]
        return records

    def _number_of(self, digits: bytes) -> int:
        if not digits.isdigit() or len(digits) > 19:
            raise self.damage("header", "a pax record with a number that is none")
        return int(digits)

    def _member(self, block: bytes, size: int, kind: bytes) -> tuple[Member, bool]:
        name = self.long_name if self.long_name is not None else _short_name(block)
        size = size if self.long_size is None else self.long_size
        folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if self.pass_over and kind in _OTHER:
            return Member(name, self.start, self.position, 0), False
        if not folder and kind not in _REGULAR:
            what = _OTHER.get(kind, f"an entry of type {kind!r}")
            raise self.damage("entry", f"{name!r} is {what}; only files and folders are read")
        return Member(name, self.start, self.position, 0 if folder else size), not folder


def _sum(data: bytes) -> int:
    """The sum of up to 256 bytes: the low half of their adler32 less one, a twentieth of what sum() takes."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _short_name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _check_tail(file: Source | BinaryIO, shard: str, position: int) -> None:
    """After the first zero block only zeros may follow: a zeroed header would otherwise hide the rest of the shard."""
    length = BLOCK
    while chunk := file.read(64 * 1024):
        length += len(chunk)
        if chunk.count(0) != len(chunk):
            raise DamagedShard(shard, "zeroed", position, "zeros where a header belongs, with data behind them")
        if length > MAX_TAIL:
            raise DamagedShard(shard, "zeroed", position, f"more than {MAX_TAIL} zero bytes at the end")
    if length < 2 * BLOCK:
        raise DamagedShard(shard, "cut", position, "the end-of-archive mark is cut")
