"""Class trees for sources that bring none: from a CSV the user gives, or from the folders the photographs lie in."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vitdist.errors import DataError
from vitdist.taxonomy import CUB_LEVELS, Taxonomy, build, read_csv

CLASS_NAME = "class_name"


def read_tree(path: str | Path, levels: Sequence[str] | None = None) -> Taxonomy:
    """The tree of a CSV with one row a class, from coarse to fine; DataError when it is none.

    Columns are `levels`, else CUB's four where the file has them, else all columns in their order. The finest level's
    names are in its own column or, as in CUB's table, in one called `class_name`.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            columns = next(csv.reader(file), [])
        if levels is None:
            has_cub = {*CUB_LEVELS[:-1], CLASS_NAME} <= set(columns)
            levels = CUB_LEVELS if has_cub else [column for column in columns if column]
        if not levels:
            raise DataError(f"{path} has no columns; the first line names the levels, coarse to fine")
        tree = read_csv(path, levels, leaf=levels[-1] if levels[-1] in columns else CLASS_NAME)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV in UTF-8: {error}") from None
    if not tree.names[-1]:
        raise DataError(f"{path} names no class at its finest level, {levels[-1]}")
    return tree


def labels_by_name(tree: Taxonomy) -> dict[str, dict[str, str]]:
    """Class name -> its path (names by level); a name at two levels means the finer one."""
    table: dict[str, dict[str, str]] = {}
    for node in range(tree.num_nodes):  # coarse to fine: the finer one stays
        path = tree.path_names(node)
        table[list(path.values())[-1]] = path
    return table


def tree_of(levels: Sequence[str], paths: Iterable[Mapping[str, str]]) -> Taxonomy:
    """The tree of these paths alone: what is left of a larger tree when only some classes are there."""
    return build(levels, ([path.get(level) for level in levels] for path in paths))


def is_tree(paths: Iterable[Sequence[str]]) -> bool:
    """Whether each name stands under one parent only, so that folders within folders can be meant as a tree."""
    parent_of: dict[tuple[int, str], tuple[str, ...]] = {}
    return all(
        parent_of.setdefault((level, name), tuple(path[:level])) == tuple(path[:level])
        for path in paths
        for level, name in enumerate(path)
    )
