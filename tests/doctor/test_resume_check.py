"""`vitdist doctor RECIPE --resume` sees each difference between an interrupted run and an uninterrupted one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import launching
from tests.conftest import ROOT, Recipes
from vitdist.checkpoint.store import Store
from vitdist.doctor.resume import compare


def last(run: Path) -> Path:
    found = Store(run).pointed("last")
    assert found is not None
    return found


def tensor(name: str, file: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = last(run) / file
        tensors = load_file(path)
        found = next(key for key in tensors if key.startswith(name))
        bits = tensors[found].reshape(-1).view(torch.uint8)
        bits[0] ^= 1  # the smallest change there is
        save_file(tensors, path)

    return change


def text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (path,) = run.glob(name)
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new, 1))

    return change


def state(section: str, key: str, value: object) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = last(run) / "state.json"
        data = json.loads(path.read_text())
        inner = data["train"][section] if section else data["train"]
        assert inner[key] != value
        inner[key] = value
        path.write_text(json.dumps(data))

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": tensor("model/", "training.safetensors"),
    "weights to use": tensor("", "model.safetensors"),
    "optimizer": tensor("optimizer/", "training.safetensors"),
    "EMA": tensor("ema/", "training.safetensors"),
    "losses": text("metrics.jsonl", '"train/loss": ', '"train/loss": 1'),
    "order of samples": text("samples/rank_00000.jsonl", '"seed": ', '"seed": 1'),
    "schedule": state("schedule", "best", 0.125),
    "counters": state("", "num_nonfinite", 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def test_every_part_that_differs_is_named(tiny_recipe: Recipes, folder: Path) -> None:
    recipe = tiny_recipe(
        ema={"decay": 0.9}, tracking={"log_samples": True}, lr_scheduler={"name": "plateau", "warmup": "2steps"}
    )
    for out, steps in (("whole", [8]), ("cut", [3, 8])):
        for step in steps:
            fault = {"VITDIST_FAULT": f"term:step={step},phase=step"}
            codes, output = launching.run(1, ["train", str(recipe), f"out={out}"], folder, env=fault)
            assert codes == [75], output
    assert list(compare(folder / "whole", folder / "cut")) == []
    for part, change in CHANGES.items():
        shutil.copytree(folder / "cut", folder / "changed", symlinks=True)
        change(folder / "changed")
        (said,) = compare(folder / "whole", folder / "changed")
        assert said.startswith(f"{part} ("), said
        shutil.rmtree(folder / "changed")


def ask(recipe: Path, *words: str, fault: str = "") -> tuple[int, str]:
    command = [sys.executable, "-m", "vitdist", "doctor", str(recipe), "--resume", *words]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"VITDIST_FAULT": fault} if fault else {}
    done = subprocess.run(command, cwd=recipe.parent, env=environment, capture_output=True, text=True)
    assert not list(recipe.parent.glob(".doctor-*")) and not (recipe.parent / "runs").exists(), "nothing is left behind"
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_sound_machine_resumes_to_the_bit(tiny_recipe: Recipes) -> None:
    code, said = ask(tiny_recipe(ema={"decay": 0.9}), "--ranks", "3", "--steps", "3,4")
    assert code == 0 and said.startswith("identical (8 steps on 3 ranks, interrupted after 3): weights, optimizer"), (
        said
    )


@pytest.mark.slow
def test_without_the_cure_for_ddps_buckets_the_difference_is_found(tiny_recipe: Recipes) -> None:
    code, said = ask(tiny_recipe(), "--ranks", "3", fault="cold:phase=warm-up")
    assert code == 3 and said.startswith("vitdist: not identical (9 steps on 3 ranks, interrupted after 4): "), said
    assert "weights to use (" in said and "optimizer (" in said and "order of samples" not in said


@pytest.mark.slow
def test_a_training_that_fails_speaks_for_itself(tiny_recipe: Recipes) -> None:
    code, said = ask(tiny_recipe(data__path="nowhere"))
    assert code == 4 and said.count("\n") == 1 and "nowhere" in said, said
    code, said = ask(tiny_recipe(train__max_duration="3steps", lr_scheduler={"warmup": "1steps"}))
    assert code == 2 and "ends before step 8" in said, said


def test_it_wants_a_recipe(tmp_path: Path) -> None:
    codes, output = launching.run(1, ["doctor", "--resume"], tmp_path)
    assert codes == [2] and "vitdist doctor RECIPE --resume" in output
