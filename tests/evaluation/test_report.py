"""The report from real run folders: what it says, what it says when something is missing, and what it never does."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.tiny import tiny_packed
from tests.evaluation.run_maker import draw_predictions, make_run, write_checkpoint, write_evaluation
from vitdist.data.index import DatasetIndex
from vitdist.data.pixels.images import decode
from vitdist.errors import UsageError
from vitdist.evaluation.metrics import class_scores, confusion_matrix
from vitdist.evaluation.pictures import Pictures
from vitdist.evaluation.report import build_report
from vitdist.taxonomy import Taxonomy


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return tiny_packed(
        tmp_path_factory.mktemp("set") / "tiny", num_classes=30, train_per_class=1, test_per_class=5, size=64
    )


@pytest.fixture
def run(tmp_path: Path, index: DatasetIndex) -> Path:
    return make_run(tmp_path / "my run", index, skill=1.5)


class _Page(HTMLParser):
    """Text and tags of a page, to look at it as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\xa0", " ").split())

    def urls(self) -> Iterator[str]:
        for _, attributes in self.tags:
            yield from (value or "" for name, value in attributes.items() if name in ("src", "href", "xlink:href"))


def _page(run: Path) -> _Page:
    return _Page(build_report(run).read_text(encoding="utf-8"))


def test_headline_comes_with_counts_interval_and_conditions(run: Path) -> None:
    page = _page(run)
    numbers = json.loads((run / "evaluation/test.json").read_text())["levels"]["species"]
    assert "150 of 150 evaluated" in page.text
    assert f"{100 * numbers['accuracy']:.2f} %" in page.text and f"{numbers['correct']} of 150 correct" in page.text
    low, high = numbers["interval"]
    assert f"{100 * low:.1f} – {100 * high:.1f} %" in page.text
    split = json.loads((run / "splits/test.json").read_text())["sha256"]
    assert split[:16] in page.text and "Seed 0" in page.text
    assert "Pretraining vit_base_patch16_224.orig_in21k" in page.text
    assert "moving average (EMA), step 480" in page.text and "Selected on test" not in page.text


def test_choosing_on_test_is_said(tmp_path: Path, index: DatasetIndex) -> None:
    run = make_run(tmp_path / "paper", index, protocol="paper")
    assert "Selected on test." in _page(run).text
    assert json.loads((run / "report/report.json").read_text())["selected_on_test"] is True


def test_a_left_out_sample_stands_beside_the_number(run: Path, index: DatasetIndex) -> None:
    table = draw_predictions(index, "test").take(np.arange(149))
    write_evaluation(run, index, table, damaged=["test/000000.tar: Tiny_001_0001: truncated"])
    text = _page(run).text
    assert text.count("149 of 150 evaluated") >= 3
    assert "test/000000.tar: Tiny_001_0001: truncated" in text


def test_page_needs_nothing_else(run: Path) -> None:
    page = _page(run)
    assert len(list(page.urls())) > 20
    assert all(url.startswith("data:") for url in page.urls())
    assert "@import" not in (text := build_report(run).read_text()) and "url(" not in text
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]


def test_pictures_are_those_of_the_mistaken_samples(run: Path, index: DatasetIndex) -> None:
    table = draw_predictions(index, "test", skill=1.5)
    wrong = np.flatnonzero(table.targets[:, -1] != table.predictions[:, -1])
    surest = wrong[np.argsort(-table.topk_probs[wrong, 0], kind="stable")][0]
    entry = index.split("test").samples[surest]
    shard = Path(index.split("test").shard_file(int(entry["shard"]))).read_bytes()
    original = decode(shard[entry["offset"] : entry["offset"] + entry["length"]])
    figure = build_report(run).read_text().split("<figure>")[1]
    uri = figure.split('src="')[1].split('"')[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))
    assert shown.shape == original.shape and np.abs(shown.astype(int) - original).mean() < 8
    assert f"row {surest}" in figure


def test_per_class_table_agrees_with_the_confusion_matrix(run: Path, index: DatasetIndex) -> None:
    build_report(run)
    table, tree = draw_predictions(index, "test", skill=1.5), index.taxonomy
    scores = class_scores(confusion_matrix(table.targets[:, -1], table.predictions[:, -1], 30))
    with (run / "report/per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(tree.names[-1])
    assert [int(row["correct"]) for row in rows] == scores.correct.tolist()
    assert [float(row["recall"]) for row in rows] == scores.recall.tolist()
    assert rows[7]["order"] == tree.path_names(tree.node("species", rows[7]["class"]))["order"]


def test_predictions_table_names_every_sample(run: Path, index: DatasetIndex) -> None:
    build_report(run)
    table, names = draw_predictions(index, "test", skill=1.5), index.taxonomy.names[-1]
    with (run / "report/predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 150 and len({row["key"] for row in rows}) == 150
    for row, target, answer in zip(rows, table.targets[:, -1], table.predictions[:, -1], strict=True):
        assert (row["true_species"], row["predicted_species"]) == (names[target], names[answer])
        assert row["top_1"] == row["predicted_species"] and row["true_species"][4:] in row["key"]


def test_names_cannot_become_markup(tmp_path: Path, index: DatasetIndex) -> None:
    evil = "<script>alert(1)</script>&\"'{{ 7*7 }}"
    run = make_run(tmp_path / "evil", index)
    tree = index.taxonomy
    species = tuple(f"{evil} {number}" for number in range(30))
    levels = (*tree.levels[:-1], "<em>species</em>")
    shutil.rmtree(run / "checkpoints")
    write_checkpoint(run, Taxonomy(levels, (*tree.names[:-1], species), tree.parents))
    summary = json.loads((run / "evaluation/test.json").read_text())
    summary["levels"] = dict(zip(levels, summary["levels"].values(), strict=True))
    summary["damaged"] = [evil]
    (run / "evaluation/test.json").write_text(json.dumps(summary))
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    page = _page(run)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and "em" not in tags and "<em>species</em>" in page.text
    assert page.text.count("<script>alert(1)</script>") > 30 and "{{ 7*7 }}" in page.text and "49" not in page.words


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("evaluation", "There is no final evaluation yet"),
        ("metrics.jsonl", "metrics.jsonl has no training step, so there are no curves."),
        ("environment.json", "environment.json is missing."),
        ("exit.json", "Trained for 480 steps, 12 epochs, and evaluated."),
        ("splits", "test (hash not recorded)"),
        ("checkpoints", "no checkpoint of the run holds its class tree"),
        ("recipe.yaml", "recipe.yaml is missing."),
        ("evaluation/test.predictions.npz", "test.predictions.npz is missing"),
    ],
)
def test_missing_parts_are_told(run: Path, missing: str, sentence: str) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert sentence in _page(run).text


def test_a_run_without_validation_says_so(tmp_path: Path, index: DatasetIndex) -> None:
    text = _page(make_run(tmp_path / "refit", index, protocol="refit")).text
    assert "There was no validation during this training" in text and "nothing was chosen on test" in text


@pytest.mark.parametrize("name", ["evaluation/test.json", "environment.json", "splits/test.json", "exit.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b"[1]",
        b'{"levels": 3}',
        b'{"levels": {"a": 3}}',
        b'{"levels": {"a": {}}, "count": "x"}',
        b"[" * 100_000,
    ],
)
def test_damaged_files_do_not_stop_the_report(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    assert "vitdist" in _page(run).text


def test_damaged_predictions_and_recipe_are_notes(run: Path) -> None:
    (run / "evaluation/test.predictions.npz").write_bytes(b"PK\x03\x04rubbish")
    (run / "recipe.yaml").write_text("train: [\n")
    text = _page(run).text
    assert "is no prediction table" in text and "recipe.yaml cannot be read by this vitdist" in text


def test_report_without_the_data_set_has_no_pictures(tmp_path: Path, index: DatasetIndex) -> None:
    copy = shutil.copytree(index.root, tmp_path / "copy")
    run = make_run(tmp_path / "run", index, data__path=str(copy))
    shutil.rmtree(copy)
    page = _page(run)
    assert "No pictures: " in page.text and "img" not in {tag for tag, _ in page.tags}
    assert (run / "report/predictions.csv").stat().st_size > 1000


def test_damaged_pictures_are_counted(tmp_path: Path, index: DatasetIndex) -> None:
    copy = shutil.copytree(index.root, tmp_path / "copy")
    run = make_run(tmp_path / "run", index, data__path=str(copy), skill=1.5)
    split = index.split("test")
    for number, shard in enumerate(split.shards):
        data = bytearray((copy / shard.path).read_bytes())
        for row in split.samples[split.samples["shard"] == number]:
            data[int(row["offset"]) + int(row["length"]) * 3 // 4] ^= 1  # still decodes: another picture
        (copy / shard.path).write_bytes(data)
    page = _page(run)
    assert "pictures could not be read." in page.text and "img" not in {tag for tag, _ in page.tags}


def test_validation_rows_are_looked_up_in_train(tmp_path: Path, index: DatasetIndex) -> None:
    run = make_run(tmp_path / "run", index)
    shutil.rmtree(run / "evaluation")
    write_evaluation(run, index, draw_predictions(index, "train", skill=0.5), split="train")
    (run / "evaluation/train.json").rename(run / "evaluation/val.json")
    (run / "evaluation/train.predictions.npz").rename(run / "evaluation/val.predictions.npz")
    about = json.loads((run / "splits/train.json").read_text())
    (run / "splits/val.json").write_text(json.dumps({**about, "name": "val"}))
    page = _page(run)
    keys = Pictures(index.split("train")).keys(np.arange(30))
    assert "img" in {tag for tag, _ in page.tags}
    with (run / "report/predictions.csv").open(encoding="utf-8", newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == list(keys.values())


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run folder"):
        build_report(tmp_path)


def test_report_is_the_same_when_built_again(run: Path) -> None:
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first
    assert sorted(path.name for path in (run / "report").iterdir()) == [
        "index.html",
        "per_class.csv",
        "predictions.csv",
        "report.json",
    ]
