"""Reads a .tgz or .tar in one pass without extracting anything: wanted members go into one file of our own name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from vitdist.data.sources.photograph import FileSlice
from vitdist.data.storage.tar import DamagedShard, Member, Source, scan
from vitdist.errors import DataError

CHUNK = 1 << 20
MAX_MEMBER = 256 << 20
GZIP_MAGIC = b"\x1f\x8b"


def read_tgz(source: Path, spool: Path, wanted: Callable[[str], str | None]) -> dict[str, FileSlice]:
    """Copy the members that `wanted` gives a name into the file `spool`; name -> where it lies there.

    No name of the archive ever becomes a path on disk. Links and devices are passed over. DataError for absolute
    names and '..', a name that comes twice, and for an archive that is cut or no archive.
    """
    found: dict[str, FileSlice] = {}
    try:
        with open(source, "rb") as raw, open(spool, "wb") as out:
            is_gzip = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            stream: Source = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            for member in scan(stream, str(source), pass_over=True):
                _check_name(member, source)
                name = wanted(member.name)
                if name is None:
                    continue
                if name in found:
                    raise DataError(f"{source} holds {name} twice")
                found[name] = FileSlice(spool, out.tell(), member.length)
                _copy(stream, out.write, member, source)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source} is cut or damaged ({error}); download it again") from None
    return found


def _check_name(member: Member, source: Path) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{source} holds a member named {member.name!r}, which points outside of it; get it elsewhere")


def _copy(stream: Source, write: Callable[[bytes], object], member: Member, source: Path) -> None:
    if member.length > MAX_MEMBER:
        raise DataError(f"{source}: {member.name!r} has {member.length} bytes, more than {MAX_MEMBER}")
    left = member.length
    while left:
        data = stream.read(min(CHUNK, left))
        if not data:
            raise DamagedShard(str(source), "cut", member.start, f"the archive ends inside {member.name!r}")
        write(data)
        left -= len(data)
