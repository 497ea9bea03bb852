"""Class folders: layouts, trees, splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vitdist.data.packing.pack import Packing, pack
from vitdist.data.packing.verify import verify
from vitdist.data.sources.folder import FolderSet, read_folder
from vitdist.data.sources.trees import read_tree
from vitdist.errors import DataError, UsageError


def layout(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".JPG", ".png", ".webp", ".jpeg"):
            Image.new("RGB", (8, 8), number).save(path, {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG"))
        else:
            path.write_text("x")
    return root


def found(folder: FolderSet) -> dict[str, tuple[str, dict[str, str]]]:
    return {str(s.details["path"]): (s.split, dict(s.labels)) for s in folder.samples}


def classes(names: str, number: int, prefix: str = "") -> list[str]:
    return [f"{prefix}{name}/{position}.jpg" for name in names.split() for position in range(number)]


def test_split_folders_are_splits(tmp_path: Path) -> None:
    names = [*classes("cat dog", 3, "train/"), *classes("cat dog", 2, "validation/"), *classes("dog", 1, "test/")]
    folder = read_folder(layout(tmp_path, *names))
    assert Counter(sample.split for sample in folder.samples) == {"train": 6, "val": 4, "test": 1}
    assert folder.taxonomy.levels == ("class",) and folder.taxonomy.names == (("cat", "dog"),)
    index = pack(folder.samples, folder.taxonomy, tmp_path.with_name("packed"), Packing("f"))
    assert list(index.splits) == ["train", "val", "test"] and verify(index.root) == []


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folder = read_folder(layout(tmp_path, *classes("train car", 5)))
    assert folder.taxonomy.names == (("car", "train"),)


def test_a_test_split_is_drawn_by_class(tmp_path: Path) -> None:
    layout(tmp_path, *classes("a", 20), *classes("b", 7), *classes("c", 2), *classes("d", 1))
    folder = read_folder(tmp_path)
    counts = Counter((sample.labels["class"], sample.split) for sample in folder.samples)
    expected = {("a", "train"): 16, ("a", "test"): 4, ("b", "train"): 6, ("b", "test"): 1}
    assert counts == {**expected, ("c", "train"): 1, ("c", "test"): 1, ("d", "train"): 1}
    assert any("6 of 30 drawn by class with seed 0" in note for note in folder.notes)
    assert found(read_folder(tmp_path)) == found(folder)
    assert found(read_folder(tmp_path, seed=1)) != found(folder)
    assert {s.split for s in read_folder(tmp_path, test_fraction=0).samples} == {"train"}
    with pytest.raises(UsageError, match="test-fraction"):
        read_folder(tmp_path, test_fraction=1.0)


def test_folders_in_folders_are_a_tree(tmp_path: Path) -> None:
    layout(tmp_path, *classes("gulls/herring gulls/laughing", 0), *classes("gulls/herring terns/common", 2))
    folder = read_folder(tmp_path)
    assert folder.taxonomy.levels == ("group", "class")
    assert folder.taxonomy.names == (("gulls", "terns"), ("common", "herring"))
    named = read_folder(tmp_path, levels=["family", "species"])
    assert dict(named.samples[0].labels) == {"family": "gulls", "species": "herring"}
    assert read_folder(tmp_path, levels=["class"]).taxonomy.names == (("gulls", "terns"),)
    with pytest.raises(DataError, match="2 folders deep, but --levels names 3"):
        read_folder(tmp_path, levels=["a", "b", "c"])


@pytest.mark.parametrize(
    "names",
    [
        ["cat/left/1.jpg", "cat/right/1.jpg", "dog/left/1.jpg", "dog/right/1.jpg"],  # no tree: left twice
        ["cat/1.jpg", "dog/left/1.jpg"],  # of unequal depth
    ],
)
def test_what_is_no_tree_has_the_first_folder_as_class(tmp_path: Path, names: list[str]) -> None:
    folder = read_folder(layout(tmp_path, *names))
    assert folder.taxonomy.levels == ("class",) and folder.taxonomy.names == (("cat", "dog"),)
    assert "deeper folders are no level" in folder.notes[0]


def test_a_taxonomy_gives_the_tree(tmp_path: Path) -> None:
    csv = tmp_path / "tree.csv"
    csv.write_text("family,species\nGulls,herring\nGulls,laughing\nTerns,common\n")
    source = layout(tmp_path / "set", *classes("herring common Gulls", 3))
    folder = read_folder(source, taxonomy=read_tree(csv))
    assert folder.taxonomy.names == (("Gulls", "Terns"), ("common", "herring"))
    assert {tuple(sample.labels.items()) for sample in folder.samples} == {
        (("family", "Gulls"), ("species", "herring")),
        (("family", "Terns"), ("species", "common")),
        (("family", "Gulls"),),  # known to the family only, and kept as that
    }
    index = pack(folder.samples, folder.taxonomy, tmp_path / "packed", Packing("f"))
    assert sorted(set(index.split("train").samples["label"].tolist())) == [0, 2, 3]
    with pytest.raises(DataError, match="no class named 'puffin'"):
        read_folder(layout(source, "puffin/1.jpg"), taxonomy=read_tree(csv))


def test_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    layout(
        tmp_path,
        "a/1.jpg",
        "a/2.JPG",
        "a/3.png",
        "a/4.webp",
        "a/5.jpeg",
        "a/6.bmp",
        "a/list.txt",
        "a/.x.jpg",
        ".b/1.jpg",
    )
    folder = read_folder(tmp_path)
    assert len(folder.samples) == 5 and folder.notes[0].startswith("2 files that are no")


def test_keys_are_safe_unique_and_stay(tmp_path: Path) -> None:
    layout(tmp_path, "a b/IMG.2021.jpg", "c/IMG.2021.jpg", "c/grün é.jpg", "c/+.jpg")
    keys = {str(s.details["path"]): s.key for s in read_folder(tmp_path).samples}
    assert len(set(keys.values())) == 4 and all(
        "." not in key and "/" not in key and key.isascii() for key in keys.values()
    )
    layout(tmp_path, "a b/0.jpg")
    assert keys.items() <= {str(s.details["path"]): s.key for s in read_folder(tmp_path).samples}.items()


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    layout(tmp_path / "set", "a/1.jpg", "b/1.jpg")
    (tmp_path / "set" / "c").symlink_to(layout(tmp_path / "elsewhere", "1.jpg", "2.jpg"))
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    assert sorted(found(read_folder(tmp_path / "set"))) == ["a/1.jpg", "b/1.jpg", "c/1.jpg", "c/2.jpg"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no .jpg"),
        (["1.jpg"], "1.jpg lies in no class folder"),
        (["train/1.jpg", "train/a/1.jpg"], "train/1.jpg"),
    ],
)
def test_what_has_no_classes_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_folder(layout(tmp_path, *names))


def test_classes_only_in_test_are_said(tmp_path: Path) -> None:
    folder = read_folder(layout(tmp_path, "train/a/1.jpg", "test/b/1.jpg"))
    assert any("test has 1 classes that train has not: b" in note for note in folder.notes)


@pytest.mark.parametrize("text", ["", "\n", "a,b\nx\n", "family,species\nG,x\nH,x\n", "\xff\xfe"])
def test_a_csv_that_is_no_tree_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError):
        read_tree(tmp_path / "t.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_tree(tmp_path / "none.csv")
