"""Packing: plain WebDataset out, the same bytes for the same photographs, and nothing that is no photograph."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from tests.data.tiny import tiny_cub, tiny_packed, tiny_taxonomy
from vitdist.data.index import DatasetIndex, load_index
from vitdist.data.packing.pack import Packing, pack
from vitdist.data.packing.verify import verify
from vitdist.data.sources.cub import read_cub
from vitdist.data.sources.photograph import FileSlice, SourceSample, whole_file
from vitdist.errors import DataError, ResourceError, UsageError
from vitdist.taxonomy import Taxonomy

PACKING = Packing("tiny")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_cub(tmp_path / "source", num_classes=10, train_per_class=5, test_per_class=2)


@pytest.fixture
def read(source: Path) -> tuple[Taxonomy, list[SourceSample]]:
    return read_cub(source, taxonomy=tiny_taxonomy(source))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def inodes(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def written(root: Path, split: str) -> list[dict[str, object]]:
    shards = [str(path) for path in sorted((root / split).glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def image_file(path: Path, form: str, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Path:
    Image.new(mode, size, 120).save(path, form)
    return path


def sample(path: Path, key: str = "k", split: str = "train", **more: object) -> SourceSample:
    return SourceSample(key, split, {"class": "a"}, whole_file(path), path.name, **more)  # type: ignore[arg-type]


ONE_CLASS = Taxonomy(("class",), (("a",),), ((-1,),))


def test_webdataset_reads_what_was_packed(source: Path, tmp_path: Path) -> None:
    index = tiny_packed(tmp_path / "set", source=source)
    for split in ("train", "test"):
        samples = written(index.root, split)
        assert len(samples) == index.split(split).num_samples
        for item in samples:
            record = json.loads(item["json"])  # type: ignore[arg-type]
            assert item["jpg"] == (source / "images" / record["path"]).read_bytes()
            assert item["__key__"] == f"{record['id']:05d}_{Path(record['path']).stem}"
            assert list(record["labels"]) == ["order", "family", "species"]
            assert record["labels"]["species"] == record["class"] == Path(record["path"]).parent.name
            assert record["box"] == [2.0, 2.0, 28.0, 28.0] and (record["width"], record["height"]) == (32, 32)


def test_packing_twice_gives_the_same_bytes(read: tuple[Taxonomy, list[SourceSample]], tmp_path: Path) -> None:
    tree, samples = read
    pack(samples, tree, tmp_path / "a", PACKING)
    pack(samples[::-1], tree, tmp_path / "b" / "c", PACKING)  # the order of the list must not matter
    assert contents(tmp_path / "a") == contents(tmp_path / "b" / "c")
    pack(samples, tree, tmp_path / "d", dataclasses.replace(PACKING, seed=1))
    assert contents(tmp_path / "a")["train/000000.tar"] != contents(tmp_path / "d")["train/000000.tar"]


def test_shards_hold_many_classes(tmp_path: Path) -> None:
    index = tiny_packed(tmp_path / "set", num_classes=20, train_per_class=20, test_per_class=1)
    split = index.split("train")
    assert len(split.shards) == 24 and {shard.samples for shard in split.shards} == {16, 17}
    for first, last in zip(split.shard_starts, split.shard_starts[1:], strict=False):
        assert len(set(split.samples["label"][first:last])) > 6
    assert len(index.split("test").shards) == 2


def test_shard_bytes_bounds_a_shard(source: Path, tmp_path: Path) -> None:
    index = tiny_packed(tmp_path / "set", source=source, shard_bytes=20_000)
    assert len(index.split("train").shards) > 6
    assert max(shard.bytes for shard in index.split("train").shards) < 40_000


def test_a_suffix_comes_from_the_content(tmp_path: Path) -> None:
    files = [
        image_file(tmp_path / "a.jpg", "PNG"),
        image_file(tmp_path / "b.png", "JPEG", mode="L"),
        image_file(tmp_path / "c.jpeg", "WEBP"),
        image_file(tmp_path / "d.jpg", "JPEG", mode="CMYK"),
    ]
    samples = [sample(path, key=path.stem) for path in files]
    index = pack(samples, ONE_CLASS, tmp_path / "set", PACKING)
    found = {item["__key__"]: set(item) & {"jpg", "png", "webp"} for item in written(tmp_path / "set", "train")}
    assert found == {"a": {"png"}, "b": {"jpg"}, "c": {"webp"}, "d": {"jpg"}}
    assert set(index.split("train").suffixes) == {"jpg", "png", "webp"}
    assert verify(index.root) == []


BAD = {
    "empty": b"",
    "html": b"<html><body>404</body></html>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "gif": b"GIF89a" + bytes(100),
    "cut header": b"\xff\xd8\xff\xe0\x00\x10JF",
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_photograph_is_named(tmp_path: Path, what: str) -> None:
    (tmp_path / "bad.jpg").write_bytes(BAD[what])
    samples = [sample(image_file(tmp_path / "good.jpg", "JPEG"), "good"), sample(tmp_path / "bad.jpg", "bad")]
    with pytest.raises(DataError, match="bad.jpg is .*--on-bad skip"):
        pack(samples, ONE_CLASS, tmp_path / "set", PACKING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jpg", "good.jpg"]
    index = pack(samples, ONE_CLASS, tmp_path / "set", dataclasses.replace(PACKING, skip_bad=True))
    assert index.split("train").num_samples == 1 and index.preparation["skipped"] == 1
    assert "bad.jpg" in json.loads((tmp_path / "set" / "skipped.json").read_text())[0]


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    image_file(tmp_path / "bomb.png", "PNG", size=(13_000, 13_000), mode="1")
    with pytest.raises(DataError, match="13000x13000 pixels|more than"):
        pack([sample(tmp_path / "bomb.png")], ONE_CLASS, tmp_path / "set", PACKING)


def test_short_side_shrinks_the_larger_and_leaves_the_smaller(tmp_path: Path) -> None:
    large, small = image_file(tmp_path / "l.jpg", "JPEG", (900, 600)), image_file(tmp_path / "s.jpg", "JPEG", (90, 60))
    samples = [sample(large, "l", details={"box": (90.0, 60.0, 300.0, 150.0)}), sample(small, "s")]
    pack(samples, ONE_CLASS, tmp_path / "set", dataclasses.replace(PACKING, short_side=100))
    items = {item["__key__"]: item for item in written(tmp_path / "set", "train")}
    assert items["s"]["jpg"] == small.read_bytes()
    shrunk = Image.open(io.BytesIO(items["l"]["jpg"]))  # type: ignore[arg-type]
    assert shrunk.size == (150, 100)
    record = json.loads(items["l"]["json"])  # type: ignore[arg-type]
    assert record["box"] == [15.0, 10.0, 50.0, 25.0] and (record["width"], record["height"]) == (150, 100)


def test_groups_are_numbered_by_name(tmp_path: Path) -> None:
    path = image_file(tmp_path / "a.jpg", "JPEG")
    samples = [sample(path, f"k{n}", group=name) for n, name in enumerate(("nest 2", "nest 1", None, "nest 2"))]
    split = pack(samples, ONE_CLASS, tmp_path / "set", PACKING).split("train")
    assert sorted(split.samples["group"].tolist()) == [-1, 0, 1, 1] and split.num_groups == 2


@pytest.mark.parametrize("keys", [["a.b"], ["x", "x"], [""], ["a/.b"]])
def test_keys_that_could_not_be_told_apart_are_refused(tmp_path: Path, keys: list[str]) -> None:
    path = image_file(tmp_path / "a.jpg", "JPEG")
    with pytest.raises(DataError, match="key"):
        pack([sample(path, key) for key in keys], ONE_CLASS, tmp_path / "set", PACKING)


def test_a_photograph_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = image_file(tmp_path / "a.jpg", "JPEG")
    shorter = SourceSample("k", "train", {"class": "a"}, FileSlice(path, 0, path.stat().st_size + 1), "a.jpg")
    with pytest.raises(DataError, match="became shorter"):
        pack([shorter], ONE_CLASS, tmp_path / "set", PACKING)


def test_the_same_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    index = tiny_packed(tmp_path / "set", source=source)
    before = inodes(index.root)
    assert tiny_packed(tmp_path / "set", source=source).hash == index.hash
    assert inodes(index.root) == before


def test_a_damaged_set_is_replaced_by_the_same(source: Path, tmp_path: Path) -> None:
    index = tiny_packed(tmp_path / "set", source=source)
    shard = tmp_path / "set" / "train" / "000001.tar"
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert verify(index.root)
    tiny_packed(tmp_path / "set", source=source)
    assert verify(index.root) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]


def test_another_set_is_not_overwritten_unasked(
    read: tuple[Taxonomy, list[SourceSample]], source: Path, tmp_path: Path
) -> None:
    tree, samples = read
    index = pack(samples, tree, tmp_path / "set", PACKING)
    other = dataclasses.replace(PACKING, seed=1)
    with pytest.raises(UsageError, match="another packed set.*--overwrite"):
        pack(samples, tree, tmp_path / "set", other)
    assert load_index(tmp_path / "set").hash == index.hash and verify(tmp_path / "set") == []
    pack(samples, tree, tmp_path / "set", other, overwrite=True)
    assert load_index(tmp_path / "set").hash != index.hash and verify(tmp_path / "set") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]


def test_files_of_others_survive_an_overwrite(read: tuple[Taxonomy, list[SourceSample]], tmp_path: Path) -> None:
    tree, samples = read
    pack(samples, tree, tmp_path / "set", PACKING)
    (tmp_path / "set" / "notes.txt").write_text("mine")
    pack(samples, tree, tmp_path / "set", dataclasses.replace(PACKING, seed=1), overwrite=True)
    assert contents(tmp_path / "set.old-1") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("there", ["a file", "a folder of others"])
def test_what_is_no_packed_set_is_left_alone(source: Path, tmp_path: Path, there: str) -> None:
    out = tmp_path / "set"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="set"):
        tiny_packed(out, source=source)
    assert (out if there == "a file" else out / "mine.txt").read_text() == "mine"


def run_limited(source: Path, out: Path, limit: int) -> tuple[int, str]:
    """Pack in a child process whose files may not grow beyond `limit` bytes; (exit code, message)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            tiny_packed(out, source=source)
            os._exit(0)
        except ResourceError as error:
            os.write(write_end, str(error).encode())
            os._exit(error.exit_code)
        finally:
            os._exit(1)
    os.close(write_end)
    status = os.waitpid(child, 0)[1]
    message = os.read(read_end, 10_000).decode()
    os.close(read_end)
    return os.waitstatus_to_exitcode(status), message


@pytest.mark.parametrize("limit", [1, 5_000, 20_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(source: Path, tmp_path: Path, limit: int) -> None:
    code, message = run_limited(source, tmp_path / "set", limit)
    assert code == 7 and str(tmp_path / "set") in message and "bytes written" in message and "free" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    path = image_file(tmp_path / "a.jpg", "JPEG")
    huge = SourceSample("k", "train", {"class": "a"}, FileSlice(path, 0, 1 << 60), "a.jpg")
    with pytest.raises(ResourceError, match=r"\d+ bytes are needed there and \d+ are free"):
        pack([huge], ONE_CLASS, tmp_path / "set", PACKING)


def test_tiny_is_what_tests_were_promised(tmp_path: Path) -> None:
    index: DatasetIndex = tiny_packed(tmp_path / "set")
    assert index.taxonomy.num_classes == (8, 40, 200)
    assert (index.split("train").num_samples, index.split("test").num_samples) == (800, 400)
