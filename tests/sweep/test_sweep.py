"""`vitdist sweep`: what a list stands for, runs that are real trainings, resumed and stopped, and their table."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launching, run_state
from tests.conftest import ROOT, Recipes
from tests.faults.running import exit_of, last_step, wait_for
from vitdist.cli import main
from vitdist.errors import UsageError
from vitdist.metrics_log import read_metrics
from vitdist.sweep.grid import settings_of, values_of
from vitdist.sweep.runs import prepare
from vitdist.sweep.table import spread


def test_lists_are_every_combination_with_every_seed() -> None:
    found = settings_of(["optimizer.lr=1e-3,3e-3", "model.head=linear,attention", "train.compile=false"], [5, 6])
    assert len(found) == 8 and len({setting.label for setting in found}) == 8
    assert found[0].overrides == ("train.compile=false", "optimizer.lr=1e-3", "model.head=linear", "seed=5")
    assert (found[0].label, found[0].group) == ("lr=1e-3_head=linear_seed=5", "lr=1e-3_head=linear")
    assert {setting.group for setting in found[:2]} == {found[0].group}
    assert [setting.label for setting in settings_of([], [0, 1])] == ["seed=0", "seed=1"]
    assert [setting.label for setting in settings_of([], [])] == ["recipe"]


def test_commas_of_a_value_are_its_own() -> None:
    assert values_of("augment.crop_scale=[0.4,1.0],[0.6, 1.0]") == ["[0.4,1.0]", "[0.6, 1.0]"]
    assert values_of("loss.level_weights={species: 1, genus: 0.5}") == ["{species: 1, genus: 0.5}"]
    assert values_of("model.weights='a,b',none") == ["'a,b'", "none"]
    both = settings_of(["lr_scheduler.name=cosine,plateau", "tracking.project=a/b,c"], [])
    assert [setting.label for setting in both][1] == "name=cosine_project=c"
    assert "/" not in both[0].label and both[0].label.startswith("name=cosine_project=a-b-")
    same = settings_of(["lr_scheduler.name=cosine,plateau", "optimizer.name=sgd,adam"], [])
    assert same[0].label == "lr_scheduler.name=cosine_optimizer.name=sgd"


def test_a_launcher_whose_quotes_do_not_close() -> None:
    with pytest.raises(UsageError, match="cannot be read: No closing quotation"):
        prepare(Path("demo.yaml"), [], Path("out"), "torchrun '--x")


@pytest.mark.parametrize(
    ("overrides", "seeds", "words"),
    [
        (["name=a,b"], [], "name is given to each run"),
        (["out=x"], [], "--out DIR"),
        (["seed=1,2"], [0, 1], "give one of them"),
        (["optimizer.lr"], [], "sets no key"),
        (["optimizer.lr=1,1"], [], "comes twice"),
        ([f"seed={','.join(map(str, range(1001)))}"], [], "more than 1,000"),
    ],
)
def test_lists_that_cannot_be(overrides: list[str], seeds: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings_of(overrides, seeds)


def test_spread_is_mean_and_deviation_of_a_sample() -> None:
    assert spread([0.5, 0.7]) == "60.00 ± 14.14 % (2 runs)"
    assert spread([0.5]) == "50.00 % (1 run)"
    assert spread([1.0, 2.0, 3.0], percent=False) == "2 ± 1 (3 runs)"


def _on_one_core() -> None:
    """As tests.launching has it: threads follow the cores, and threads change bits."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def start(recipe: Path, cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "vitdist", "sweep", str(recipe), *arguments],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=_on_one_core,
    )  # fmt: skip


def test_stopped_resumed_and_side_by_side(tiny_recipe: Recipes, tmp_path: Path) -> None:
    """Ctrl-C in the first run: it saves, the sweep ends with 75; the same command goes on, then has nothing to do."""
    recipe = tiny_recipe(train__max_duration="8steps", data__num_workers=0, evaluation={"every": "4steps"})
    arguments = ["optimizer.lr=3e-3", "--seeds", "2", "--out", "all"]
    sweep = start(recipe, tmp_path, *arguments)
    first = tmp_path / "all" / "seed=7"
    wait_for(lambda: last_step(first) >= 1, "the first run's first step", 120)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
    text = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 75, text
    assert "stopped during seed=7; the same command goes on there" in text and "0 of 1" in text
    assert exit_of(first)["code"] == 75 and not (tmp_path / "all" / "seed=8").exists()
    text = start(recipe, tmp_path, *arguments).communicate(timeout=240)[0]
    assert "[1/2] seed=7: goes on" in text and "[2/2] seed=8: starts" in text
    _check_table(text, tmp_path / "all")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("metrics.jsonl")}
    sweep = start(recipe, tmp_path, *arguments)
    again = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 0 and again.count("done before") == 2 and again.endswith(text[text.index("setting") :])
    assert written == {path: path.stat().st_mtime_ns for path in written}
    codes, output = launching.run(1, ["train", str(recipe), "optimizer.lr=3e-3", "seed=7", "out=plain"], tmp_path)
    assert codes == [0], output
    assert run_state.tensors(first) == run_state.tensors(tmp_path / "plain"), "stopped, resumed, and a run like others"


def _check_table(text: str, folder: Path) -> None:
    """A line for the setting with its two seeds' mean, then a column a run."""
    best = []
    for seed in (7, 8):
        lines = read_metrics(folder / f"seed={seed}" / "metrics.jsonl")
        best.append(max(line["val/accuracy/species"] for line in lines if "val/count" in line))
    row = next(line for line in text.splitlines() if line.startswith("recipe "))
    assert f"2 of 2 accuracy/species {spread(best)}" in " ".join(row.split()) and "of 200" in row
    assert any(line.split() == ["seed=7", "seed=8"] for line in text.splitlines())
    assert any(line.split() == ["seed", "7", "8"] for line in text.splitlines()) and "choose by val" in text


def test_nothing_begins_where_something_is_wrong(
    tiny_recipe: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(tiny_recipe())
    assert main(["sweep", recipe, "optimizer.lr=1e-3,-1"]) == 2
    assert "optimizer.lr: -1 is out of range" in capsys.readouterr().err
    assert main(["sweep", recipe, "optimizer.lr=1e-3,2e-3", "--launcher", "nosuchlauncher -n 2"]) == 2
    assert "names no program" in capsys.readouterr().err
    assert main(["sweep", recipe, "--seeds", "-1"]) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused_and_a_failure_is_passed_over(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__max_duration="2steps", data__num_workers=0, evaluation={"every": "2steps"})
    lost = shutil.copytree(Path(os.path.realpath(_data(recipe))), tmp_path / "lost")
    next((lost / "train").glob("*.tar")).unlink()
    sweep = start(recipe, tmp_path, f"data.path={lost},{_data(recipe)}", "--out", "all")
    text = sweep.communicate(timeout=120)[0]
    assert sweep.returncode == 4, text
    assert "ended with 4" in text and text.count(": starts in") == 2
    done = [folder for folder in (tmp_path / "all").iterdir() if (folder / "exit.json").exists()]
    assert 0 in {exit_of(folder)["code"] for folder in done}
    sweep = start(recipe, tmp_path, f"data.path={lost},{_data(recipe)}", "--out", "all", "optimizer.lr=5e-3")
    text = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 2 and "holds a run with another optimizer.lr" in text and "starts in" not in text


def _data(recipe: Path) -> str:
    from vitdist.recipe import load_recipe

    return load_recipe(recipe).data.path


@pytest.mark.slow
def test_under_torchrun(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__max_duration="4steps")
    launcher = f"torchrun --nproc-per-node 2 --master-port {launching.free_port()}"
    sweep = start(recipe, tmp_path, "optimizer.lr=1e-3,2e-3", "--out", "all", "--launcher", launcher)
    text = sweep.communicate(timeout=240)[0]
    assert sweep.returncode == 0, text
    assert text.count("2 ranks x micro-batch 12") == 2 and "1 of 1" in text
