"""The real launchers, and what their environments may not say (M2, P10)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launching, run_state
from tests.conftest import ROOT, Recipes
from vitdist.errors import UsageError
from vitdist.runtime.launcher import check_launcher
from vitdist.runtime.ranks import Ranks, discover

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port"],
    "accelerate": [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_real_launchers_give_the_same_losses(name: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(train={"max_duration": "4steps", "global_batch_size": 24})
    launcher = [*LAUNCHERS[name], str(launching.free_port())]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launcher, str(ROOT / "launch" / "train.py"), str(recipe), "out=launched"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, output = launching.run(2, ["train", str(recipe), "out=forked"], tmp_path)
    assert codes == [0, 0], output
    assert run_state.losses(tmp_path / "launched") == run_state.losses(tmp_path / "forked")
    assert json.loads((tmp_path / "launched" / "exit.json").read_text())["reason"] == "done"


def test_half_an_environment_is_refused(tiny_recipe: Recipes, tmp_path: Path) -> None:
    codes, output = launching.run(1, ["train", str(tiny_recipe())], tmp_path, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert codes == [2]
    assert "RANK, WORLD_SIZE set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing" in output
    assert not (tmp_path / "runs").exists()


def test_ranks_of_each_launcher() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert discover(torchrun) == Ranks(3, 4, 1, 2, "torchrun")
    srun = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}
    assert discover(srun) == Ranks(2, 4, 0, 2, "srun")
    assert discover({"MASTER_ADDR": "a", "MASTER_PORT": "1"}).world == 1
    with pytest.raises(UsageError, match="not a number"):
        discover({**torchrun, "RANK": "first"})
    with pytest.raises(UsageError, match="ranks count from 0"):
        discover({**torchrun, "RANK": "4"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ],
)
def test_a_launcher_that_contradicts_the_recipe_is_named(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{name}={value}.*the recipe says"):
        check_launcher("fp32", compile_model=False, environment={name: value})


def test_what_a_launcher_exports_by_default_is_no_statement() -> None:
    exported = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    check_launcher("bf16", compile_model=True, environment=exported)
    check_launcher("bf16", compile_model=False, environment={"ACCELERATE_MIXED_PRECISION": "bf16"})


def test_a_contradiction_stops_the_run(tiny_recipe: Recipes, tmp_path: Path) -> None:
    codes, output = launching.run(
        2, ["train", str(tiny_recipe())], tmp_path, env={"ACCELERATE_MIXED_PRECISION": "bf16"}
    )
    assert codes == [2, 2]
    assert output.count("ACCELERATE_MIXED_PRECISION=bf16") == 1
