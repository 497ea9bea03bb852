"""Preempted, queued again by the script, and the same weights in the end (S3)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import launching, run_state
from tests.conftest import Recipes
from tests.slurm.conftest import STEPS, Submit, resumed_steps

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


# GraceTime 20 under CANCEL is the hardest: only the ranks hear of it, and Slurm would not queue the job again
@pytest.mark.parametrize(
    "partition", [pytest.param("cancel20", marks=pytest.mark.every_time), "cancel0", "requeue20", "requeue0"]
)
def test_a_preempted_run_ends_with_the_same_weights(
    partition: str, long_recipe: Recipes, submit: Submit, tmp_path: Path
) -> None:
    recipe = long_recipe()
    job = submit(recipe, options=(*TWO_NODES, "-p", partition))
    job.wait_for_step(20)
    job.preempt()
    job.wait_for_end_of_start(1)
    whole = launching.start(2, ["train", str(recipe), "out=whole"], tmp_path)  # while Slurm holds the job back for 6 s
    job.wait_for_start(2)
    stopped_at = job.newest()
    assert 20 <= stopped_at < STEPS, "preempted too late to show anything"
    assert whole.wait(200) == [0, 0], whole.output
    assert job.end() == "COMPLETED", job.output
    assert resumed_steps(job.output) == [stopped_at]
    assert [event["reason"] for event in job.history if event["event"] == "end"][-2:] == ["preempted", "done"]
    assert run_state.tensors(job.run) == run_state.tensors(tmp_path / "whole")
    assert run_state.lines(job.run) == run_state.lines(tmp_path / "whole")


def test_preempted_while_the_ranks_are_still_importing(long_recipe: Recipes, submit: Submit) -> None:
    job = submit(long_recipe(), "train.max_duration=20steps", options=(*TWO_NODES, "-p", "cancel20"))
    job.wait_for_start(1)
    job.preempt()
    job.wait_for_start(2)
    assert job.end() == "COMPLETED", job.output
    assert job.newest() == 20
