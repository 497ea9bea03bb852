"""`vitdist checkpoint list|verify|export` on real runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import launching
from tests.checkpoint.damage import DAMAGES
from tests.conftest import Recipes
from vitdist.checkpoint.store import Store, verify
from vitdist.cli import main


@pytest.fixture
def run(tiny_recipe: Recipes, tmp_path: Path) -> Path:
    recipe = tiny_recipe(checkpoint={"every": "3steps", "keep_last": 3}, data__num_workers=0)
    codes, output = launching.run(1, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [0], output
    return tmp_path / "run"


def test_list_verify_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [step for step, _ in Store(run).published()]
    assert [int(line.split()[2]) for line in lines] == steps and steps[-1] == 12
    assert sum("last" in line for line in lines) == sum("best" in line for line in lines) == 1
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": sound") == len(steps)

    out = tmp_path / "to" / "give away"
    assert main(["checkpoint", "export", str(run), str(out)]) == 0
    assert main(["checkpoint", "verify", str(out)]) == 0
    assert not (out / "training.safetensors").exists() and not (out / "state.json").exists()
    shutil.rmtree(run / "checkpoints")
    codes, output = launching.run(1, ["evaluate", str(out), "--out", "found"], tmp_path)
    assert codes == [0] and "200 of 200 evaluated" in output, output
    assert main(["checkpoint", "export", str(out), str(out)]) == 2


def test_damage_is_named_and_is_exit_3(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGES["flipped model.safetensors"](Store(run).path_of(12))
    assert main(["checkpoint", "verify", str(run)]) == 3
    said = capsys.readouterr()
    assert "step_00000012: model.safetensors has changed since it was written" in said.out
    assert said.out.count(": sound") == len(Store(run).published()) - 1
    assert said.err.count("\n") == 1
    assert main(["checkpoint", "export", str(Store(run).path_of(12)), str(run / "x")]) == 3


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_folder_without_checkpoints(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", command, str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert said.startswith("vitdist: ") and said.count("\n") == 1 and "damaged" not in said


def test_what_the_umask_lets_others_read_they_can_read(run: Path) -> None:
    (newest, _) = Store(run).newest()
    assert newest is not None
    assert len({file.stat().st_mode for file in newest.iterdir()}) == 1


def test_a_report_is_not_written_into_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (newest, _) = Store(run).newest()
    assert newest is not None and main(["report", str(newest)]) == 2
    assert "give the folder of its run" in capsys.readouterr().err
    assert verify(newest) == []
