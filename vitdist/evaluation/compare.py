"""Runs side by side: what they reached with which counts, steps and hours, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitdist.errors import UsageError
from vitdist.evaluation.run_folder import Evaluation, RunFolder, read_run
from vitdist.evaluation.sections import coverage, percent
from vitdist.progress import duration
from vitdist.taxonomy import Taxonomy

OWN_KEYS = ("name", "out")  # differ between any two runs


def compare(paths: Sequence[Path], split: str = "test") -> list[list[str]]:
    """A table with one column a run; the first row holds their names, and rows where nothing is known are left out."""
    if len(paths) < 2:
        raise UsageError("vitdist compare needs two runs or more")
    runs = [read_run(path) for path in paths]
    evaluations = [next((e for e in run.evaluations if e.split == split), None) for run in runs]
    if split != "test" and not any(evaluations):
        raise UsageError(f"none of these runs has been evaluated on {split!r}: vitdist evaluate RUN --split {split}")
    rows = [["", *_names(runs)], [split, *(_coverage(evaluation) for evaluation in evaluations)]]
    rows += _accuracies(evaluations)
    rows += _conditions(runs)
    rows += [[key, *(_shown(run, key) for run in runs)] for key in differing(runs)]
    return [row for row in rows if row[0] == "" or any(cell != "–" for cell in row[1:])]


def differing(runs: Sequence[RunFolder]) -> list[str]:
    """The recipe keys on which the runs with a readable recipe do not agree, in the recipe's order."""
    runs = [run for run in runs if run.recipe]
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    return [
        key
        for key in keys
        if key not in OWN_KEYS and any(run.recipe.get(key) != runs[0].recipe.get(key) for run in runs)
    ]


def training_seconds(run: RunFolder) -> float | None:
    """Time in training steps, from the speed and the batch size; None where they are not known."""
    batch = run.recipe.get("train.global_batch_size")
    rates = [line.get("images_per_second") for line in run.training_lines]
    if not batch or not rates:
        return None
    return float(sum(batch / rate for rate in rates if rate))


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Columns under each other for a terminal."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """A table for notes and pull requests."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def _names(runs: Sequence[RunFolder]) -> list[str]:
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _coverage(evaluation: Evaluation | None) -> str:
    return "not evaluated" if evaluation is None else coverage(evaluation.summary)[0]


def _accuracies(evaluations: Sequence[Evaluation | None]) -> list[list[str]]:
    """One row a level, finest first, then the tree measures."""
    levels = dict.fromkeys(name for e in evaluations if e is not None for name in reversed(e.levels))
    rows = [
        [f"accuracy, {name}", *(_accuracy(e.levels.get(name) if e else None) for e in evaluations)] for name in levels
    ]
    rows.append(["macro F1, finest", *(_of(e, lambda e: percent(e.finest[1].get("macro_f1"))) for e in evaluations)])
    rows.append(["mistake severity", *(_of(e, _severity) for e in evaluations)])
    return rows


def _accuracy(level: dict[str, Any] | None) -> str:
    if not level or level.get("accuracy") is None:
        return "–"
    low, high = level["interval"]
    share = f"{percent(level['accuracy'])} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{share} {level['correct']:,}/{level['count']:,}"


def _of(evaluation: Evaluation | None, read: Callable[[Any], str]) -> str:
    return "–" if evaluation is None or evaluation.finest is None else read(evaluation)


def _severity(evaluation: Evaluation) -> str:
    mean = (evaluation.summary.get("mistake_severity") or {}).get("mean")
    return "–" if mean is None else f"{mean:.3f}"


def _conditions(runs: Sequence[RunFolder]) -> list[list[str]]:
    times = [training_seconds(run) for run in runs]
    trees = ["–" if run.tree is None else f"{_sizes(run.tree)} ({run.tree.hash[:8]})" for run in runs]
    return [
        ["class tree", *(trees if len({*trees} - {"–"}) > 1 else ["–"] * len(runs))],  # accuracies of other questions
        ["selected on test", *("yes" if run.recipe.get("evaluation.protocol") == "paper" else "–" for run in runs)],
        ["steps", *(f"{run.training_lines[-1]['step']:,}" if run.training_lines else "–" for run in runs)],
        ["time in steps", *("–" if seconds is None else duration(seconds) for seconds in times)],
        ["recipe", *("–" if run.recipe else "not readable by this vitdist" for run in runs)],
        ["end", *(str(run.end.get("reason", "–")) for run in runs)],
    ]


def _sizes(tree: Taxonomy) -> str:
    return "/".join(map(str, tree.num_classes))


def _shown(run: RunFolder, key: str) -> str:
    value = run.recipe.get(key)
    if not run.recipe:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value)
