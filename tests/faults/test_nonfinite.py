"""Numbers that are none: all ranks skip the step or all stop, and no later update takes effect (H3)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launching, run_state
from tests.conftest import Recipes
from tests.faults.running import exit_of
from vitdist.checkpoint.store import Store
from vitdist.metrics_log import read_metrics
from vitdist.training.guard import NonFiniteGuard


def nan(rank: int, *steps: int) -> dict[str, str]:
    return {"VITDIST_FAULT": ";".join(f"nan:rank={rank},step={step},phase=loss" for step in steps)}


def written_down(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world", [1, 4])
def test_a_bad_step_is_skipped_on_all_ranks_alike(world: int, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        ema={"decay": 0.9}, tracking={"log_samples": True}, checkpoint={"every": "1steps", "keep_last": 100}
    )
    command = ["train", str(recipe), "out=run"]
    codes, output = launching.run(world, command, tmp_path, env=nan(world - 1, 5, 7))
    assert codes == [0] * world, output
    run = tmp_path / "run"
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "lr" in line]
    assert [line["step"] for line in lines if line.get("nonfinite")] == [5, 7]
    before, after = (load_file(Store(run).path_of(step) / "training.safetensors") for step in (4, 5))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "weights, moments, average: untouched"
    assert json.loads((Store(run).path_of(12) / "state.json").read_text())["train"]["num_nonfinite"] == 2
    for path in Store(run).folder.glob("step_*/*.safetensors"):
        assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in load_file(path).values()), path
    samples = [json.loads(line) for file in (run / "samples").glob("*.jsonl") for line in file.read_text().splitlines()]
    for record in written_down(run):
        used = sorted((s["slot"], s["key"]) for s in samples if s["step"] == record["step"])
        assert record["keys"] == [key for _, key in used]
        assert record["ranks"] == [world - 1]


def test_past_the_limit_all_stop_and_nothing_later_takes_effect(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        train={"max_duration": "12steps", "global_batch_size": 24, "max_nonfinite_steps": 2},
        checkpoint={"every": "1steps", "keep_last": 100},
    )
    codes, output = launching.run(4, ["train", str(recipe), "out=run"], tmp_path, env=nan(2, 5, 6, 7))
    assert codes == [5] * 4, output
    assert output.count("vitdist: ") == 1 and "from rank 2" in output and "nonfinite.jsonl" in output
    run = tmp_path / "run"
    said = exit_of(run)
    assert (said["code"], said["reason"], said["requeue"]) == (5, "error", False)
    assert [record["step"] for record in written_down(run)] == [5, 6, 7]
    reference = load_file(Store(run).path_of(4) / "model.safetensors")
    newest, _ = Store(run).newest()
    assert newest is not None
    found = load_file(newest / "model.safetensors")
    assert all(torch.equal(reference[name], found[name]) for name in reference)


def test_the_limit_counts_through_a_resume(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(train={"max_duration": "12steps", "global_batch_size": 24, "max_nonfinite_steps": 1})
    stop = {"VITDIST_FAULT": "nan:rank=0,step=5,phase=loss;term:rank=0,step=4,phase=report"}
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path, env=stop)
    assert codes == [75, 75], output
    assert exit_of(tmp_path / "run")["step"] == 5, "the first of the bad steps is in the checkpoint"
    before = run_state.tensors(tmp_path / "run")
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path, env=nan(0, 6))
    assert codes == [5, 5], output
    assert run_state.tensors(tmp_path / "run") == before


def test_past_the_limit_good_steps_are_suppressed_too() -> None:
    """The report is read a step late: the step in between must not take effect on any rank."""
    guard = NonFiniteGuard(1, torch.device("cpu"))
    norms = (math.nan, 1.0, math.inf, math.nan, 1.0, 1.0)
    assert [guard.judge(torch.tensor(norm)).item() for norm in norms] == [1, 0, 1, 1, 1, 1]
    assert guard.total.item() == 3
