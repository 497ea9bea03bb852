"""Shards as others write them: found labels, places, splits; and what is refused."""

from __future__ import annotations

import functools
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from vitdist.data.index import DatasetIndex, load_index, read_key
from vitdist.data.packing.foreign import expand, index_foreign, split_of
from vitdist.data.packing.labels import LabelReader
from vitdist.data.packing.verify import verify
from vitdist.data.sources.trees import read_tree
from vitdist.data.storage.remote import Patience
from vitdist.errors import DataError, UsageError


def jpeg(number: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), number).save(out, "JPEG")
    return out.getvalue()


def shard(path: Path, *samples: dict[str, Any]) -> Path:
    """A shard as webdataset's own writer makes it (its own encoder, time stamps and all)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for number, sample in enumerate(samples):
            tar.write({"__key__": f"{number:05d}", "jpg": jpeg(number), **sample})
    return path


def labels(index: DatasetIndex, split: str = "train") -> list[dict[str, str]]:
    return [index.taxonomy.path_names(int(node)) for node in index.split(split).samples["label"]]


def index_of(out: Path, *addresses: str | Path, **reading: Any) -> DatasetIndex:
    return index_foreign([str(address) for address in addresses], out, LabelReader(**reading)).index


def test_jpg_and_cls(tmp_path: Path) -> None:
    shard(tmp_path / "data-train-000.tar", {"cls": 3}, {"cls": 0})
    shard(tmp_path / "data-train-001.tar", {"cls": 12})
    shard(tmp_path / "data-val-000.tar", {"cls": 1})
    found = index_foreign([str(tmp_path)], tmp_path / "out", LabelReader())
    index = found.index
    assert index.split("train").samples["label"].tolist() == [
        3,
        0,
        12,
    ]  # the class index is the number that was written
    assert index.split("val").samples["label"].tolist() == [1]
    assert index.taxonomy.num_classes == (13,) and "class numbers" in found.notes[0]
    assert verify(tmp_path / "out") == []
    rows = index.split("train").samples
    with open(index.split("train").shard_file(1), "rb") as file:
        assert read_key(file.fileno(), rows[2]) == "00000"
        file.seek(int(rows[2]["offset"]))
        assert file.read(int(rows[2]["length"])) == jpeg()


def test_class_names_for_numbers(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"cls": 1}, {"cls": 0})
    index = index_of(tmp_path / "out", tmp_path / "a.tar", class_names=["zebra", "ape"])
    assert index.taxonomy.names == (("zebra", "ape"),)
    assert labels(index) == [{"class": "ape"}, {"class": "zebra"}]
    with pytest.raises(DataError, match=r"sample '00000'.*class number 1 is out of range \(1 classes\)"):
        index_of(tmp_path / "out2", tmp_path / "a.tar", class_names=["zebra"])


@pytest.mark.parametrize("key", ["label", "class_name", "species"])
def test_jpg_and_json_with_a_known_key(tmp_path: Path, key: str) -> None:
    shard(tmp_path / "a.tar", {"json": {"url": "x", key: "wren"}}, {"json": {key: "auk"}})
    index = index_of(tmp_path / "out", tmp_path / "a.tar")
    assert index.taxonomy.names == (("auk", "wren"),) and labels(index) == [{"class": "wren"}, {"class": "auk"}]


def test_a_key_that_has_to_be_named(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"json": {"bird": "wren", "caption": "a bird"}})
    with pytest.raises(DataError, match="no label found: its json has bird, caption; name the key with --label-key"):
        index_of(tmp_path / "out", tmp_path / "a.tar")
    assert not (tmp_path / "out").exists()
    assert labels(index_of(tmp_path / "out", tmp_path / "a.tar", where="bird")) == [{"class": "wren"}]


def test_levels_in_json_may_end_early(tmp_path: Path) -> None:
    shard(
        tmp_path / "a.tar",
        {"json": {"family": "Gulls", "species": "herring", "nest": "n1"}},
        {"json": {"family": "Gulls", "nest": "n2"}},
        {"json": {"family": "Terns", "species": "", "nest": "n1"}},
    )
    index = index_of(tmp_path / "out", tmp_path / "a.tar", levels=["family", "species"], group_key="nest")
    assert index.taxonomy.names == (("Gulls", "Terns"), ("herring",))
    assert labels(index) == [{"family": "Gulls", "species": "herring"}, {"family": "Gulls"}, {"family": "Terns"}]
    assert index.split("train").samples["group"].tolist() == [0, 1, 0] and index.split("train").num_groups == 2


def test_a_taxonomy_gives_the_tree(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("family,species\nGulls,herring\nTerns,common\n")
    tree = read_tree(tmp_path / "t.csv")
    shard(tmp_path / "a.tar", {"json": {"label": "common"}}, {"json": {"label": "Gulls"}})
    assert labels(index_of(tmp_path / "out", tmp_path / "a.tar", taxonomy=tree)) == [
        {"family": "Terns", "species": "common"},
        {"family": "Gulls"},
    ]
    shard(tmp_path / "b.tar", {"json": {"label": "puffin"}})
    with pytest.raises(DataError, match="no class named 'puffin'"):
        index_of(tmp_path / "out2", tmp_path / "b.tar", taxonomy=tree)
    shard(tmp_path / "c.tar", {"cls": 1})
    with pytest.raises(UsageError, match="--classes FILE"):
        index_of(tmp_path / "out3", tmp_path / "c.tar", taxonomy=tree)


BAD_LABELS: dict[str, dict[str, Any]] = {
    "none": {},
    "no integer": {"cls": b"x7"},
    "negative": {"cls": b"-1"},
    "huge": {"cls": b"99999999999999999999"},
    "beyond the cap": {"cls": b"1000000"},
    "empty": {"cls": b""},
    "not text": {"cls": b"\xff\xfe\x00"},
}


@pytest.mark.parametrize("what", BAD_LABELS)
def test_a_label_that_is_none_is_named_or_left_out(tmp_path: Path, what: str) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "good", "jpg": jpeg(), "cls": b"2"})
        tar.write({"__key__": "bad", "jpg": jpeg(), **BAD_LABELS[what]})
    with pytest.raises(DataError, match=r"a\.tar: sample 'bad': its? .*label|a\.tar: sample 'bad': .*"):
        index_of(tmp_path / "out", tmp_path / "a.tar")
    found = index_foreign([str(tmp_path / "a.tar")], tmp_path / "out", LabelReader(), skip_bad=True)
    assert found.index.split("train").num_samples == 1 and len(found.skipped) == 1 and "'bad'" in found.skipped[0]
    assert verify(tmp_path / "out") == [] and found.index.preparation["skipped"] == 1


def test_damaged_shards_are_named_or_left_out(tmp_path: Path) -> None:
    good = shard(tmp_path / "a.tar", {"cls": 0})
    cut = shard(tmp_path / "b.tar", {"cls": 1}, {"cls": 1})
    cut.write_bytes(cut.read_bytes()[:2048])
    with pytest.raises(DataError, match=r"b\.tar: cut"):
        index_of(tmp_path / "out", good, cut)
    found = index_foreign([str(good), str(cut)], tmp_path / "out", LabelReader(), skip_bad=True)
    assert [s.path for s in found.index.split("train").shards] == [str(good)] and "b.tar: cut" in found.skipped[0]


def test_hostile_members_do_nothing(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {
            "../../evil.jpg": jpeg(),
            "../../evil.cls": b"1",
            "../../evil.pyd": b"cos\nsystem\n(S'touch evil'\ntR.",
            "../../evil.pickle.gz": b"\x1f\x8bxx",
            "/tmp/evil.jpg": jpeg(),
            "/tmp/evil.json": json.dumps({"label": 1}).encode(),
            "/tmp/evil.cls": b"1",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = index_of(tmp_path / "out", tmp_path / "a.tar")
    assert index.split("train").num_samples == 2
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "a.tar",
        "out/index.json",
        "out/train/samples.bin",
    ]


def test_json_as_deep_as_can_be_is_a_bad_label(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "deep", "jpg": jpeg(), "json": b"[" * 200_000})
    with pytest.raises(DataError, match="sample 'deep': its json is none"):
        index_of(tmp_path / "out", tmp_path / "a.tar")


@pytest.mark.parametrize(("suffix", "size"), [("jpg", 257 << 20), ("json", (1 << 20) + 1)])
def test_a_member_over_the_cap_is_damage(tmp_path: Path, suffix: str, size: int) -> None:
    info = tarfile.TarInfo(f"a.{suffix}")
    info.size = size
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + (size + 511) // 512 * 512 + 1024)
    with pytest.raises(DataError, match=f"too large .*{size} bytes"):
        index_of(tmp_path / "out", tmp_path / "a.tar")


def test_a_second_image_in_a_sample_is_damage(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"png": b"x", "cls": 0})
    with pytest.raises(DataError, match="second image"):
        index_of(tmp_path / "out", tmp_path / "a.tar")


def test_samples_without_an_image_and_other_members_are_passed_over(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "text", "txt": b"x", "cls": b"1"})
        tar.write({"__key__": "all", "jpg": jpeg(), "cls": b"1", "seg.png": b"x", "mask.jpg": b"y"})
    found = index_foreign([str(tmp_path / "a.tar")], tmp_path / "out", LabelReader())
    assert found.index.split("train").num_samples == 1 and any(
        note.startswith("1 samples without") for note in found.notes
    )


def test_patterns_and_splits(tmp_path: Path) -> None:
    for name in ("train/000.tar", "train/001.tar", "validation-7.tar", "x.tar", "notest.tar"):
        shard(tmp_path / name, {"cls": 0})
    base = str(tmp_path)
    assert expand([f"{base}/train/{{000..001}}.tar"]) == [("train", f"{base}/train/00{n}.tar") for n in range(2)]
    assert expand([f"{base}/*.tar"]) == [
        ("train", f"{base}/notest.tar"),
        ("val", f"{base}/validation-7.tar"),
        ("train", f"{base}/x.tar"),
    ]
    assert expand([f"test={base}/x.tar"]) == [("test", f"{base}/x.tar")]
    assert split_of("https://h/imagenet-val-000001.tar?x=1") == "val" and split_of("test_set/b.tar") == "train"
    assert split_of("test/b.tar") == "test" and split_of("test/train-0.tar") == "train"
    with pytest.raises(UsageError, match="given 2 times"):
        expand([f"{base}/x.tar", f"{base}/*.tar"])
    with pytest.raises(DataError, match="does not exist"):
        expand([f"{base}/y.tar"])
    for address in ("pipe:touch evil", "ftp://host/a.tar", f"{base}/{{a"):
        with pytest.raises((UsageError, DataError)):
            expand([address])
    assert not (tmp_path / "evil").exists()


def test_shards_below_the_index_are_relative_and_move_with_it(tmp_path: Path) -> None:
    shard(tmp_path / "set" / "a.tar", {"cls": 0})
    index = index_of(tmp_path / "set", tmp_path / "set" / "a.tar")
    assert index.split("train").shards[0].path == "a.tar"
    os.rename(tmp_path / "set", tmp_path / "moved")
    assert verify(tmp_path / "moved") == [] and load_index(tmp_path / "moved").hash == index.hash


def test_another_index_is_not_overwritten_unasked(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a.tar", {"cls": 0}), shard(tmp_path / "b.tar", {"cls": 0}, {"cls": 1})
    index = index_of(tmp_path / "out", one)
    assert index_of(tmp_path / "out", one).hash == index.hash
    with pytest.raises(UsageError, match="--overwrite"):
        index_of(tmp_path / "out", two)
    assert verify(tmp_path / "out") == []
    new = index_foreign([str(two)], tmp_path / "out", LabelReader(), overwrite=True).index
    assert new.hash != index.hash and verify(tmp_path / "out") == []


def test_compressed_shards_are_refused_with_the_reason(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar.gz", {"cls": 0})
    with pytest.raises(DataError, match="decompress it first"):
        index_of(tmp_path / "out", tmp_path / "a.tar.gz")


class Handler(SimpleHTTPRequestHandler):
    """A file server that cuts what is called cut.tar in the middle."""

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read()[: 2000 if "cut" in self.path else None])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "www").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_indexed_in_one_download(tmp_path: Path, served: str) -> None:
    for number in range(2):
        shard(tmp_path / "www" / f"train-{number}.tar", {"cls": number}, {"cls": 5})
    index = index_of(tmp_path / "out", f"{served}/train-{{0..1}}.tar")
    local = index_of(tmp_path / "local", tmp_path / "www")
    assert np.array_equal(index.split("train").samples, local.split("train").samples)
    assert [s.path for s in index.split("train").shards] == [f"{served}/train-{n}.tar" for n in range(2)]
    assert [s.sha256 for s in index.split("train").shards] == [s.sha256 for s in local.split("train").shards]
    index.split("train").check_shards()


def test_a_download_that_fails_is_one_line(tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdist.data.storage.remote.PATIENCE", Patience(tries=3, first_wait=0.01))
    shard(tmp_path / "www" / "cut.tar", {"cls": 0}, {"cls": 1})
    with pytest.raises(DataError, match=r"cut.tar: unreachable \(.*3 times in a row"):
        index_of(tmp_path / "out", f"{served}/cut.tar")
    with pytest.raises(DataError, match=r"none.tar: missing \(status 404\)"):
        index_of(tmp_path / "out", f"{served}/none.tar")
    assert not (tmp_path / "out").exists()
