"""Photographs listed in a CSV or Parquet file, by path or address: fetched in parallel, kept until they are packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from vitdist.data.index import is_url
from vitdist.data.sources.draw import TEST_FRACTION, digest_of, draw_test, unseen_classes
from vitdist.data.sources.intake import BadImage, prepare
from vitdist.data.sources.photograph import ImageSource, SourceSample, whole_file
from vitdist.data.sources.rows import Failure, Row, Rows, complete
from vitdist.data.sources.spool import Spool
from vitdist.data.sources.trees import labels_by_name, tree_of
from vitdist.data.storage.keys import plain
from vitdist.data.storage.remote import Patience, RemoteError, read_whole, shown
from vitdist.data.storage.shard_content import MAX_IMAGE
from vitdist.errors import DataError, UsageError
from vitdist.taxonomy import Taxonomy

Progress = Callable[[int, int], None]
Outcome = tuple[Row, bytes | None, str]
"""A row, what was fetched for it, or why nothing was."""


@dataclass(frozen=True)
class TableSet:
    """The samples of a table and their tree; `notes` say what was decided, a line each."""

    taxonomy: Taxonomy
    samples: list[SourceSample]
    notes: list[str] = field(default_factory=list)


def fetch(rows: Rows, spool: Spool, *, workers: int, patience: Patience, progress: Progress | None = None) -> Rows:
    """Bring every address of these rows into the spool; the rows whose image is there, and all that fail.

    An address that failed before is tried again. Only the head of an image is looked at: what is none is not kept.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers} is no number of downloads at a time; give 1 or more")
    asked = [row for row in rows.good if is_url(row.image) and row.image not in spool.found]
    reasons: dict[int, str] = {}
    for number, (row, data, reason) in enumerate(_outcomes(asked, workers, patience), 1):
        if data is None:
            reasons[row.line] = reason
        else:
            spool.add(row.image, data)
        if progress is not None:
            progress(number, len(asked))
    failures = [Failure(row.line, row.image, reasons[row.line]) for row in rows.good if row.line in reasons]
    good = [row for row in rows.good if row.line not in reasons]
    return Rows(good, sorted([*rows.failures, *failures], key=lambda failure: failure.line))


def _outcomes(rows: Sequence[Row], workers: int, patience: Patience) -> Iterator[Outcome]:
    """What each download gave, in the order they end; no more than a few are held at a time."""
    waiting: set[Future[Outcome]] = set()
    left = iter(rows)
    with ThreadPoolExecutor(workers) as pool:
        while True:
            waiting |= {pool.submit(_download, row, patience) for row in islice(left, 2 * workers - len(waiting))}
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _download(row: Row, patience: Patience) -> Outcome:
    try:
        data = read_whole(row.image, MAX_IMAGE, patience)
        prepare(data, "it")
    except RemoteError as error:
        return row, None, f"{error.kind} ({error.detail})"
    except BadImage as error:
        return row, None, str(error)
    except UsageError as error:
        return row, None, str(error)
    return row, data, ""


def read_table(
    rows: Rows,
    spool: Spool,
    root: Path,
    *,
    levels: Sequence[str],
    taxonomy: Taxonomy | None = None,
    test_fraction: float = TEST_FRACTION,
    seed: int = 0,
) -> TableSet:
    """Samples of fetched rows, files relative to `root`; rows that cannot be used are added to `rows.failures`.

    A blank at a fine level leaves the coarser label; a blank at a coarse one is filled in from other rows. Without a
    split column a test split is drawn. DataError when a class stands under two parents.
    """
    samples: list[tuple[Row, Mapping[str, str], ImageSource]] = []
    known = labels_by_name(taxonomy) if taxonomy is not None else {}
    for row, labels in zip(rows.good, complete(rows.good), strict=True):
        finest = list(row.labels.values())[-1]
        if taxonomy is not None and finest not in known:
            rows.fail(row, f"the class tree given has no class named {finest[:100]!r}")
            continue
        if taxonomy is None and (gap := _gap(labels, levels)):
            rows.fail(row, f"its {gap} is blank, and no row says it: fill it in, or leave what is finer blank")
            continue
        try:
            image = spool.found[row.image] if is_url(row.image) else whole_file(root / row.image)
        except DataError as error:
            rows.fail(row, str(error))
            continue
        samples.append((row, known[finest] if taxonomy is not None else labels, image))
    if not samples:
        raise DataError(f"none of {len(rows.failures)} rows can be packed; the first: {rows.failures[0]}")
    paths = [labels for _, labels, _ in samples]
    ordered = [{level: path[level] for level in levels if level in path} for path in paths] if not known else paths
    splits, notes = _splits([row for row, _, _ in samples], ordered, test_fraction, seed)
    tree = tree_of(taxonomy.levels if taxonomy is not None else levels, ordered)
    items = zip(samples, ordered, splits, strict=True)
    packed = [_sample(row, labels, split, image) for (row, _, image), labels, split in items]
    return TableSet(tree, packed, notes)


def _gap(labels: Mapping[str, str], levels: Sequence[str]) -> str:
    """A level without a name between two that have one: a tree's classes hang on the level just above, or on none."""
    places = [place for place, level in enumerate(levels) if level in labels]
    return next((levels[place] for place in range(places[0], places[-1]) if place not in places), "")


def _splits(
    rows: Sequence[Row], labels: Sequence[Mapping[str, str]], fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    if rows[0].split is not None:
        splits = [row.split or "train" for row in rows]
        return splits, unseen_classes(splits, labels)
    splits = draw_test([row.image for row in rows], labels, [r.group for r in rows], fraction=fraction, seed=seed)
    drawn = f"test: {splits.count('test')} of {len(rows)} drawn by class with seed {seed}"
    return splits, [f"no split column; {drawn} (--test-fraction {fraction})", *unseen_classes(splits, labels)]


def _sample(row: Row, labels: Mapping[str, str], split: str, image: ImageSource) -> SourceSample:
    name = unquote(urlsplit(row.image).path) if is_url(row.image) else row.image
    stem = plain(PurePosixPath(name).stem) or "image"
    where = shown(row.image) if is_url(row.image) else row.image
    details = {"path": where, "class": list(labels.values())[-1]}
    key = f"{stem}-{digest_of(row.image)[:16]}"
    return SourceSample(key, split, labels, image, f"line {row.line}: {where}", row.group, details)
