"""A run folder as its files tell it, read with patience: what is missing is None, what is damaged becomes a note."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitdist.checkpoint.store import MANIFEST, Store
from vitdist.errors import DataError, RecipeError, UsageError
from vitdist.evaluation.predictions import PredictionTable
from vitdist.metrics_log import read_metrics
from vitdist.recipe.load import load_recipe
from vitdist.taxonomy import Taxonomy

_MAX_JSON = 64 << 20


@dataclass(frozen=True)
class Evaluation:
    """One evaluation/<split>.json, with its predictions where they are there and fit the class tree."""

    split: str
    summary: dict[str, Any]
    table: PredictionTable | None

    @property
    def levels(self) -> dict[str, dict[str, Any]]:
        return dict(self.summary.get("levels") or {})

    @property
    def finest(self) -> tuple[str, dict[str, Any]] | None:
        """The last level and its numbers."""
        return list(self.levels.items())[-1] if self.levels else None


@dataclass(frozen=True)
class RunFolder:
    """Everything a report or a comparison reads of a run; `notes` say what could not be read."""

    path: Path
    name: str
    recipe: dict[str, Any]  # dotted key -> value
    recipe_text: str
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]  # test first
    splits: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    end: dict[str, Any]
    tree: Taxonomy | None
    notes: list[str] = field(default_factory=list)

    @property
    def training_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if "train/loss" in line and isinstance(line.get("step"), int)]

    @property
    def evaluation_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if "val/loss" in line and isinstance(line.get("step"), int)]


def read_run(path: Path) -> RunFolder:
    """Read a run folder; UsageError when it is none."""
    if (path / MANIFEST).exists():  # a report written into it would be a file that its manifest does not vouch for
        raise UsageError(f"{path} is a checkpoint; give the folder of its run")
    recipe_file = path / "recipe.yaml"
    if not recipe_file.is_file() and not (path / "metrics.jsonl").is_file():
        raise UsageError(f"{path} is no run folder: it has neither recipe.yaml nor metrics.jsonl")
    notes: list[str] = []
    recipe = _recipe(recipe_file, notes)
    tree = _tree(path, notes)
    splits = {file.stem: _object(file, notes) for file in sorted((path / "splits").glob("*.json"))}
    return RunFolder(
        path=path,
        name=str(recipe.get("name") or path.resolve().name),
        recipe=recipe,
        recipe_text=_text(recipe_file),
        metrics=read_metrics(path / "metrics.jsonl"),
        evaluations=_evaluations(path / "evaluation", tree, notes),
        splits=splits,
        environment=_object(path / "environment.json", notes),
        end=_object(path / "exit.json", notes),
        tree=tree,
        notes=notes,
    )


def _recipe(file: Path, notes: list[str]) -> dict[str, Any]:
    if not file.is_file():
        notes.append("recipe.yaml is missing.")
        return {}
    try:
        return load_recipe(file).flat()
    except RecipeError as error:
        notes.append(f"recipe.yaml cannot be read by this vitdist: {error.problems[0]}")
        return {}


def _tree(path: Path, notes: list[str]) -> Taxonomy | None:
    """The class tree of the best, else last, else newest checkpoint."""
    store = Store(path)
    folders = [store.pointed("best"), store.pointed("last"), *(folder for _, folder in reversed(store.published()))]
    for folder in folders:
        if folder is not None and (file := folder / "taxonomy.json").is_file():
            try:
                return Taxonomy.from_json(_object(file, notes))
            except DataError as error:
                notes.append(f"{file.relative_to(path)}: {error}")
    return None


def _evaluations(folder: Path, tree: Taxonomy | None, notes: list[str]) -> list[Evaluation]:
    found = []
    for file in sorted(folder.glob("*.json"), key=lambda file: (file.stem != "test", file.stem)):
        summary = _object(file, notes)
        if _holds_numbers(summary):
            found.append(Evaluation(file.stem, summary, _table(file, tree, summary, notes)))
        elif summary:
            notes.append(f"evaluation/{file.name} holds no numbers by level.")
    return found


def _holds_numbers(summary: dict[str, Any]) -> bool:
    levels = summary.get("levels")
    if not isinstance(levels, dict) or not all(isinstance(part, dict) for part in levels.values()):
        return False
    counts = [summary.get("count"), summary.get("expected")]
    counts += [part.get(name) for part in levels.values() for name in ("correct", "count")]
    return all(isinstance(count, int) for count in counts)


def _table(file: Path, tree: Taxonomy | None, summary: dict[str, Any], notes: list[str]) -> PredictionTable | None:
    path = file.with_suffix(".predictions.npz")
    try:
        table = PredictionTable.load(path)
    except DataError as error:
        notes.append(str(error))
        return None
    if len(table) != summary.get("count"):
        notes.append(f"{path.name} has {len(table)} samples, {file.name} says {summary.get('count')}; evaluate again.")
        return None
    fits = tree is not None and tree.num_levels == table.num_levels and list(tree.levels) == list(summary["levels"])
    if not fits or tree is None:
        notes.append(f"{path.name} cannot be told by class: no checkpoint of the run holds its class tree.")
        return None
    if (table.targets >= tree.num_classes).any() or (table.predictions >= tree.num_classes).any():
        notes.append(f"{path.name} names classes that the class tree does not have; evaluate again.")
        return None
    return table


def _object(file: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object of a file; empty when there is none."""
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > _MAX_JSON:
            raise ValueError("too large")
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return {}
    return data if isinstance(data, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
