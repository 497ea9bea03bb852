"""The real launchers, and what their environments may not say (M2, P10)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import launching, run_state
from tests.conftest import ROOT, Recipes
from vitdist.errors import UsageError
from vitdist.recipe.load import load_recipe
from vitdist.recipe.schema import Recipe
from vitdist.runtime.launcher import check_launcher
from vitdist.runtime.ranks import Ranks, discover

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port"],
    "accelerate": [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}


@pytest.mark.parametrize(("name", "strategy"), [("torchrun", "ddp"), ("accelerate", "ddp"), ("accelerate", "zero3")])
def test_real_launchers_give_the_same_losses(name: str, strategy: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(train={"max_duration": "4steps", "global_batch_size": 24}, parallel={"strategy": strategy})
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


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text("data: {path: nowhere}\n")
    return lambda *changes: load_recipe(path, changes)


@pytest.mark.parametrize(
    ("name", "value", "strategy", "key"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "ddp", "train.precision: fp32"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "ddp", "parallel.strategy: ddp"),
        ("ACCELERATE_USE_FSDP", "true", "ddp", "parallel.strategy: ddp"),
        ("ACCELERATE_USE_FSDP", "true", "zero3", "parallel.strategy: zero3"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ddp", "train.compile: false"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "ddp", "train.micro_batch_size"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2", "zero3", "parallel.strategy: zero3"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "zero3", "parallel.strategy: zero3"),
        ("ACCELERATE_GRADIENT_CLIPPING", "2.0", "zero3", "optimizer.clip_grad_norm: 1.0"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "zero3", "parallel.offload: none"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "zero3", "parallel.offload: none"),
    ],
)
def test_a_launcher_that_contradicts_the_recipe_is_named(
    name: str, value: str, strategy: str, key: str, recipes: Callable[..., Recipe]
) -> None:
    environment = {name: value, **({"ACCELERATE_USE_DEEPSPEED": "true"} if "_DEEPSPEED_" in name else {})}
    environment |= {"ACCELERATE_USE_DEEPSPEED": "true"} if name == "ACCELERATE_GRADIENT_CLIPPING" else {}
    with pytest.raises(UsageError, match=f"{name}={value}.*the recipe says {key}"):
        check_launcher(recipes(f"parallel.strategy={strategy}"), environment)


def test_what_a_launcher_exports_by_default_is_no_statement(recipes: Callable[..., Recipe]) -> None:
    exported = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    check_launcher(recipes("train.precision=bf16", "train.compile=true"), exported)
    check_launcher(recipes("train.precision=bf16"), {"ACCELERATE_MIXED_PRECISION": "bf16"})
    zero = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    }
    check_launcher(recipes("parallel.strategy=zero2"), zero)


def test_a_contradiction_stops_the_run(tiny_recipe: Recipes, tmp_path: Path) -> None:
    codes, output = launching.run(
        2, ["train", str(tiny_recipe())], tmp_path, env={"ACCELERATE_MIXED_PRECISION": "bf16"}
    )
    assert codes == [2, 2]
    assert output.count("ACCELERATE_MIXED_PRECISION=bf16") == 1
