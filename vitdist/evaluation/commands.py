"""`vitdist report` and `vitdist compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: Subparsers) -> None:
    """Add both commands; each sets `function`, one from the parsed arguments to an exit code."""
    report = subparsers.add_parser("report", help="(re)build the report of a run", description=_report.__doc__)
    report.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder, as runs/NAME")
    report.set_defaults(function=_report)
    compare = subparsers.add_parser("compare", help="runs side by side", description=_compare.__doc__)
    compare.add_argument("run_dirs", metavar="RUN", type=Path, nargs="+", help="two run folders or more")
    compare.add_argument("--split", default="test", help="whose evaluation is compared (default: test)")
    compare.add_argument("--markdown", action="store_true", help="print a Markdown table")
    compare.set_defaults(function=_compare)


def _report(arguments: argparse.Namespace) -> int:
    """Write RUN/report/: index.html (one file that needs nothing else), report.json, per_class.csv, predictions.csv."""
    from vitdist.evaluation.report import build_report

    print(build_report(arguments.run_dir))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    """Accuracies with counts and 95 % intervals, steps, time, and the recipe keys on which the runs differ."""
    from vitdist.evaluation.compare import as_markdown, as_text, compare

    table = compare(arguments.run_dirs, arguments.split)
    print(as_markdown(table) if arguments.markdown else as_text(table))
    return 0
