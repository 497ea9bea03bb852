"""The tar header reader: agrees with tarfile on sound archives, and names what is wrong with every other."""

from __future__ import annotations

import io
import os
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.tiny import scan_shard
from vitdist.data.storage.tar import (
    BLOCK,
    MAX_HEADER_BLOCKS,
    MAX_LONG,
    DamagedShard,
    parse_header,
    usual_name,
)

NAMES = [
    "a.jpg",
    "folder/IMG.2021.jpg",
    "p" * 99 + ".jpg",
    "/".join(["deep"] * 40) + "/x.json",
    "n" * 300 + ".png",
    "vogel/Grünfink é.jpg",
]


def archive(path: Path, form: int, entries: list[tuple[str, bytes]], mtime: float = 0) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path


def sound(path: Path) -> Path:
    entries = [(f"{number:03d}.{suffix}", bytes([number]) * 700) for number in range(8) for suffix in ("jpg", "json")]
    return archive(path, tarfile.USTAR_FORMAT, entries)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1234567.25])
def test_agrees_with_tarfile(tmp_path: Path, form: int, mtime: float) -> None:
    entries = [(name, os.urandom(size)) for name, size in zip(NAMES, (0, 1, 511, 512, 513, 70_000), strict=True)]
    path = archive(tmp_path / "a.tar", form, entries, mtime)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in tar.getmembers()]
    members = list(scan_shard(path))
    assert [(m.name, m.start, m.offset, m.length) for m in members] == expected
    data = path.read_bytes()
    assert [data[m.offset : m.offset + m.length] for m in members] == [content for _, content in entries]
    for member in members:  # what read_key does: the headers alone give the same member
        assert (member.offset - member.start) // BLOCK <= MAX_HEADER_BLOCKS
        assert parse_header(data[member.start : member.offset], "a", member.start) == member


def test_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "set" / "inner").mkdir(parents=True)
    (tmp_path / "set" / "inner" / "a.jpg").write_bytes(b"1234")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    assert [member.name for member in scan_shard(tmp_path / "a.tar")] == ["set/inner/a.jpg"]


def cut_at(position: int) -> Callable[[bytearray], None]:
    def damage(data: bytearray) -> None:
        del data[position:]

    return damage


def flip(position: int) -> Callable[[bytearray], None]:
    def damage(data: bytearray) -> None:
        data[position] ^= 4

    return damage


def put(position: int, what: bytes) -> Callable[[bytearray], None]:
    def damage(data: bytearray) -> None:
        data[position : position + len(what)] = what

    return damage


def header(offset: int, *, size: bytes | None = None, kind: bytes | None = None) -> Callable[[bytearray], None]:
    """Change fields of the header at `offset` and make its checksum right again."""

    def damage(data: bytearray) -> None:
        block = data[offset : offset + BLOCK]
        block[124:136] = size or block[124:136]
        block[156:157] = kind or block[156:157]
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        data[offset : offset + BLOCK] = block

    return damage


EIGHT_GIB = b"\x80" + (8 << 30).to_bytes(11, "big")
HUGE = b"\x80" + b"\xff" * 11
MEMBER = 3 * BLOCK  # header and 700 bytes in two blocks
DAMAGES: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "cut at a sample boundary": (cut_at(4 * MEMBER), "cut"),
    "cut between members": (cut_at(3 * MEMBER), "cut"),
    "cut inside a header": (cut_at(4 * MEMBER + 100), "cut"),
    "cut inside data": (cut_at(4 * MEMBER + BLOCK + 100), "cut"),
    "cut inside padding": (cut_at(5 * MEMBER - 1), "cut"),
    "cut after half of the end mark": (cut_at(16 * MEMBER + BLOCK), "cut"),
    "flipped name": (flip(4 * MEMBER + 2), "header"),
    "flipped size": (flip(4 * MEMBER + 130), "header"),
    "flipped checksum": (flip(4 * MEMBER + 150), "header"),
    "zeroed header": (put(4 * MEMBER, bytes(BLOCK)), "zeroed"),
    "zeroed member": (put(4 * MEMBER, bytes(MEMBER)), "zeroed"),
    "size that is no number": (header(4 * MEMBER, size=b"12x4567\0    "), "header"),
    "8 GiB in octal": (header(4 * MEMBER, size=b"77777777777\0"), "cut"),
    "8 GiB in base 256": (header(4 * MEMBER, size=EIGHT_GIB), "cut"),
    "2^88 bytes": (header(4 * MEMBER, size=HUGE), "cut"),
    "pax header of 8 GiB": (header(4 * MEMBER, size=EIGHT_GIB, kind=b"x"), "header"),
    "long name of 8 GiB": (header(4 * MEMBER, size=EIGHT_GIB, kind=b"L"), "header"),
    "global header of 65 KiB": (header(4 * MEMBER, size=b"%011o\0" % (MAX_LONG + 1), kind=b"g"), "header"),
    "pax header of nonsense": (header(4 * MEMBER, kind=b"x"), "header"),
    "hard link": (header(4 * MEMBER, kind=b"1"), "entry"),
    "symbolic link": (header(4 * MEMBER, kind=b"2"), "entry"),
    "character device": (header(4 * MEMBER, kind=b"3"), "entry"),
    "block device": (header(4 * MEMBER, kind=b"4"), "entry"),
    "pipe": (header(4 * MEMBER, kind=b"6"), "entry"),
    "sparse file": (header(4 * MEMBER, kind=b"S"), "entry"),
    "empty": (cut_at(0), "cut"),
    "html": (put(0, b"<html>" + b"x" * 600), "header"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named(tmp_path: Path, what: str) -> None:
    path = sound(tmp_path / "a.tar")
    damage, kind = DAMAGES[what]
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(DamagedShard) as caught:
        list(scan_shard(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.kind == kind
    assert str(path) in str(caught.value) and caught.value.exit_code == 4
    assert time.monotonic() - started < 2 and peak < 4 << 20


@pytest.mark.parametrize("record", [b"30 path=x\n", b"x path=y\n", b"9 path=\xff", b"27 GNU.sparse.name=a.jpg\n\n\n"])
def test_broken_pax_records_are_damage(tmp_path: Path, record: bytes) -> None:
    path = archive(tmp_path / "a.tar", tarfile.PAX_FORMAT, [("n" * 200 + ".jpg", b"1")])
    data = bytearray(path.read_bytes())
    put(BLOCK, record + b"\0" * 40)(data)
    path.write_bytes(data)
    with pytest.raises(DamagedShard, match="header"):
        list(scan_shard(path))


def test_extended_headers_without_end_are_damage(tmp_path: Path) -> None:
    one = archive(tmp_path / "a.tar", tarfile.PAX_FORMAT, [("n" * 200 + ".jpg", b"1")]).read_bytes()
    (tmp_path / "b.tar").write_bytes(one[: 2 * BLOCK] * 1000 + one)
    with pytest.raises(DamagedShard, match="more than 3 extended headers"):
        list(scan_shard(tmp_path / "b.tar"))


def test_a_zero_tail_beyond_any_padding_is_damage(tmp_path: Path) -> None:
    path = sound(tmp_path / "a.tar")
    with open(path, "ab") as file:
        file.truncate(path.stat().st_size + (2 << 20))
    with pytest.raises(DamagedShard, match="zero bytes at the end"):
        list(scan_shard(path))


def test_a_header_that_is_not_the_rows_is_damage(tmp_path: Path) -> None:
    data = sound(tmp_path / "a.tar").read_bytes()
    for wrong in (data[:100], data[BLOCK : 2 * BLOCK], data[: 2 * BLOCK], b""):
        with pytest.raises(DamagedShard):
            parse_header(wrong)


def test_the_quick_look_never_sees_what_the_whole_reader_does_not(tmp_path: Path) -> None:
    """Every single bit of a header turned, with its checksum as it was and put right: the same name, or None."""
    block = sound(tmp_path / "a.tar").read_bytes()[:BLOCK]
    assert usual_name(block, 700) == "000.jpg" and usual_name(block, 701) is None
    for bit in range(8 * BLOCK):
        turned = bytearray(block)
        turned[bit // 8] ^= 1 << bit % 8
        assert usual_name(bytes(turned), 700) is None, bit
        turned[148:156] = b" " * 8
        turned[148:156] = b"%06o\0 " % sum(turned)
        name = usual_name(bytes(turned), 700)
        if name is not None:
            member = parse_header(bytes(turned))
            assert (member.name, member.length) == (name, 700)
