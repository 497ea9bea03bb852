"""What a user gets wrong is said in one line, once and not per rank, with its exit code and no traceback."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests import launching
from tests.conftest import Recipes
from tests.data.tiny import tiny_packed
from vitdist.cli import main
from vitdist.data.index import DatasetIndex
from vitdist.doctor.wishes import wishes
from vitdist.recipe.load import load_recipe
from vitdist.runtime.failures import EXIT_FILE


def said(output: str) -> list[str]:
    """What was printed, without the marks between ranks and what a start says of itself."""
    return [line for line in output.splitlines() if line and not line.startswith("--- rank")]


@pytest.mark.parametrize("world", [1, 2])
def test_a_typo_in_the_recipe(world: int, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(optimizer={"lerning_rate": 1e-3})
    codes, output = launching.run(world, ["train", str(recipe)], tmp_path)
    assert codes == [2] * world
    (line,) = said(output)
    assert line.startswith(f"{recipe}:") and "optimizer.lerning_rate: unknown key; did you mean" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_a_data_folder_that_is_not_there(world: int, tiny_recipe: Recipes, tmp_path: Path) -> None:
    codes, output = launching.run(world, ["train", str(tiny_recipe()), "data.path=nowhere"], tmp_path)
    assert codes == [4] * world
    (line,) = said(output)
    assert "nowhere holds no packed set" in line and "vitdist data" in line
    assert not (tmp_path / "runs").exists()


def test_a_missing_shard(tiny_recipe: Recipes, tmp_path: Path) -> None:
    index = tiny_packed(tmp_path / "own", num_classes=20, train_per_class=4, test_per_class=1)
    gone = index.split("train").shards[0].path
    (index.root / gone).unlink()
    codes, output = launching.run(2, ["train", str(tiny_recipe()), f"data.path={index.root}"], tmp_path)
    assert codes == [4, 4]
    (line,) = said(output)
    assert gone in line


@pytest.fixture
def short_run(tiny_recipe: Recipes, tmp_path: Path) -> Path:
    recipe = tiny_recipe(train={"max_duration": "2steps", "global_batch_size": 24})
    codes, output = launching.run(1, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [0], output
    assert json.loads((tmp_path / "run" / EXIT_FILE).read_text())["code"] == 0
    return tmp_path / "run"


def test_a_checkpoint_of_another_tree(short_run: Path, tmp_path: Path) -> None:
    other = tiny_packed(tmp_path / "other", num_classes=20, train_per_class=4, test_per_class=1)
    codes, output = launching.run(2, ["evaluate", str(short_run), f"data.path={other.root}"], tmp_path)
    assert codes == [3, 3]
    (line,) = said(output)
    assert "another class tree" in line


def test_a_run_folder_with_another_recipe(short_run: Path, tiny_recipe: Recipes, tmp_path: Path) -> None:
    before = (short_run / EXIT_FILE).read_text()
    recipe = tiny_recipe(train={"max_duration": "2steps", "global_batch_size": 24}, optimizer={"lr": 5e-4})
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [2, 2]
    (line,) = said(output)
    assert "optimizer.lr (0.001 -> 0.0005)" in line and "out=..." in line and "--resume never" in line
    assert (short_run / EXIT_FILE).read_text() == before
    codes, output = launching.run(1, ["train", str(recipe), "out=run", "--resume", "never"], tmp_path)
    assert codes == [0], output
    assert (tmp_path / "run.old-1" / EXIT_FILE).read_text() == before


def test_a_monitored_level_that_the_tree_lacks_stops_before_the_first_step(
    tiny_recipe: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(checkpoint={"monitor": "val/accuracy/genius"})
    assert main(["plan", str(recipe)]) == 2 and "'genius'" in capsys.readouterr().err
    (finding,) = (found for found in wishes(load_recipe(recipe), 1, 1) if found.topic == "data")
    assert finding.mend == "use one of order, family, species"
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [2, 2], output
    (line,) = said(output)
    assert "checkpoint.monitor" in line and "'genius'" in line and "order, family, species" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_checkpoint_is_evaluated_as_the_model_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path), "model.weights=other"]) == 2
    assert "model.weights: a checkpoint is evaluated as the model it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["", "nope", "predict", "predict run x --top many", "data table t out --part 0/3", "sweep r --lr-low x",
     "checkpoint export run out --format onnx", "train"],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("vitdist: ") and err.count("\n") == 1 and "--help" in err


def test_an_empty_argument_is_not_the_working_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "run", ""]) == 2
    assert capsys.readouterr().err == "vitdist: an argument is empty; is a shell variable not set?\n"


def test_a_file_where_a_folder_should_be_written(
    tiny: DatasetIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    shard = tiny.root / tiny.split("test").shards[0].path
    assert main(["data", "index", str(shard), "--out", str(tmp_path / "file" / "x")]) == 7
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "file") in err and "Not a directory" in err
    assert main(["recipe", "copy", "demo", str(tmp_path / "file" / "x.yaml")]) == 2
    assert f"{tmp_path / 'file'} is there already" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    codes, output = launching.run(1, ["evaluate", "empty"], tmp_path)
    assert codes == [3]
    assert "neither a run nor a checkpoint" in said(output)[0]


def test_a_damaged_image_stops_all_ranks_and_names_it(tiny_recipe: Recipes, tmp_path: Path) -> None:
    index = tiny_packed(tmp_path / "own", num_classes=20, train_per_class=4, test_per_class=1)
    split = index.split("train")
    row = split.samples[11]
    shard = index.root / split.shards[int(row["shard"])].path
    with shard.open("r+b") as file:
        file.seek(int(row["offset"]) + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    recipe = tiny_recipe(data={"path": str(index.root), "image_size": 32, "num_workers": 1, "val": {"fraction": 0.1}})
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [4, 4], output
    named = [line for line in said(output) if "vitdist:" in line]
    assert len(named) == 1 and "checksum" in named[0] and shard.name in named[0]
    ending = json.loads((tmp_path / "run" / EXIT_FILE).read_text())
    assert (ending["code"], ending["reason"], ending["requeue"]) == (4, "error", False)
    skipping = ["train", str(recipe), "out=skipped", "data.on_bad_sample=skip"]
    codes, output = launching.run(2, skipping, tmp_path)
    assert codes == [0, 0], output
    assert "damaged sample" in output


def test_a_second_writer(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(train={"max_duration": "2000steps", "global_batch_size": 24})
    first = launching.start(1, ["train", str(recipe), "out=run"], tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [2, 2]
    (line,) = said(output)
    assert f"process {first.ranks[0].pid}" in line and "out=..." in line
    first.ranks[0].process.terminate()
    assert first.wait() == [75]
    ending = json.loads((tmp_path / "run" / EXIT_FILE).read_text())
    assert (ending["code"], ending["reason"], ending["requeue"]) == (75, "signal", True)
    shutil.rmtree(tmp_path / "run")


def test_interrupted_by_ctrl_c(tiny_recipe: Recipes, tmp_path: Path) -> None:
    import os

    recipe = tiny_recipe(train={"max_duration": "2000steps", "global_batch_size": 24})
    job = launching.start(2, ["train", str(recipe), "out=run"], tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in job.ranks:
        os.kill(rank.pid, signal.SIGINT)
    assert job.wait(30) == [75, 75], job.output
    assert job.output.count("stopped on request") == 1
