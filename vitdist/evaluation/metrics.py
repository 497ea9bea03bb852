"""From a prediction table to counts, accuracies with intervals, macro averages, confusions and tree measures.

Everything that can be counted is counted in integers; a label of -1 (unknown at a level) is left out of that level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitdist.errors import DataError
from vitdist.evaluation.predictions import UNKNOWN, PredictionTable
from vitdist.taxonomy import Taxonomy

Z_95 = 1.959963984540054
MAX_LISTED_TIES = 1000


def wilson_interval(correct: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson, JASA 1927): honest also near 0 and 1 and for few samples."""
    if count <= 0:
        return (0.0, 1.0)
    share = correct / count
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    # At the ends the bound is exactly 0 or 1; the formula misses it by a rounding error.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    return (low, 1.0 if correct == count else min(1.0, centre + half))


def confusion_matrix(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [C, C]: how often true class i (row) was called j (column)."""
    known = targets != UNKNOWN
    cells = targets[known].astype(np.int64) * num_classes + predictions[known]
    return np.bincount(cells, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class ClassScores:
    """Per class of one level, arrays [C]; a score of a class that is not in the targets is NaN."""

    support: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def num_present(self) -> int:
        return int((self.support > 0).sum())

    def macro(self, name: str) -> float | None:
        """The plain mean over the classes that are in the targets; None when there are none."""
        values = getattr(self, name)[self.support > 0]
        return float(values.mean()) if len(values) else None


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Precision, recall and F1 of every class; a class present but never predicted has precision 0."""
    support, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    correct = np.diagonal(confusion)
    present = support > 0
    absent = np.full(len(support), np.nan)
    precision = np.divide(correct, predicted, out=np.zeros(len(support)), where=predicted > 0)
    recall = np.divide(correct, support, out=absent.copy(), where=present)
    f1 = np.divide(2 * correct, support + predicted, out=absent.copy(), where=present)
    return ClassScores(support, predicted, correct, np.where(present, precision, np.nan), recall, f1)


def level_summary(table: PredictionTable, level: int, num_classes: int) -> dict[str, Any]:
    """Counts and averages of one level: {correct, count, unknown, accuracy, interval, macro_..., loss}."""
    targets, predictions = table.targets[:, level], table.predictions[:, level]
    known = targets != UNKNOWN
    count, correct = int(known.sum()), int((targets[known] == predictions[known]).sum())
    scores = class_scores(confusion_matrix(targets, predictions, num_classes))
    return {
        "correct": correct,
        "count": count,
        "unknown": len(table) - count,
        "accuracy": correct / count if count else None,
        "interval": list(wilson_interval(correct, count)) if count else None,
        "macro_precision": scores.macro("precision"),
        "macro_recall": scores.macro("recall"),
        "macro_f1": scores.macro("f1"),
        "classes": num_classes,
        "classes_present": scores.num_present,
        "loss": _finite(float(table.loss[known, level].astype(np.float64).mean())) if count else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def top_k(table: PredictionTable) -> dict[str, Any]:
    """How often the true finest class is among the K best: {k, correct, count, accuracy}."""
    targets = table.targets[:, -1]
    known = targets != UNKNOWN
    hits = int((table.topk_ids[known] == targets[known, None]).any(axis=1).sum())
    count = int(known.sum())
    return {"k": table.topk_ids.shape[1], "correct": hits, "count": count, "accuracy": hits / count if count else None}


def finest_paths(taxonomy: Taxonomy) -> np.ndarray:
    """int32 [C_finest, L]: the class index of each finest class's ancestors, -1 where the tree does not know."""
    return taxonomy.paths[taxonomy.offsets[-2] : taxonomy.offsets[-1]]


def consistency(table: PredictionTable, taxonomy: Taxonomy) -> dict[str, Any]:
    """How often the coarse answers are the ancestors of the finest one, by level and for all of them together."""
    expected = finest_paths(taxonomy)[table.predictions[:, -1]][:, :-1]
    known = expected != UNKNOWN
    agrees = (expected == table.predictions[:, :-1]) & known
    counted = known.any(axis=1)
    return {
        "consistent": int((agrees == known)[counted].all(axis=1).sum()),
        "count": int(counted.sum()),
        "levels": {
            name: {"consistent": int(agrees[:, level].sum()), "count": int(known[:, level].sum())}
            for level, name in enumerate(taxonomy.levels[:-1])
        },
    }


def mistake_severity(table: PredictionTable, taxonomy: Taxonomy) -> dict[str, Any]:
    """How far apart in the tree true and wrongly predicted finest classes are (Bertinetto et al., CVPR 2020).

    The height of the lowest common ancestor: 1 for siblings under the next level, L when not even the coarsest level
    is shared. {mistakes, mean, by_height: {height: count}}.
    """
    targets, predictions = table.targets[:, -1], table.predictions[:, -1]
    wrong = (targets != UNKNOWN) & (targets != predictions)
    paths = finest_paths(taxonomy)
    true, said = paths[targets[wrong]], paths[predictions[wrong]]
    shared = (true == said) & (true != UNKNOWN)
    from_below = shared[:, ::-1]
    heights = np.where(shared.any(axis=1), from_below.argmax(axis=1), taxonomy.num_levels)
    values, counts = np.unique(heights, return_counts=True)
    return {
        "mistakes": len(heights),
        "mean": float(heights.mean()) if len(heights) else None,
        "by_height": {str(int(height)): int(count) for height, count in zip(values, counts, strict=True)},
    }


def through_finest(table: PredictionTable, taxonomy: Taxonomy) -> dict[str, Any]:
    """Each coarse level's accuracy had it been read off the finest answer: {level: {correct, count}}."""
    derived = finest_paths(taxonomy)[table.predictions[:, -1]]
    result = {}
    for level, name in enumerate(taxonomy.levels[:-1]):
        known = table.targets[:, level] != UNKNOWN
        hits = derived[known, level] == table.targets[known, level]
        result[name] = {"correct": int(hits.sum()), "count": int(known.sum())}
    return result


def check(table: PredictionTable, taxonomy: Taxonomy) -> None:
    """DataError unless every class index of the table exists in the tree."""
    if table.num_levels != taxonomy.num_levels:
        raise DataError(
            f"the predictions have {table.num_levels} levels, the class tree {taxonomy.num_levels}; evaluate again"
        )
    limits = np.array(taxonomy.num_classes)
    fits = (table.targets >= UNKNOWN) & (table.targets < limits)
    fits &= (table.predictions >= 0) & (table.predictions < limits)
    if not fits.all() or (table.topk_ids < 0).any() or (table.topk_ids >= limits[-1]).any():
        raise DataError("the predictions name classes that the class tree does not have; evaluate again")


def summary(
    table: PredictionTable, taxonomy: Taxonomy, *, split: str, expected: int, weights: str, step: int, **more: Any
) -> dict[str, Any]:
    """What evaluation/<split>.json holds; `expected` is the size of the split, `more` is kept as it is."""
    check(table, taxonomy)
    ties = table.near_ties()
    levels = {
        name: level_summary(table, level, taxonomy.num_classes[level]) for level, name in enumerate(taxonomy.levels)
    }
    result: dict[str, Any] = {
        "split": split,
        "expected": expected,
        "count": len(table),
        "weights": weights,
        "step": step,
        "levels": levels,
        "top_k": top_k(table),
        "mistake_severity": mistake_severity(table, taxonomy),
        "near_ties": {"count": len(ties), "rows": [int(row) for row in ties[:MAX_LISTED_TIES]]},
    }
    if taxonomy.num_levels > 1:
        result["consistency"] = consistency(table, taxonomy)
        result["through_finest"] = through_finest(table, taxonomy)
    return {**result, **more}


def confused_pairs(confusion: np.ndarray, limit: int = 12) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the most frequent mistakes, the most frequent first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [(int(cell) // len(wrong), int(cell) % len(wrong)) for cell in order]
    return [(true, said, int(wrong[true, said])) for true, said in pairs if wrong[true, said]]
