"""Rows of a CSV or Parquet file: an image, a name at each level, a split and a group, and what is wrong with which."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitdist.data.index import is_url
from vitdist.data.sources.folder import SPLIT_NAMES
from vitdist.errors import DataError, ResourceError, UsageError

PARQUET = (".parquet", ".pq")
MAX_CELL = 1 << 20


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what; `levels` from coarse to fine."""

    image: str
    levels: Sequence[str]
    split: str | None = None
    group: str | None = None

    @property
    def names(self) -> list[str]:
        named = (self.image, *self.levels, self.split, self.group)
        return list(dict.fromkeys(name for name in named if name is not None))


@dataclass(frozen=True, slots=True)
class Row:
    """One photograph of a table; `line` as an editor counts it (a Parquet file's rows from 1)."""

    line: int
    image: str
    labels: Mapping[str, str]
    split: str | None
    group: str | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that cannot be packed, and why."""

    line: int
    image: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.image[:200]}: {self.reason}"


@dataclass
class Rows:
    """What a table holds: good rows, and those that cannot be used."""

    good: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, row: Row, reason: str) -> None:
        self.failures.append(Failure(row.line, row.image, reason))


def read_rows(path: str | Path, columns: Columns) -> Rows:
    """Every row of a table; DataError when it is none or lacks a column."""
    path = Path(path)
    cells = _parquet(path, columns) if path.suffix.lower() in PARQUET else _csv(path, columns)
    rows, seen = Rows(), dict[str, int]()
    for line, values in cells:
        row = _row(line, values, columns)
        first = seen.setdefault(_place(row.image), line)
        if not row.image:
            rows.fail(row, f"no image in column {columns.image!r}")
        elif first != line:
            rows.fail(row, f"the same image as line {first}")
        elif not row.labels:
            rows.fail(row, f"no name at any of the levels {', '.join(columns.levels)}")
        elif columns.split is not None and row.split is None:
            rows.fail(row, f"no split in column {columns.split!r}")
        else:
            rows.good.append(row)
    if not rows.good and not rows.failures:
        raise DataError(f"{path} has no rows")
    return rows


def _place(image: str) -> str:
    """One spelling of a path: `./a.jpg` and `a.jpg` are one photograph, not one to train and one to test on."""
    return image if not image or is_url(image) else os.path.normpath(image)


def _row(line: int, values: Mapping[str, object], columns: Columns) -> Row:
    def cell(name: str | None) -> str:
        return _text(values.get(name)) if name is not None else ""

    split = cell(columns.split)
    known = SPLIT_NAMES.get(split.lower())
    if split and known is None:
        raise DataError(f"line {line}: the split {split[:60]!r} is none of {', '.join(SPLIT_NAMES)}")
    labels = {level: name for level in columns.levels if (name := cell(level))}
    return Row(line, cell(columns.image), labels, known, cell(columns.group) or None)


def _text(value: object) -> str:
    """A cell as text: Parquet has numbers, whole ones as 3.0 where some are missing, and those as NaN."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _csv(path: Path, columns: Columns) -> Iterator[tuple[int, Mapping[str, object]]]:
    csv.field_size_limit(MAX_CELL)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            head = file.readline(MAX_CELL)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=head.count), skipinitialspace=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            _check(path, columns, reader.fieldnames)
            for values in reader:
                yield reader.line_num, values
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV in UTF-8: {error}") from None


def _parquet(path: Path, columns: Columns) -> Iterator[tuple[int, Mapping[str, object]]]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ResourceError(
            f"{path}: Parquet needs the package pyarrow; pip install 'vitdist[table]', or give a CSV"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check(path, columns, file.schema_arrow.names)
            line = 0
            for batch in file.iter_batches(columns=columns.names):
                for values in batch.to_pylist():
                    line += 1
                    yield line, values
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _check(path: Path, columns: Columns, found: Sequence[str]) -> None:
    missing = [name for name in columns.names if name not in found]
    if missing:
        raise UsageError(f"{path} has no column {missing[0]!r}; it has {', '.join(map(str, found[:30])) or 'none'}")


def complete(rows: Sequence[Row]) -> list[Mapping[str, str]]:
    """Each row's names by level, blanks above a name filled in where another row says what stands above it."""
    above: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        path: dict[str, str] = {}
        for level, name in row.labels.items():
            known = above.setdefault((level, name), {})
            for coarser, value in path.items():
                known.setdefault(coarser, value)
            path[level] = name
    completed: list[Mapping[str, str]] = []
    for row in rows:
        names = dict(row.labels)
        for level, name in row.labels.items():
            names = {**above[level, name], **names}
        completed.append(names)
    return completed
