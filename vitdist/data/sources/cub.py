"""Reads CUB-200-2011 in its official layout, from a folder or the .tgz, and trusts no list without its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vitdist.data.sources.archive import read_tgz
from vitdist.data.sources.photograph import FileSlice, SourceSample, whole_file
from vitdist.data.sources.trees import tree_of
from vitdist.data.storage.keys import plain
from vitdist.errors import DataError
from vitdist.taxonomy import Taxonomy, cub

LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "classes.txt")
NUM_IMAGES = 11_788
NUM_TRAIN = 5_994
MAX_LIST = 64 << 20
Files = Mapping[str, FileSlice]
"""Path below the CUB folder ('images.txt', 'images/001.X/a.jpg') -> bytes."""


@dataclass(frozen=True)
class Entry:
    """One line of each of the lists, joined."""

    number: int
    path: str
    class_name: str
    is_train: bool
    box: tuple[float, ...]


def read_cub(
    source: str | Path, *, taxonomy: Taxonomy | None = None, spool: Path | None = None
) -> tuple[Taxonomy, list[SourceSample]]:
    """The class tree and the photographs of a CUB folder or .tgz; DataError naming the first thing that disagrees.

    The tree is CUB's own where `taxonomy` is not given, restricted to the classes that are there. From an archive the
    photographs are copied into the one file `spool` (required then), which must live until they have been read.
    """
    source = Path(source)
    files = _folder_files(source) if source.is_dir() else _archive_files(source, spool)
    entries = _join(files, str(source))
    _check_files(entries, files, str(source))
    tree = restrict(taxonomy or cub(), {entry.class_name for entry in entries}, given=taxonomy is not None)
    _check_complete(entries, str(source))
    return tree, [_sample(entry, files, tree) for entry in entries]


def _sample(entry: Entry, files: Files, tree: Taxonomy) -> SourceSample:
    labels = tree.path_names(tree.node(tree.levels[-1], entry.class_name))
    details = {"id": entry.number, "class": entry.class_name, "path": entry.path, "box": entry.box}
    split = "train" if entry.is_train else "test"
    key = f"{entry.number:05d}_{plain(PurePosixPath(entry.path).stem)}"
    return SourceSample(key, split, labels, files[f"images/{entry.path}"], entry.path, details=details)


def restrict(tree: Taxonomy, classes: set[str], *, given: bool) -> Taxonomy:
    """The part of a tree that leads to `classes`; DataError naming one that is no finest class of the tree."""
    missing = sorted(classes - set(tree.names[-1]))
    if missing:
        whose = "the class tree given" if given else "CUB's class tree"
        raise DataError(
            f"{len(missing)} classes are not in {whose}, {missing[0]!r} the first of them; give one that has them: "
            "--taxonomy CSV"
        )
    paths = [tree.path_names(tree.node(tree.levels[-1], name)) for name in sorted(classes)]
    return tree_of(tree.levels, paths)


def _folder_files(root: Path) -> dict[str, FileSlice]:
    if not (root / "images.txt").is_file():
        nested = root / "CUB_200_2011"
        if not (nested / "images.txt").is_file():
            raise DataError(f"{root} is no CUB folder (no images.txt); give the folder that has it, or the .tgz")
        root = nested
    files = {name: whole_file(root / name) for name in LISTS if (root / name).is_file()}
    images = root / "images"
    for path in sorted(images.rglob("*")) if images.is_dir() else ():
        if not path.name.startswith(".") and path.is_file():
            files[path.relative_to(root).as_posix()] = whole_file(path)
    return files


def _archive_files(source: Path, spool: Path | None) -> dict[str, FileSlice]:
    if not source.is_file():
        raise DataError(f"{source} does not exist; give the CUB_200_2011 folder or CUB_200_2011.tgz")
    assert spool is not None, "an archive needs a spool file"

    def wanted(name: str) -> str | None:
        parts = [part for part in PurePosixPath(name).parts if part != "."]
        if parts[:1] == ["CUB_200_2011"]:
            parts = parts[1:]
        is_ours = "/".join(parts) in LISTS or (parts[:1] == ["images"] and not parts[-1].startswith("."))
        return "/".join(parts) if is_ours else None

    return read_tgz(source, spool, wanted)


def _join(files: Files, where: str) -> list[Entry]:
    """The five lists as entries in the order of ids; DataError when one misses an id that another has."""
    classes = _table(files, "classes.txt", where)
    paths = _table(files, "images.txt", where)
    labels = _table(files, "image_class_labels.txt", where)
    flags = _table(files, "train_test_split.txt", where)
    boxes = _table(files, "bounding_boxes.txt", where)
    for name, table in (("image_class_labels", labels), ("train_test_split", flags), ("bounding_boxes", boxes)):
        _check_ids(paths, table, f"{name}.txt", where)
    entries = []
    for number, path in sorted(paths.items()):
        label = int(_number(labels[number], int, f"{where}/image_class_labels.txt", number))
        if label not in classes:
            raise DataError(f"{where}: image {number} has class {label}, which classes.txt does not have")
        if flags[number] not in ("0", "1"):
            raise DataError(f"{where}/train_test_split.txt: image {number} has {flags[number]!r} where 0 or 1 belongs")
        box = tuple(_number(v, float, f"{where}/bounding_boxes.txt", number) for v in boxes[number].split())
        if len(box) != 4:
            raise DataError(f"{where}/bounding_boxes.txt: image {number} has {len(box)} numbers, not x y width height")
        entries.append(Entry(number, path, classes[label], flags[number] == "1", box))
    return entries


def _table(files: Files, name: str, where: str) -> dict[int, str]:
    """Lines of "ID REST" as {id: rest}; DataError for a line that is none, or an id that comes twice."""
    if name not in files:
        raise DataError(f"{where}: {name} is missing; take the whole of CUB_200_2011")
    if files[name].num_bytes > MAX_LIST:
        raise DataError(f"{where}/{name} has {files[name].num_bytes} bytes, more than {MAX_LIST}")
    table: dict[int, str] = {}
    for line_number, line in enumerate(files[name].read().decode("utf-8", "replace").splitlines(), 1):
        number, _, rest = line.strip().partition(" ")
        if not line.strip():
            continue
        if not (number.isascii() and number.isdigit() and rest):
            raise DataError(f"{where}/{name}:{line_number}: {line.strip()[:80]!r} is no line of the form 'ID VALUE'")
        if int(number) in table:
            raise DataError(f"{where}/{name}:{line_number}: id {number} is listed twice")
        table[int(number)] = rest.strip()
    return table


def _number(text: str, kind: type[int] | type[float], name: str, image: int) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise DataError(f"{name}: image {image} has {text!r} where a number belongs") from None
    if not abs(value) < 1e9:
        raise DataError(f"{name}: image {image} has {text!r}, which is out of range")
    return value


def _check_ids(paths: Mapping[int, str], table: Mapping[int, str], name: str, where: str) -> None:
    missing, extra = sorted(paths.keys() - table.keys()), sorted(table.keys() - paths.keys())
    if missing:
        raise DataError(f"{where}/{name} has no line for image {missing[0]} ({paths[missing[0]]}){_more(missing)}")
    if extra:
        raise DataError(f"{where}/{name} has a line for image {extra[0]}, which images.txt does not have{_more(extra)}")


def _check_files(entries: list[Entry], files: Files, where: str) -> None:
    """Every listed image is there once, in the folder of its class, and nothing else is."""
    for path, count in Counter(entry.path for entry in entries).items():
        if count > 1:
            raise DataError(f"{where}/images.txt lists {path} {count} times")
    for entry in entries:
        if PurePosixPath(entry.path).parts[0] != entry.class_name:
            raise DataError(
                f"{where}: image {entry.number} lies in {entry.path}, but its label says {entry.class_name}"
            )
    there = {name.removeprefix("images/") for name in files if name.startswith("images/")}
    listed = {entry.path for entry in entries}
    if missing := sorted(listed - there):
        raise DataError(f"{where}: images/{missing[0]} is listed in images.txt but is missing{_more(missing)}")
    if extra := sorted(there - listed):
        raise DataError(f"{where}: images/{extra[0]} is there but not listed in images.txt{_more(extra)}")


def _check_complete(entries: list[Entry], where: str) -> None:
    """Where all of CUB's 200 classes are there, all of its images must be."""
    num_train = sum(entry.is_train for entry in entries)
    if {entry.class_name for entry in entries} != set(cub().names[-1]):
        return
    if (len(entries), num_train) != (NUM_IMAGES, NUM_TRAIN):
        raise DataError(
            f"{where} has all 200 classes but {len(entries)} images, {num_train} of them for training; "
            f"CUB-200-2011 has {NUM_IMAGES} and {NUM_TRAIN}; take the whole of it"
        )


def _more(names: list[str] | list[int]) -> str:
    return f", and {len(names) - 1} more like it" if len(names) > 1 else ""
