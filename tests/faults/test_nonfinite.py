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


@pytest.fixture
def rolling(tiny_recipe: Recipes) -> Path:
    """Not finite at steps 5 and 6 on rank 1, which is past the limit: back to 3, and on with 7."""
    return tiny_recipe(
        train={"max_duration": "12steps", "global_batch_size": 24, "max_nonfinite_steps": 1, "max_rollbacks": 1},
        checkpoint={"every": "3steps", "keep_last": 100}, tracking={"log_samples": True}, ema={"decay": 0.9},
    )  # fmt: skip


def rolled(recipe: Path, folder: Path, out: str, *more: str, fault: str = "", codes: tuple[int, ...] = (0, 0)) -> str:
    env = {"VITDIST_FAULT": nan(1, 5, 6)["VITDIST_FAULT"] + fault}
    found, output = launching.run(2, ["train", str(recipe), f"out={out}", *more], folder, env=env)
    assert tuple(found) == codes, output
    return output


def test_past_the_limit_a_run_may_roll_back(rolling: Path, tmp_path: Path) -> None:
    output = rolled(rolling, tmp_path, "run")
    assert output.count("rollback 1 of 1: the weights are those of step 3 again, the batches up to step 6") == 1
    run = tmp_path / "run"
    assert [step for step, _ in run_state.losses(run)] == [1, 2, 3, *range(7, 13)]
    assert {"step": 6, "rolled_back_to": 3} in read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in read_metrics(run / "metrics.discarded.jsonl")] == [4, 5, 6]
    assert [record["step"] for record in written_down(run)] == [5, 6]
    before, after = (load_file(Store(run).path_of(step) / "training.safetensors") for step in (3, 6))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    record = json.loads((Store(run).path_of(12) / "state.json").read_text())["train"]
    assert (record["rollbacks"], record["num_nonfinite"], record["num_nonfinite_in_row"]) == ([[3, 6]], 2, 0)
    for path in Store(run).folder.glob("step_*/*.safetensors"):
        assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in load_file(path).values()), path
    for file in (run / "samples").glob("*.jsonl"):
        used = [json.loads(line)["step"] for line in file.read_text().splitlines()]
        assert used == [step for step in (1, 2, 3, *range(7, 13)) for _ in range(12)]
    assert "train: steps 4 to 6 were undone" in (run / "report" / "index.html").read_text()
    killed_and_resumed_it_is_the_same(rolling, tmp_path, "data,step=8", resumed=6)


def killed_and_resumed_it_is_the_same(recipe: Path, folder: Path, phase: str, *more: str, resumed: int) -> None:
    """The first start's fault; `run` is what was not killed."""
    out = phase.partition(",")[0]
    rolled(recipe, folder, out, *more, fault=f";kill:rank=0,phase={phase},attempt=1", codes=(-9, 6))
    output = rolled(recipe, folder, out, *more)
    assert f"resumed from step {resumed} " in output
    assert run_state.lines(folder / out) == run_state.lines(folder / "run")
    assert run_state.tensors(folder / out) == run_state.tensors(folder / "run")
    for rank in range(2):
        name = f"samples/rank_{rank:05d}.jsonl"
        assert (folder / out / name).read_text() == (folder / "run" / name).read_text()


# (where rank 0 is killed, the step that is resumed from)
PLACES = [("rollback", 3), ("before-publish,step=6", 3), ("before-pointer,step=6", 6), ("step,step=7", 6)]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "places"), [("ddp", PLACES), ("zero2", PLACES[1:2]), ("zero3", PLACES[3:])])
def test_a_rollback_may_be_killed(strategy: str, places: list[tuple[str, int]], rolling: Path, tmp_path: Path) -> None:
    more = f"parallel.strategy={strategy}"
    rolled(rolling, tmp_path, "run", more)
    assert [step for step, _ in run_state.losses(tmp_path / "run")] == [1, 2, 3, *range(7, 13)]
    for phase, resumed in places:
        killed_and_resumed_it_is_the_same(rolling, tmp_path, phase, more, resumed=resumed)


def test_rollbacks_are_limited(rolling: Path, tmp_path: Path) -> None:
    again = ";nan:rank=0,step=9,phase=loss;nan:rank=0,step=10,phase=loss"
    output = rolled(rolling, tmp_path, "run", fault=again, codes=(5, 5))
    assert output.count("rollback 1 of 1") == 1 and output.count("(from rank 0, after 1 of 1 rollbacks)") == 1
    output = rolled(rolling, tmp_path, "run", "train.max_rollbacks=2", fault=again)
    assert "resumed from step 9 " in output, "with one bad step behind it: not a good one to go back to"
    assert "rollback 2 of 2: the weights are those of step 6 again, the batches up to step 10" in output


def test_without_a_checkpoint_from_before_there_is_no_rollback(rolling: Path, tmp_path: Path) -> None:
    codes, output = launching.run(1, ["train", str(rolling), "out=run"], tmp_path, env=nan(0, 2, 3))
    assert codes == [5], output
    assert "vitdist: no checkpoint from before is there to go back to: 2 steps in a row up to step 3" in output
