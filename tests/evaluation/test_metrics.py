"""Metrics against counts done by hand and by plain loops."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vitdist import taxonomy
from vitdist.errors import DataError
from vitdist.evaluation import metrics
from vitdist.evaluation.predictions import PredictionTable, from_logits, merge
from vitdist.taxonomy import Taxonomy


def _tree() -> Taxonomy:
    rows = [("o1", "f1", "a"), ("o1", "f1", "b"), ("o1", "f2", "c"), ("o2", "f3", "d"), ("o2", "f3", "e")]
    return taxonomy.build(("order", "family", "species"), rows)


def _table(targets: list[list[int]], predictions: list[list[int]]) -> PredictionTable:
    num = len(targets)
    return PredictionTable(
        rows=np.arange(num),
        targets=np.array(targets),
        predictions=np.array(predictions),
        topk_ids=np.array([[row[-1], (row[-1] + 1) % 5] for row in predictions]),
        topk_probs=np.tile([0.7, 0.2], (num, 1)),
        margin=np.ones((num, 3)),
        loss=np.ones((num, 3)),
    )


def _random(num: int, seed: int = 0, unknown: float = 0.1) -> tuple[PredictionTable, Taxonomy]:
    tree = taxonomy.cub()
    rng = np.random.default_rng(seed)
    leaves = rng.integers(0, 200, num)
    targets = metrics.finest_paths(tree)[leaves].copy()
    targets[rng.random(num) < unknown, -1] = -1
    logits = [rng.normal(size=(num, classes)).astype(np.float32) for classes in tree.num_classes]
    for level in range(4):
        logits[level][np.arange(num), np.maximum(targets[:, level], 0)] += 2.5
    return from_logits(rng.permutation(num), targets, logits), tree


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [  # published values: Brown, Cai & DasGupta 2001; Newcombe 1998, table I (method 3)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_matches_published_values(correct: int, count: int, low: float, high: float) -> None:
    assert metrics.wilson_interval(correct, count) == pytest.approx((low, high), abs=6e-5)


def test_interval_of_nothing_says_nothing() -> None:
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)


def test_counts_leave_unknown_labels_out() -> None:
    table = _table([[0, 0, 0], [0, 0, -1], [1, -1, -1]], [[0, 0, 0], [0, 1, 1], [0, 2, 3]])
    levels = metrics.summary(table, _tree(), split="test", expected=4, weights="raw", step=7)["levels"]
    picked = {name: (part["correct"], part["count"], part["unknown"]) for name, part in levels.items()}
    assert picked == {"order": (2, 3, 0), "family": (1, 2, 1), "species": (1, 1, 2)}


def test_scores_match_plain_loops() -> None:
    table, tree = _random(700)
    target, said = table.targets[:, -1], table.predictions[:, -1]
    part = metrics.level_summary(table, 3, 200)
    precision, recall, f1 = [], [], []
    for kind in range(200):
        support = sum(t == kind for t in target)
        if not support:
            continue
        hits = sum(t == kind and p == kind for t, p in zip(target, said, strict=True))
        called = sum(p == kind and t >= 0 for t, p in zip(target, said, strict=True))
        precision.append(hits / called if called else 0.0)
        recall.append(hits / support)
        f1.append(2 * hits / (support + called))
    assert part["classes_present"] == len(recall) < 200
    assert part["macro_precision"] == pytest.approx(sum(precision) / len(precision))
    assert part["macro_recall"] == pytest.approx(sum(recall) / len(recall))
    assert part["macro_f1"] == pytest.approx(sum(f1) / len(f1))
    assert part["count"] == sum(target >= 0) and part["accuracy"] == part["correct"] / part["count"]
    assert tree.num_classes[3] == 200


def test_confusion_counts_every_known_pair() -> None:
    table, _ = _random(500)
    expected = Counter((t, p) for t, p in zip(table.targets[:, 1], table.predictions[:, 1], strict=True) if t >= 0)
    matrix = metrics.confusion_matrix(table.targets[:, 1], table.predictions[:, 1], 37)
    assert {(i, j): int(matrix[i, j]) for i, j in zip(*np.nonzero(matrix), strict=True)} == dict(expected)
    pairs = metrics.confused_pairs(matrix, 5)
    by_hand = sorted((n for (t, p), n in expected.items() if t != p), reverse=True)[:5]
    assert [count for _, _, count in pairs] == by_hand
    assert all(expected[(true, said)] == count and true != said for true, said, count in pairs)


def test_mistake_severity_is_the_height_of_the_common_ancestor() -> None:
    tree = _tree()  # a, b under f1; c under f2 (same order); d, e under f3 in another order
    table = _table([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, -1]], [[0, 0, s] for s in (0, 1, 2, 3, 4)])
    severity = metrics.mistake_severity(table, tree)
    assert severity == {"mistakes": 3, "mean": 2.0, "by_height": {"1": 1, "2": 1, "3": 1}}


def test_classes_without_a_known_parent_share_nothing() -> None:
    tree = taxonomy.build(("family", "species"), [(None, "a"), (None, "b"), ("f", "c")])
    logits = [np.zeros((1, 1), np.float32), np.array([[0, 1, 0]], np.float32)]
    table = from_logits(np.array([0]), np.array([[-1, 0]]), logits)
    assert metrics.mistake_severity(table, tree)["by_height"] == {"2": 1}
    assert metrics.consistency(table, tree)["count"] == 0


def test_consistency_asks_whether_coarse_answers_are_the_ancestors() -> None:
    table = _table([[0, 0, 0]] * 3, [[0, 0, 1], [0, 1, 1], [1, 2, 0]])
    assert metrics.consistency(table, _tree()) == {
        "consistent": 1,
        "count": 3,
        "levels": {"order": {"consistent": 2, "count": 3}, "family": {"consistent": 1, "count": 3}},
    }
    assert metrics.through_finest(table, _tree())["family"] == {"correct": 3, "count": 3}


def test_top_k_and_losses_come_from_the_logits() -> None:
    table, _ = _random(300, unknown=0.2)
    known = table.targets[:, -1] >= 0
    top = metrics.top_k(table)
    hits = sum(t in ids for t, ids in zip(table.targets[known, -1], table.topk_ids[known], strict=True))
    assert (top["k"], top["correct"], top["count"]) == (5, hits, int(known.sum()))
    assert np.isnan(table.loss[~known, -1]).all() and np.isfinite(table.loss[known]).all()
    first = np.flatnonzero(known & (table.targets[:, -1] == table.topk_ids[:, 0]))[0]
    assert math.exp(-table.loss[first, -1]) == pytest.approx(table.topk_probs[first, 0], rel=1e-5)


def test_near_ties_are_listed() -> None:
    logits = [np.array([[1.0, 1.0 + 5e-6, 0.0], [3.0, 1.0, 0.0]], dtype=np.float32)]
    table = from_logits(np.array([41, 42]), np.array([[0], [0]]), logits)
    assert table.near_ties().tolist() == [41]


def test_summary_is_plain_json_without_nan() -> None:
    table = _table([[-1, -1, -1]], [[0, 0, 0]])
    text = json.dumps(metrics.summary(table, _tree(), split="val", expected=1, weights="ema", step=3), allow_nan=False)
    assert json.loads(text)["levels"]["species"]["accuracy"] is None


def test_parts_of_ranks_make_the_whole_table() -> None:
    table, tree = _random(101)
    parts = [table.take(np.arange(101) % 3 == rank) for rank in range(3)]
    whole, alone = merge(parts), table.sorted()
    assert all(np.array_equal(getattr(whole, f), getattr(alone, f), equal_nan=True) for f in vars(alone))
    assert metrics.level_summary(whole, 3, 200)["correct"] == metrics.level_summary(table, 3, 200)["correct"]
    with pytest.raises(DataError, match="evaluated twice"):
        merge([*parts, parts[0].take(np.array([0]))])


def test_table_survives_the_file(tmp_path: Path) -> None:
    table, _ = _random(50)
    path = tmp_path / "evaluation" / "test.predictions.npz"
    table.save(path)
    again = PredictionTable.load(path)
    assert all(np.array_equal(getattr(again, f), getattr(table, f), equal_nan=True) for f in vars(table))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "text", "pickled"])
def test_damaged_table_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "test.predictions.npz"
    table, _ = _random(50)
    table.save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "pickled":
        np.savez(path, **{**vars(table), "rows": np.array([{}] * 50, dtype=object)})
    else:
        data = path.read_bytes()
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"<html>"}[damage])
    with pytest.raises(DataError, match="run the evaluation again"):
        PredictionTable.load(path)


def test_classes_outside_the_tree_are_refused() -> None:
    with pytest.raises(DataError, match="does not have"):
        metrics.summary(_table([[0, 0, 5]], [[0, 0, 0]]), _tree(), split="t", expected=1, weights="raw", step=1)
