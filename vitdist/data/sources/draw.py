"""Draws a test split where a source brings none: by class, whole groups on one side, the same for the same seed."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from vitdist.errors import UsageError

TEST_FRACTION = 0.2


def digest_of(text: str) -> str:
    """sha256 of any text, foreign file names included."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def draw_test(
    names: Sequence[str],
    labels: Sequence[Mapping[str, str]],
    groups: Sequence[str | None] | None = None,
    *,
    fraction: float,
    seed: int,
) -> list[str]:
    """'train' or 'test' for each sample: of every class with two or more photographs at least one is in each.

    `names` tell samples apart and decide where each goes. Samples of a group go together, under the class of the first.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"--test-fraction {fraction} is not in [0, 1)")
    units: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        group = groups[position] if groups is not None else None
        units[name if group is None else f"group {group}"].append(position)
    by_class: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for unit, members in units.items():
        first = min(members, key=lambda position: names[position])
        by_class[tuple(labels[first].values())].append(unit)
    splits = ["train"] * len(names)
    for candidates in by_class.values():
        for unit in _drawn(candidates, fraction, seed):
            for position in units[unit]:
                splits[position] = "test"
    return splits


def _drawn(units: list[str], fraction: float, seed: int) -> list[str]:
    num_test = round(fraction * len(units))
    if fraction and len(units) > 1:
        num_test = min(max(num_test, 1), len(units) - 1)
    return sorted(units, key=lambda unit: digest_of(f"{seed}/{unit}"))[:num_test]


def unseen_classes(splits: Sequence[str], labels: Sequence[Mapping[str, str]]) -> list[str]:
    """A note for each split with classes that training never sees."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split, path in zip(splits, labels, strict=True):
        counts[split][list(path.values())[-1]] += 1
    notes = []
    for split in sorted(set(counts) - {"train"}):
        if missing := sorted(counts[split].keys() - counts["train"].keys()):
            notes.append(f"{split} has {len(missing)} classes that train has not: {', '.join(missing[:3])}...")
    return notes
