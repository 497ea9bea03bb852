"""What a sweep found: a line a setting with mean and deviation over its seeds, then the runs side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from vitdist.evaluation.compare import as_text, compare
from vitdist.evaluation.run_folder import RunFolder, read_run
from vitdist.sweep.runs import Run

CHOOSE_BY_VAL = (
    "choose by val; each run's test was made with its weights chosen on val, and choosing by it is choosing on test"
)


def side_by_side(runs: Sequence[Run]) -> str:
    """Tables of the runs that have a folder."""
    there = [run for run in runs if (run.folder / "recipe.yaml").exists()]
    if not there:
        return "no run has begun"
    folders = [read_run(run.folder) for run in there]
    groups: dict[str, list[RunFolder]] = {}
    for run, folder in zip(there, folders, strict=True):
        groups.setdefault(run.setting.group, []).append(folder)
    rows = [["setting", "runs done", "best on val", "test, finest level"]]
    rows += [[name, _done(members), _val(members), _test(members)] for name, members in groups.items()]
    parts = [as_text(rows)]
    if len(there) > 1:
        parts.append(as_text(compare([run.folder for run in there])))
    if any(_best(folder) is not None for folder in folders):
        parts.append(CHOOSE_BY_VAL)
    return "\n\n".join(parts)


def _done(members: Sequence[RunFolder]) -> str:
    return f"{sum(folder.end.get('code') == 0 for folder in members)} of {len(members)}"


def _best(folder: RunFolder) -> tuple[str, float] | None:
    """(what is monitored, its best value) of the run's own choice of checkpoint; None where nothing chooses."""
    monitor = folder.recipe.get("checkpoint.monitor")
    lines = folder.evaluation_lines
    if monitor is None or not lines:
        return None
    if monitor == "val/accuracy":
        monitor = [name for name in lines[0] if name.startswith("val/accuracy/")][-1]
    values = [line[monitor] for line in lines if isinstance(line.get(monitor), float) and math.isfinite(line[monitor])]
    if not values:
        return None
    return str(monitor), min(values) if monitor == "val/loss" else max(values)


def _val(members: Sequence[RunFolder]) -> str:
    found = [best for best in map(_best, members) if best is not None]
    if not found:
        return "–"
    name = found[0][0]
    return f"{name.removeprefix('val/')} {spread([value for _, value in found], percent=name != 'val/loss')}"


def _test(members: Sequence[RunFolder]) -> str:
    finest = [_finest(folder) for folder in members]
    known = [level for level in finest if level is not None]
    if not known:
        return "–"
    counts = {level["count"] for level in known}
    of = f" of {counts.pop():,}" if len(counts) == 1 else ""
    return spread([level["accuracy"] for level in known]) + of


def _finest(folder: RunFolder) -> dict[str, Any] | None:
    test = next((e for e in folder.evaluations if e.split == "test"), None)
    return test.finest[1] if test is not None and test.finest is not None else None


def spread(values: Sequence[float], *, percent: bool = True) -> str:
    """Mean and, of several, the standard deviation of a sample, with their count."""
    scale, unit, form = (100.0, " %", ".2f") if percent else (1.0, "", ".4g")
    mean = format(scale * statistics.fmean(values), form)
    if len(values) == 1:
        return f"{mean}{unit} (1 run)"
    return f"{mean} ± {format(scale * statistics.stdev(values), form)}{unit} ({len(values)} runs)"
