"""Which classes are taken for which: maps, the most confused pairs with pictures, a row for every class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from vitdist.data.storage.cache import ShardCache
from vitdist.data.storage.remote import Patience
from vitdist.evaluation.metrics import class_scores, confused_pairs, confusion_matrix
from vitdist.evaluation.pictures import Pictures, open_pictures
from vitdist.evaluation.plots import heat_map
from vitdist.evaluation.predictions import UNKNOWN, PredictionTable
from vitdist.evaluation.run_folder import Evaluation, RunFolder
from vitdist.evaluation.sections import readable
from vitdist.recipe.sizes import num_bytes
from vitdist.taxonomy import Taxonomy

MAX_HEAT = 60  # classes
NUM_PAIRS, NUM_MISTAKES, PICTURES_A_PAIR = 10, 12, 3
BRIEF = Patience(tries=2, connect=3.0, silence=5.0)  # a report does without pictures rather than wait for a server


def heat_maps(table: PredictionTable, tree: Taxonomy) -> list[dict[str, str]]:
    """A confusion map for each level of 2 to 60 classes, the finest of them first."""
    maps = []
    for level in reversed(range(tree.num_levels)):
        if 2 <= tree.num_classes[level] <= MAX_HEAT:
            matrix = confusion_matrix(table.targets[:, level], table.predictions[:, level], tree.num_classes[level])
            names = [readable(name) for name in tree.names[level]]
            title = f"{tree.levels[level]} ({tree.num_classes[level]} classes)"
            maps.append({"title": title, "svg": heat_map(matrix, names, label=f"confusion of {tree.levels[level]}")})
    return maps


def class_rows(table: PredictionTable, tree: Taxonomy, level: int) -> list[dict[str, Any]]:
    """One row for each class of a level that is there or was answered: names, counts, scores, commonest mistake."""
    matrix = confusion_matrix(table.targets[:, level], table.predictions[:, level], tree.num_classes[level])
    scores = class_scores(matrix)
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    rows = []
    for index in np.flatnonzero((scores.support > 0) | (scores.predicted > 0)):
        path = tree.path_names(tree.offsets[level] + int(index))
        worst = int(wrong[index].argmax())
        rows.append(
            {
                "class": tree.names[level][index],
                "path": {name: path.get(name, "") for name in tree.levels[:level]},
                "count": int(scores.support[index]),
                "predicted": int(scores.predicted[index]),
                "correct": int(scores.correct[index]),
                "recall": _number(scores.recall[index]),
                "precision": _number(scores.precision[index]),
                "f1": _number(scores.f1[index]),
                "confused_with": tree.names[level][worst] if wrong[index, worst] else "",
                "confused": int(wrong[index, worst]),
            }
        )
    return rows


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def pictures_of(run: RunFolder, evaluation: Evaluation, table: PredictionTable) -> tuple[Pictures | None, str]:
    """The evaluated split's pictures, or why there are none. `val` lies in the packed split that it is a view of."""
    about = run.splits.get(evaluation.split, {})
    split = str(about.get("split") or evaluation.split)
    path = str(evaluation.summary.get("data_path") or run.recipe.get("data.path") or "")
    folder, size = run.recipe.get("data.cache_dir"), run.recipe.get("data.cache_size")
    cache = ShardCache(Path(folder), num_bytes(size) if size else None, BRIEF) if folder else None
    return open_pictures(path, cache, split, int(table.rows.max()) if len(table) else -1)


def confusions(table: PredictionTable, tree: Taxonomy, pictures: Pictures | None) -> list[dict[str, Any]]:
    """The most confused pairs of the finest level, with some of the mistaken pictures and some of the other class."""
    targets, answers = table.targets[:, -1], table.predictions[:, -1]
    matrix = confusion_matrix(targets, answers, tree.num_classes[-1])
    support, names = matrix.sum(axis=1), tree.names[-1]
    pairs = []
    for true, said, count in confused_pairs(matrix, NUM_PAIRS):
        mistaken = table.rows[(targets == true) & (answers == said)]
        right = table.rows[(targets == said) & (answers == said)]
        examples = right if len(right) else table.rows[targets == said]
        pairs.append(
            {
                "true": names[true],
                "said": names[said],
                "count": count,
                "support": int(support[true]),
                "back": int(matrix[said, true]),
                "mistaken": _thumbnails(pictures, mistaken[:PICTURES_A_PAIR]),
                "examples": _thumbnails(pictures, examples[:PICTURES_A_PAIR]),
            }
        )
    return pairs


def surest_mistakes(table: PredictionTable, tree: Taxonomy, pictures: Pictures | None) -> list[dict[str, Any]]:
    """The mistakes the model was surest of: often wrong labels."""
    wrong = np.flatnonzero((table.targets[:, -1] != UNKNOWN) & (table.targets[:, -1] != table.predictions[:, -1]))
    worst = wrong[np.argsort(-table.topk_probs[wrong, 0], kind="stable")][:NUM_MISTAKES]
    names = tree.names[-1]
    return [
        {
            "row": int(table.rows[index]),
            "true": names[table.targets[index, -1]],
            "said": names[table.predictions[index, -1]],
            "probability": float(table.topk_probs[index, 0]),
            "picture": pictures.thumbnail(int(table.rows[index])) if pictures else None,
        }
        for index in worst
    ]


def _thumbnails(pictures: Pictures | None, rows: np.ndarray) -> list[str]:
    found = [pictures.thumbnail(int(row)) for row in rows] if pictures else []
    return [uri for uri in found if uri is not None]
