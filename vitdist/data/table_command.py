"""`vitdist data table`: fetch what a CSV or Parquet file lists, say what failed, and pack it."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdist.data import commands
from vitdist.data.sources.draw import TEST_FRACTION
from vitdist.errors import DataError, ResourceError, UsageError

if TYPE_CHECKING:
    from vitdist.data.index import DatasetIndex
    from vitdist.data.sources.rows import Failure, Rows
    from vitdist.data.sources.spool import Spool

WORKERS = 16
ALONE = (1, 1)


def add_table(actions: Any) -> None:
    """Add the command."""
    parser = actions.add_parser("table", help="pack the photographs that a CSV or Parquet file lists")
    commands.add_packing_options(parser, "CSV or Parquet, a row a photograph", "FILE")
    columns = parser.add_argument_group("columns (and --levels: those of the names, from coarse to fine)")
    columns.add_argument("--image", required=True, metavar="COLUMN", help="paths, or http(s), s3, gs, az addresses")
    columns.add_argument("--split", metavar="COLUMN", help="train, val or test (default: a test split is drawn)")
    columns.add_argument("--group", metavar="COLUMN", help="what belongs together: an individual, a burst")
    parser.add_argument("--root", metavar="DIR", help="where relative paths start (default: the table's folder)")
    parser.add_argument("--test-fraction", type=float, default=TEST_FRACTION, help="share drawn for test (0.2)")
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N", help=f"downloads at a time ({WORKERS})")
    parser.add_argument("--tries", type=int, default=4, metavar="N", help="for each address (4)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="without a byte from a server (30)")
    parser.add_argument("--part", type=_part, default=ALONE, metavar="I/N", help="only fetch the I-th of N parts")
    parser.add_argument("--spool", metavar="DIR", help="what is fetched waits here to be packed (default: OUT.spool)")
    parser.set_defaults(function=run_table)


def run_table(options: argparse.Namespace) -> int:
    """Fetch into the spool, then pack and delete it; with --part, fetch only. A kill loses nothing of the spool."""
    from vitdist.data.sources.rows import Columns, read_rows
    from vitdist.data.sources.spool import Spool

    source, out = Path(options.source), Path(options.out)
    levels = commands.levels_of(options)
    if levels is None:
        raise UsageError(
            "which columns hold the names? Say so with --levels, from coarse to fine: --levels family,species"
        )
    if options.tries < 1 or not options.timeout > 0:
        raise UsageError("--tries must be at least 1, and --timeout more than 0 seconds")
    rows = read_rows(source, Columns(options.image, levels, options.split, options.group))
    part, num_parts = options.part
    rows.good = rows.good[part - 1 :: num_parts]
    folder = Path(options.spool) if options.spool else out.with_name(f"{out.name}.spool")
    name = "all" if num_parts == 1 else f"part-{part}-of-{num_parts}"
    try:
        with Spool(folder, name) as spool:
            index = _fetch_and_pack(options, rows, spool, levels)
            if index is not None:
                spool.discard()
    except OSError as error:
        where = f"{folder}: what is fetched cannot be kept ({error.strerror})"
        raise ResourceError(f"{where}; mend that and start again, it goes on from here") from None
    return 0


def _fetch_and_pack(
    options: argparse.Namespace, rows: Rows, spool: Spool, levels: Sequence[str]
) -> DatasetIndex | None:
    """The packed set; None where this was one part of several."""
    from vitdist.data.packing.pack import pack
    from vitdist.data.sources.table import fetch, read_table
    from vitdist.data.storage.remote import PATIENCE

    out, num_before = Path(options.out), len(spool.found)
    patience = replace(PATIENCE, tries=options.tries, silence=options.timeout)
    fetched = fetch(rows, spool, workers=options.workers, patience=patience, progress=commands.progress("fetching"))
    note = f"{len(spool.found) - num_before} fetched now, {num_before} before"
    if options.part != ALONE:
        _report_failures(options, fetched.failures)
        print(f"part {options.part[0]} of {options.part[1]}: {note}; when all parts are done, run it without --part")
        return None
    root = Path(options.root) if options.root else Path(options.source).parent
    taxonomy = commands.taxonomy_of(options)
    found = read_table(
        fetched, spool, root, levels=levels, taxonomy=taxonomy, test_fraction=options.test_fraction, seed=options.seed
    )
    _report_failures(options, fetched.failures)
    before = commands.hash_at(out)
    index = pack(
        found.samples,
        found.taxonomy,
        out,
        commands.packing_of(options, "table", Path(options.source).stem),
        overwrite=options.overwrite,
        left_out=[str(failure) for failure in fetched.failures],
        progress=commands.progress("packing"),
    )
    commands.report_packed(index, before, [*([note] if spool.found else []), *found.notes])
    return index


def _report_failures(options: argparse.Namespace, failures: Sequence[Failure]) -> None:
    """Write the list of what failed; DataError with the count unless such rows may be left out."""
    part, num_parts = options.part
    out = Path(options.out)
    path = out.with_name(f"{out.name}.failed{'' if num_parts == 1 else f'-{part}-of-{num_parts}'}.csv")
    if not failures:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["line", "image", "reason"])
        writer.writerows((failure.line, failure.image, failure.reason) for failure in failures)
    failed = f"{len(failures)} row{'s' * (len(failures) != 1)} failed, listed in {path}"
    if options.on_bad == "raise":
        raise DataError(
            f"{failed}; the first: {failures[0]}; start again to try them again "
            "(the others are kept), or leave them out with --on-bad skip"
        )
    print(failed, file=sys.stderr)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part like 3/8")
    return int(match[1]), int(match[2])
