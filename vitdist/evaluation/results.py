"""What an evaluation leaves: <split>.json with counts, and <split>.predictions.npz."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitdist.durable import write_whole
from vitdist.evaluation.evaluate import Evaluated
from vitdist.evaluation.metrics import summary
from vitdist.taxonomy import Taxonomy

FOLDER = "evaluation"


def write(
    folder: Path, result: Evaluated, tree: Taxonomy, *, split: str, expected: int, weights: str, step: int, **more: Any
) -> dict[str, Any]:
    """Write both files into a folder; returns what the JSON holds."""
    folder.mkdir(parents=True, exist_ok=True)
    result.table.save(folder / f"{split}.predictions.npz")
    found = summary(
        result.table, tree, split=split, expected=expected, weights=weights, step=step, damaged=result.damages, **more
    )
    write_whole(folder / f"{split}.json", json.dumps(found, indent=1) + "\n")
    return found


def headline(found: dict[str, Any]) -> str:
    """One line: counts and accuracies of every level."""
    levels = ", ".join(
        f"{name} {100 * level['accuracy']:.2f} % ({level['correct']} of {level['count']})"
        for name, level in found["levels"].items()
        if level["count"]
    )
    return f"{found['split']}: {found['count']:,} of {found['expected']:,} evaluated: {levels}"
