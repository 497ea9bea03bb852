"""D4: `verify` finds whatever differs from what was packed, and says where."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.tiny import scan_shard, tiny_packed
from vitdist.data.index import DatasetIndex, load_index, render_index
from vitdist.data.packing.verify import verify


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    root = tmp_path_factory.mktemp("verify") / "set"
    index = tiny_packed(root, num_classes=10, train_per_class=5, test_per_class=2)
    for path in root.rglob("*.tar"):
        path.chmod(0o644)
    return index


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def with_change(path: Path, change: Callable[[bytes], bytes], root: Path) -> list[str]:
    """What `verify` says while a file is changed."""
    before = path.read_bytes()
    path.write_bytes(change(before))
    try:
        return verify(root)
    finally:
        path.write_bytes(before)


def find_flips(index: DatasetIndex, num_flips: int) -> int:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    sizes = [path.stat().st_size for path in files(index.root)]
    found = 0
    for _ in range(num_flips):
        path = rng.choices(files(index.root), sizes)[0]
        position, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)

        def flip(data: bytes, position: int = position, bit: int = bit) -> bytes:
            return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]

        problems = with_change(path, flip, index.root)
        assert problems, f"seed {seed}: {path.name} byte {position} bit {bit} was not found"
        found += 1
    return found


def test_finds_random_bit_flips(packed: DatasetIndex) -> None:
    assert verify(packed.root) == []
    assert find_flips(packed, 60) == 60
    assert verify(packed.root) == []


@pytest.mark.slow
def test_finds_1000_of_1000_random_bit_flips(packed: DatasetIndex) -> None:
    assert find_flips(packed, 1000) == 1000


def test_finds_a_flip_in_every_kind_of_file(packed: DatasetIndex) -> None:
    for path in files(packed.root):
        for position in (0, path.stat().st_size // 2, path.stat().st_size - 1):
            problems = with_change(
                path, lambda data, at=position: data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :], packed.root
            )
            assert len(problems) == 1 and (path.name in problems[0]), (path, position, problems)


def test_every_bit_of_the_index_counts(packed: DatasetIndex) -> None:
    path = packed.root / "index.json"
    for position in range(0, path.stat().st_size, 37):
        for bit in (1, 32):
            assert with_change(
                path, lambda data, at=position, by=bit: data[:at] + bytes([data[at] ^ by]) + data[at + 1 :], packed.root
            )


def test_an_index_without_its_own_hash_is_named(packed: DatasetIndex) -> None:
    path = packed.root / "index.json"
    problems = with_change(path, lambda data: data.replace(b'\n "sha256"', b'\n "sha257"'), packed.root)
    assert len(problems) == 1 and "not as vitdist wrote it" in problems[0]


def test_a_changed_image_is_named(packed: DatasetIndex) -> None:
    path = packed.root / "train" / "000001.tar"
    member = [member for member in scan_shard(path) if member.name.endswith(".jpg")][2]
    at = member.offset + member.length - 20  # inside the scan, where a decoder notices nothing
    problems = with_change(path, lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], packed.root)
    assert problems == [f"{path}: {member.name!r} has other bytes than were indexed"]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[:5000], "cut"),
    "grown": (lambda data: data + b"x", "zeroed|sha256"),
    "grown by zeros": (lambda data: data + bytes(512), "another sha256"),
    "empty": (lambda data: b"", "cut"),
    "html": (lambda data: b"<html>" * 1000, "header"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_shard_is_named(packed: DatasetIndex, what: str) -> None:
    change, message = DAMAGES[what]
    path = packed.root / "test" / "000000.tar"
    problems = with_change(path, change, packed.root)
    assert len(problems) == 1 and str(path) in problems[0]
    assert any(word in problems[0] for word in message.split("|"))


def test_a_missing_and_a_swapped_shard_are_named(packed: DatasetIndex) -> None:
    first, second = packed.root / "train" / "000000.tar", packed.root / "train" / "000001.tar"
    aside = packed.root / "aside"
    os.rename(first, aside)
    assert verify(packed.root) == [f"shard {first} cannot be read: No such file or directory"]
    os.rename(second, first)
    os.rename(aside, second)
    problems = verify(packed.root)
    assert len([p for p in problems if str(first) in p]) >= 1 and len([p for p in problems if str(second) in p]) >= 1
    os.rename(first, aside)
    os.rename(second, first)
    os.rename(aside, second)
    assert verify(packed.root) == []


def test_tables_that_contradict_the_shards_are_named(packed: DatasetIndex) -> None:
    import hashlib
    import json

    table, index = packed.root / "train" / "samples.bin", packed.root / "index.json"
    before, text = table.read_bytes(), index.read_bytes()
    rows = bytearray(before)
    rows[32 + 20] ^= 0xFF  # the second row's label
    content = json.loads(text)
    content["splits"]["train"]["table"]["sha256"] = hashlib.sha256(rows).hexdigest()
    table.write_bytes(rows)
    index.write_bytes(render_index(content))
    assert any("label is outside the class tree" in problem for problem in verify(packed.root))
    table.write_bytes(before)
    index.write_bytes(text)
    assert load_index(packed.root).hash == packed.hash


def test_no_set_is_one_problem(tmp_path: Path) -> None:
    assert len(verify(tmp_path)) == 1
