"""Reads one folder per class, as torchvision's ImageFolder does, with or without train/, val/ and test/ above them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitdist.data.sources.draw import TEST_FRACTION, digest_of, draw_test, unseen_classes
from vitdist.data.sources.photograph import SourceSample, whole_file
from vitdist.data.sources.trees import is_tree, labels_by_name, tree_of
from vitdist.data.storage.keys import plain
from vitdist.errors import DataError, UsageError
from vitdist.taxonomy import Taxonomy

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class FolderSet:
    """What was found, and in `notes` what was decided about it, a line each."""

    taxonomy: Taxonomy
    samples: list[SourceSample]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    path: Path
    split: str | None
    folders: tuple[str, ...]


def read_folder(
    source: str | Path,
    *,
    taxonomy: Taxonomy | None = None,
    levels: Sequence[str] | None = None,
    test_fraction: float = TEST_FRACTION,
    seed: int = 0,
) -> FolderSet:
    """The photographs below a folder and the tree of their classes; DataError when they lie in no class folder.

    Folders of equal depth whose names have one parent each are a tree (family/species/a.jpg), named by `levels`; else
    the first folder is the class. `taxonomy` takes the last folder as the class and gives the tree itself. Without
    split folders a test split is drawn, stratified by class, the same for the same seed and files.
    """
    source = Path(source)
    if not 0 <= test_fraction < 1:
        raise UsageError(f"--test-fraction {test_fraction} is not in [0, 1)")
    files, notes = _find(source)
    if taxonomy is None:
        labels, tree, note = _labels_of_folders(files, levels)
        notes.append(note)
    else:
        labels, tree = _labels_of_tree(files, taxonomy, source)
    splits = [file.split or "" for file in files]
    if files[0].split is None:
        names = [file.path.relative_to(source).as_posix() for file in files]
        splits = draw_test(names, labels, fraction=test_fraction, seed=seed)
        drawn = f"test: {splits.count('test')} of {len(files)} drawn by class with seed {seed}"
        notes.append(f"no train/ and test/ folders; {drawn} (--test-fraction {test_fraction})")
    notes += unseen_classes(splits, labels)
    return FolderSet(tree, [_sample(*item, source) for item in zip(files, splits, labels, strict=True)], notes)


def _sample(file: _File, split: str, labels: dict[str, str], source: Path) -> SourceSample:
    path = file.path.relative_to(source).as_posix()
    key = f"{plain(file.path.stem)}-{digest_of(path)[:12]}"
    details = {"path": path, "class": list(labels.values())[-1]}
    return SourceSample(key, split, labels, whole_file(file.path), str(file.path), details=details)


def _find(source: Path) -> tuple[list[_File], list[str]]:
    """Image files by name in sorted order, with their split and class folders; what else lies there is counted."""
    if not source.is_dir():
        raise DataError(f"{source} is no folder; give the one that holds a folder per class")
    top = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    has_splits = bool(top) and "train" in (SPLIT_NAMES.get(name) for name in top) and set(top) <= set(SPLIT_NAMES)
    files, others = [], 0
    for path in _walk(source):
        if path.suffix.lower() not in SUFFIXES:
            others += 1
            continue
        folders = path.relative_to(source).parts[:-1]
        split = SPLIT_NAMES[folders[0]] if has_splits and folders else None
        files.append(_File(path, split, folders[1:] if has_splits else folders))
    for file in files:
        if not file.folders:
            raise DataError(f"{file.path} lies in no class folder; its folder's name is its class")
    if not files:
        raise DataError(f"{source} holds no .jpg, .png or .webp file in a class folder")
    return files, [f"{others} files that are no .jpg, .png or .webp were left out"] if others else []


def _walk(source: Path) -> Iterator[Path]:
    """Files in sorted order, hidden ones left out; linked folders are followed once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        if real not in seen:
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        seen.add(real)


def _labels_of_folders(files: list[_File], levels: Sequence[str] | None) -> tuple[list[dict[str, str]], Taxonomy, str]:
    depths = {len(file.folders) for file in files}
    depth = min(depths)
    if levels is None:
        natural = len(depths) == 1 and is_tree(file.folders for file in files)
        levels = _level_names(depth) if natural else ("class",)
    elif len(levels) > depth:
        shallow = next(file.path for file in files if len(file.folders) == depth)
        raise DataError(f"{shallow} lies {depth} folders deep, but --levels names {len(levels)} levels")
    paths = [dict(zip(levels, file.folders, strict=False)) for file in files]
    why = "" if {len(levels)} == depths else " (deeper folders are no level of the tree)"
    return paths, tree_of(levels, paths), f"levels by folder: {', '.join(levels)}{why}; --levels names them"


def _level_names(depth: int) -> tuple[str, ...]:
    if depth <= 2:
        return ("group", "class")[-depth:]
    return (*(f"level_{number}" for number in range(1, depth)), "class")


def _labels_of_tree(files: list[_File], taxonomy: Taxonomy, source: Path) -> tuple[list[dict[str, str]], Taxonomy]:
    known = labels_by_name(taxonomy)
    for file in files:
        if file.folders[-1] not in known:
            raise DataError(f"{file.path}: the class tree given has no class named {file.folders[-1]!r}")
    paths = [known[file.folders[-1]] for file in files]
    return paths, tree_of(taxonomy.levels, paths)
