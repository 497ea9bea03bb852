"""CUB's lists and files must agree, and every way in which they do not is named."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.tiny import draw, tiny_cub, tiny_taxonomy
from vitdist.data.sources.cub import NUM_IMAGES, NUM_TRAIN, read_cub
from vitdist.errors import DataError
from vitdist.taxonomy import Taxonomy, cub

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "CUB_200_2011"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_cub(tmp_path / "CUB_200_2011", num_classes=6, train_per_class=3, test_per_class=2)


def edit(source: Path, name: str, change: Callable[[list[str]], None]) -> None:
    path = source / f"{name}.txt"
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")


def drop(name: str, line: int) -> Callable[[Path], None]:
    return lambda source: edit(source, name, lambda lines: lines.__delitem__(line))


def both(first: Callable[[Path], object], second: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda source: (first(source), second(source))


def replace(name: str, line: int, text: str) -> Callable[[Path], None]:
    return lambda source: edit(source, name, lambda lines: lines.__setitem__(line, text))


def add(name: str, text: str) -> Callable[[Path], None]:
    return lambda source: edit(source, name, lambda lines: lines.append(text))


FIRST = "001.Tiny_001/Tiny_001_0000.jpg"
DISAGREEMENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "image missing": (
        lambda s: (s / "images" / FIRST).unlink(),
        rf"images/{FIRST} is listed in images.txt but is missing",
    ),
    "image extra": (lambda s: (s / "images" / "001.Tiny_001" / "x.jpg").touch(), r"x.jpg is there but not listed"),
    "class folder extra": (
        both(lambda s: (s / "images" / "new").mkdir(), lambda s: (s / "images" / "new" / "x.jpg").touch()),
        "new/x.jpg",
    ),
    "image listed twice": (add("images", f"99 {FIRST}"), "no line for image 99"),
    "path listed twice": (replace("images", 1, f"2 {FIRST}"), rf"images.txt lists {FIRST} 2 times"),
    "id listed twice": (add("images", f"1 {FIRST}"), r"images.txt:31: id 1 is listed twice"),
    "no images": (lambda s: (s / "images").rename(s / "pictures"), "is listed in images.txt but is missing"),
    "label of another class": (
        replace("image_class_labels", 0, "1 2"),
        r"image 1 lies in 001\.Tiny.*says 002\.Tiny_002",
    ),
    "label unknown": (
        replace("image_class_labels", 0, "1 77"),
        "image 1 has class 77, which classes.txt does not have",
    ),
    "label missing": (drop("image_class_labels", 4), r"image_class_labels.txt has no line for image 5 \("),
    "label that is none": (replace("image_class_labels", 0, "1 one"), "image 1 has 'one' where a number belongs"),
    "flag missing": (drop("train_test_split", 2), r"train_test_split.txt has no line for image 3 \("),
    "two flags missing": (
        both(drop("train_test_split", 2), drop("train_test_split", 2)),
        "and 1 more",
    ),
    "flag extra": (add("train_test_split", "99 1"), "train_test_split.txt has a line for image 99"),
    "flag that is none": (replace("train_test_split", 2, "3 2"), "image 3 has '2' where 0 or 1 belongs"),
    "box missing": (drop("bounding_boxes", 7), r"bounding_boxes.txt has no line for image 8 \("),
    "box with three numbers": (replace("bounding_boxes", 7, "8 1 2 3"), "image 8 has 3 numbers"),
    "box that is none": (replace("bounding_boxes", 7, "8 1 2 3 x"), "image 8 has 'x' where a number belongs"),
    "box not finite": (replace("bounding_boxes", 7, "8 1 2 3 nan"), "out of range"),
    "list missing": (lambda s: (s / "bounding_boxes.txt").unlink(), "bounding_boxes.txt is missing"),
    "flags file missing": (lambda s: (s / "train_test_split.txt").unlink(), "train_test_split.txt is missing"),
    "line that is none": (add("classes", "seven"), r"classes.txt:7: 'seven' is no line"),
    "not text": (lambda s: (s / "images.txt").write_bytes(b"\x89PNG\0\xff"), r"images.txt:1: .* is no line"),
    "empty": (lambda s: (s / "images.txt").write_text(""), "has a line for image 1"),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_a_disagreement_is_named(source: Path, what: str) -> None:
    damage, message = DISAGREEMENTS[what]
    damage(source)
    with pytest.raises(DataError, match=message) as caught:
        read_cub(source, taxonomy=tiny_taxonomy(source))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_split_labels_and_boxes_are_the_lists(source: Path) -> None:
    tree, samples = read_cub(source, taxonomy=tiny_taxonomy(source))
    assert [sample.split for sample in samples] == (["train"] * 3 + ["test"] * 2) * 6
    assert tree.num_classes == (1, 2, 6)
    assert samples[0].details == {"id": 1, "class": "001.Tiny_001", "path": FIRST, "box": (2.0, 2.0, 28.0, 28.0)}
    assert samples[-1].labels == {"order": "Order00", "family": "Family001", "species": "006.Tiny_006"}


def test_ids_need_not_follow_each_other_and_classes_may_be_few(source: Path) -> None:
    for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes"):
        edit(
            source,
            name,
            lambda lines: lines.__setitem__(
                slice(None), [f"{7 * i + 3}{line[line.index(' ') :]}" for i, line in enumerate(lines) if i < 10]
            ),
        )
    for number in range(3, 7):
        folder = source / "images" / f"{number:03d}.Tiny_{number:03d}"
        for path in folder.iterdir():
            path.unlink()
    tree, samples = read_cub(source, taxonomy=tiny_taxonomy(source))
    assert [sample.details["id"] for sample in samples] == [7 * i + 3 for i in range(10)]
    assert tree.names[-1] == ("001.Tiny_001", "002.Tiny_002") and tree.num_classes == (1, 1, 2)


def test_classes_outside_the_tree_are_named(source: Path) -> None:
    with pytest.raises(DataError, match="6 classes are not in CUB's class tree, '001.Tiny_001' .*--taxonomy CSV"):
        read_cub(source)


def full_cub(path: Path, num_images: int) -> Path:
    """A folder with CUB's own 200 class names and so many images, all hard links of one."""
    names = sorted(cub().names[-1])
    picture = path / "images" / "one.jpg"
    picture.parent.mkdir(parents=True)
    import numpy as np

    picture.write_bytes(draw(0, 1, 8, np.random.Generator(np.random.PCG64(0))))
    lists: dict[str, list[str]] = {
        name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")
    }
    for number in range(num_images):
        name = f"{names[number % 200]}/{number}.jpg"
        (path / "images" / name).parent.mkdir(exist_ok=True)
        (path / "images" / name).hardlink_to(picture)
        lists["images"].append(f"{number + 1} {name}")
        lists["image_class_labels"].append(f"{number + 1} {number % 200 + 1}")
        lists["train_test_split"].append(f"{number + 1} {int(number < NUM_TRAIN)}")
        lists["bounding_boxes"].append(f"{number + 1} 0 0 8 8")
    picture.unlink()
    lists["classes"] = [f"{number + 1} {name}" for number, name in enumerate(names)]
    for name, lines in lists.items():
        (path / f"{name}.txt").write_text("\n".join(lines))
    return path


def test_all_200_classes_must_have_all_images(tmp_path: Path) -> None:
    tree, samples = read_cub(full_cub(tmp_path / "whole", NUM_IMAGES))
    assert (len(samples), tree.num_classes) == (11_788, (13, 37, 121, 200))
    assert tree == Taxonomy(cub().levels, cub().names, cub().parents)
    with pytest.raises(DataError, match="all 200 classes but 11787 images, 5994 of them for training"):
        read_cub(full_cub(tmp_path / "less", NUM_IMAGES - 1))


def tgz(
    source: Path, path: Path, prefix: str = "CUB_200_2011/", extra: Callable[[tarfile.TarFile], None] | None = None
) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("attributes.txt"), io.BytesIO(b""))
        for file in sorted(source.rglob("*"), reverse=True):
            tar.add(file, prefix + file.relative_to(source).as_posix(), recursive=False)
        if extra:
            extra(tar)
    return path


@pytest.mark.parametrize("prefix", ["CUB_200_2011/", "./CUB_200_2011/", ""])
def test_the_archive_gives_what_the_folder_gives(source: Path, tmp_path: Path, prefix: str) -> None:
    tree = tiny_taxonomy(source)
    folder_tree, from_folder = read_cub(source, taxonomy=tree)
    archive_tree, from_archive = read_cub(
        tgz(source, tmp_path / "a.tgz", prefix), taxonomy=tree, spool=tmp_path / "spool"
    )
    assert archive_tree == folder_tree
    assert [(s.key, s.split, s.labels, s.details) for s in from_archive] == [
        (s.key, s.split, s.labels, s.details) for s in from_folder
    ]
    assert [s.image.read() for s in from_archive] == [s.image.read() for s in from_folder]


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[tarfile.TarFile], None]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return lambda tar: tar.addfile(info, io.BytesIO(b"evil"))


HOSTILE = {
    "above": (member("CUB_200_2011/images/../../../evil.jpg"), "points outside"),
    "absolute": (member("/tmp/evil.jpg"), "points outside"),
    "twice": (member(f"CUB_200_2011/images/{FIRST}"), "twice"),
    "extra": (member("CUB_200_2011/images/001.Tiny_001/evil.jpg"), "not listed"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_writes_nothing_but_the_spool(source: Path, tmp_path: Path, what: str) -> None:
    extra, message = HOSTILE[what]
    path = tgz(source, tmp_path / "a.tgz", extra=extra)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        read_cub(path, taxonomy=tiny_taxonomy(source), spool=tmp_path / "spool")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "spool"])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_an_archive_are_not_followed(source: Path, tmp_path: Path, kind: bytes) -> None:
    extra = member("CUB_200_2011/images/001.Tiny_001/link.jpg", kind, "/etc/passwd")
    _, samples = read_cub(
        tgz(source, tmp_path / "a.tgz", extra=extra), taxonomy=tiny_taxonomy(source), spool=tmp_path / "s"
    )
    assert len(samples) == 30 and not any("link" in sample.key for sample in samples)


@pytest.mark.parametrize("keep", [0, 10, 1_000, 8_000, -30])
def test_a_cut_archive_is_one_line(source: Path, tmp_path: Path, keep: int) -> None:
    path = tgz(source, tmp_path / "a.tgz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError):
        read_cub(path, taxonomy=tiny_taxonomy(source), spool=tmp_path / "spool")


def test_an_archive_of_nonsense_is_one_line(tmp_path: Path) -> None:
    for data in (b"<html>", gzip.compress(b"<html>" * 200), bytes(2000)):
        (tmp_path / "a.tgz").write_bytes(data)
        with pytest.raises(DataError):
            read_cub(tmp_path / "a.tgz", spool=tmp_path / "spool")
    with pytest.raises(DataError, match="does not exist"):
        read_cub(tmp_path / "b.tgz", spool=tmp_path / "spool")
    with pytest.raises(DataError, match="no CUB folder"):
        read_cub(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real photographs are not here")
def test_the_real_photographs(tmp_path: Path) -> None:
    tree, samples = read_cub(REAL)
    splits = [sample.split for sample in samples]
    assert (splits.count("train"), splits.count("test")) == (750, 652)
    assert tree.num_classes == (6, 11, 17, 25)
