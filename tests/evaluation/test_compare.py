"""Runs side by side, on the terminal and as Markdown."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from tests.data.tiny import tiny_packed
from tests.evaluation.run_maker import make_run
from vitdist.errors import UsageError
from vitdist.evaluation.commands import register
from vitdist.evaluation.compare import as_markdown, as_text, compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    index = tiny_packed(folder / "set", num_classes=20, train_per_class=1, test_per_class=4)
    return [
        make_run(folder / "base", index, skill=1.0),
        make_run(folder / "better", index, skill=4.0, optimizer__lr="3e-4", train__global_batch_size="128"),
        make_run(folder / "paper", index, skill=2.0, protocol="paper"),
    ]


def _rows(runs: list[Path]) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in compare(runs)}


def test_accuracies_come_with_counts_and_intervals(runs: list[Path]) -> None:
    rows = _rows(runs)
    assert rows[""] == ["base", "better", "paper"]
    assert rows["test"] == ["80 of 80 evaluated"] * 3
    for run, cell in zip(runs, rows["accuracy, species"], strict=True):
        level = json.loads((run / "evaluation/test.json").read_text())["levels"]["species"]
        low, high = (f"{100 * bound:.1f}" for bound in level["interval"])
        assert cell == f"{100 * level['accuracy']:.2f} % [{low}, {high}] {level['correct']}/80"
    assert list(rows)[2:5] == ["accuracy, species", "accuracy, family", "accuracy, order"]


def test_only_differing_recipe_keys_are_shown(runs: list[Path]) -> None:
    rows = _rows(runs)
    assert rows["optimizer.lr"] == ["0.0001", "0.0003", "0.0001"]
    assert rows["evaluation.protocol"] == ["val", "val", "paper"] and rows["selected on test"] == ["–", "–", "yes"]
    assert not {"name", "out", "seed", "model.backbone"} & set(rows)


def test_steps_and_time(runs: list[Path]) -> None:
    rows = _rows(runs)
    assert rows["steps"] == ["480", "480", "480"]
    assert rows["time in steps"][1] == "2 min 34 s"  # 480 steps of 128 pictures at about 400 a second


def test_missing_evaluation_is_said_and_same_names_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    bare = shutil.copytree(runs[0], tmp_path / "base")
    shutil.rmtree(bare / "evaluation")
    rows = _rows([runs[0], bare])
    assert rows[""] == [str(runs[0]), str(bare)]
    assert rows["test"][1] == "not evaluated" and rows["accuracy, species"][1] == "–"


def test_unreadable_recipe_hides_no_difference_of_the_others(runs: list[Path], tmp_path: Path) -> None:
    odd = shutil.copytree(runs[0], tmp_path / "odd")
    (odd / "recipe.yaml").write_text("nothing: known\n")
    rows = _rows([*runs[:2], odd])
    assert rows["optimizer.lr"] == ["0.0001", "0.0003", "–"] and "model.backbone" not in rows
    assert rows["recipe"][2].startswith("not readable")


def test_text_is_aligned_and_markdown_is_a_table(runs: list[Path]) -> None:
    table = compare(runs)
    lines = as_text(table).splitlines()
    column = lines[0].index("better")
    assert all(line[column - 2 : column] == "  " for line in lines if len(line) > column)
    markdown = as_markdown(table).splitlines()
    assert {line.count("|") for line in markdown} == {5} and markdown[1].startswith("| --- |")


def test_other_class_trees_are_said(runs: list[Path], tmp_path: Path) -> None:
    assert "class tree" not in _rows(runs)
    index = tiny_packed(tmp_path / "set", num_classes=6, train_per_class=1, test_per_class=1)
    trees = _rows([*runs[:2], make_run(tmp_path / "other", index)])["class tree"]
    assert trees[0] == trees[1] and trees[0].startswith("1/4/20 (") and trees[2].startswith("1/2/6 (")


def test_a_split_that_no_run_was_evaluated_on(runs: list[Path]) -> None:
    with pytest.raises(UsageError, match="vitdist evaluate RUN --split val"):
        compare(runs, "val")


def test_one_run_is_not_enough(runs: list[Path]) -> None:
    with pytest.raises(UsageError, match="two runs or more"):
        compare(runs[:1])


def test_commands(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    arguments = parser.parse_args(["compare", *map(str, runs), "--markdown"])
    assert arguments.function(arguments) == 0 and "| better |" in capsys.readouterr().out
    arguments = parser.parse_args(["report", str(runs[0])])
    assert arguments.function(arguments) == 0
    assert Path(capsys.readouterr().out.strip()) == runs[0] / "report" / "index.html"
