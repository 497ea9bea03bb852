"""The index: what it gives, what it refuses, and that changed bytes of it do not pass."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.tiny import scan_shard, tiny_packed
from vitdist.data.index import INDEX_NAME, SAMPLE_DTYPE, DatasetIndex, load_index, read_key, render_index
from vitdist.data.storage.keys import split_name
from vitdist.data.storage.tar import DamagedShard
from vitdist.errors import DataError


@pytest.fixture
def packed(tmp_path: Path) -> DatasetIndex:
    return tiny_packed(tmp_path / "set", num_classes=10, train_per_class=5, test_per_class=2)


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change index.json as somebody would who makes the file's own hash fit again."""
    content = json.loads((root / INDEX_NAME).read_bytes())
    change(content)
    (root / INDEX_NAME).write_bytes(render_index(content))


def test_rows_lead_to_the_images(packed: DatasetIndex) -> None:
    for split in packed.splits.values():
        assert split.samples.shape == (split.num_samples,) and split.samples.dtype == SAMPLE_DTYPE
        assert SAMPLE_DTYPE.itemsize == 32
        keys = set()
        for number in range(len(split.shards)):
            rows = split.samples[split.shard_starts[number] : split.shard_starts[number + 1]]
            assert (rows["shard"] == number).all() and (np.diff(rows["offset"].astype(np.int64)) > 0).all()
            path = split.shard_file(number)
            images = [m for m in scan_shard(path) if m.name.endswith(".jpg")]
            assert [(m.offset, m.length) for m in images] == [(int(r["offset"]), int(r["length"])) for r in rows]
            fd = os.open(path, os.O_RDONLY)
            keys |= {read_key(fd, row) for row in rows}
            assert {(name + ".jpg") for name in keys} >= {m.name for m in images}
            os.close(fd)
        assert len(keys) == split.num_samples
        assert all(split_name(f"{key}.jpg") == (key, "jpg") for key in keys)


def test_labels_are_nodes_of_the_tree(packed: DatasetIndex) -> None:
    tree, rows = packed.taxonomy, packed.split("train").samples
    species = tree.paths[rows["label"], -1]
    assert np.bincount(species).tolist() == [5] * 10
    assert tree.levels == ("order", "family", "species")


def test_another_key_at_the_place_is_damage(packed: DatasetIndex) -> None:
    split = packed.split("train")
    rows = np.array(split.samples)
    fd = os.open(split.shard_file(0), os.O_RDONLY)
    for column, by in (
        ("offset", 512),
        ("length", 1),
        ("header_blocks", 1),
        ("header_blocks", 40_000),
        ("offset", 1 << 40),
    ):
        row = rows[0].copy()
        row[column] = int(row[column]) + by
        with pytest.raises(DamagedShard):
            read_key(fd, row)
    os.close(fd)


def test_a_split_travels_without_its_map(packed: DatasetIndex) -> None:
    split = packed.split("train")
    expected = np.array(split.samples)
    sent = pickle.dumps(split)
    assert len(sent) < 20_000 and expected.tobytes() not in sent
    assert np.array_equal(pickle.loads(sent).samples, expected)


def test_shards_are_checked_by_size(packed: DatasetIndex) -> None:
    split = packed.split("train")
    split.check_shards()
    path = Path(split.shard_file(2))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"000002.tar has \d+ bytes"):
        split.check_shards()
    path.unlink()
    with pytest.raises(DataError, match="000002.tar cannot be read"):
        split.check_shards()


def test_a_missing_split_names_those_there(packed: DatasetIndex) -> None:
    with pytest.raises(DataError, match="no split 'val'; it has train, test"):
        packed.split("val")


def test_a_folder_without_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no packed set"):
        load_index(tmp_path / "nothing")


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (lambda c: c.update(format=2), "format 2"),
    "no splits": (lambda c: c.pop("splits"), "no index of a packed set"),
    "splits are a list": (lambda c: c.update(splits=[]), "no index of a packed set"),
    "tree": (lambda c: c["taxonomy"]["parents"][1].pop(), "parents"),
    "count": (lambda c: c["splits"]["train"].update(samples=51), "contradicts itself"),
    "negative": (lambda c: c["splits"]["train"]["shards"][0].update(bytes=-1), "contradicts itself"),
    "table size": (lambda c: c["splits"]["train"]["table"].update(bytes=50 * 32 + 1), "contradicts itself"),
    "table missing": (lambda c: c["splits"]["train"]["table"].update(path="x.bin"), "is missing"),
    "a command": (lambda c: c["splits"]["train"]["shards"][0].update(path="pipe:touch x"), "shell command"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_wrong_index_is_refused(packed: DatasetIndex, what: str) -> None:
    change, message = CHANGES[what]
    edit(packed.root, change)
    with pytest.raises(DataError, match=message):
        load_index(packed.root)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"format": NaN}'])
def test_a_file_that_is_no_index_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(text)
    with pytest.raises(DataError):
        load_index(tmp_path)


def test_a_changed_class_name_is_seen(packed: DatasetIndex) -> None:
    path = packed.root / INDEX_NAME
    path.write_bytes(path.read_bytes().replace(b"Family000", b"Family009"))
    with pytest.raises(DataError, match="changed after it was written"):
        load_index(packed.root)


def test_the_index_needs_no_torch() -> None:
    modules = ("index", "storage.tar", "packing.indexing", "packing.verify", "commands")
    imported = ", ".join(f"vitdist.data.{module}" for module in modules)
    code = f"import {imported}, sys; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
