"""Preempted, queued again by the script, and the same weights in the end (S3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import run_state
from tests.conftest import Recipes
from tests.slurm.conftest import STEPS, Submit, resumed_steps

Reference = Callable[[Path, int], Path]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@pytest.mark.parametrize(
    "partition",
    [
        "cancel20",
        pytest.param("cancel0", marks=pytest.mark.slow),
        pytest.param("requeue20", marks=pytest.mark.slow),
        pytest.param("requeue0", marks=pytest.mark.slow),
    ],
)
def test_a_preempted_run_ends_with_the_same_weights(
    partition: str, long_recipe: Recipes, submit: Submit, reference: Reference
) -> None:
    recipe = long_recipe()
    job = submit(recipe, options=(*TWO_NODES, "-p", partition))
    job.wait_for_step(20)
    job.preempt()
    job.wait_for_start(2)
    stopped_at = job.newest()
    assert 20 <= stopped_at < STEPS, "preempted too late to show anything"
    assert job.end() == "COMPLETED", job.output
    assert resumed_steps(job.output) == [stopped_at]
    assert [event["reason"] for event in job.history if event["event"] == "end"][-2:] == ["preempted", "done"]
    whole = reference(recipe, 2)
    assert run_state.tensors(job.run) == run_state.tensors(whole)
    assert run_state.lines(job.run) == run_state.lines(whole)


@pytest.mark.slow
def test_preempted_while_the_ranks_are_still_importing(long_recipe: Recipes, submit: Submit) -> None:
    job = submit(long_recipe(), "train.max_duration=20steps", options=(*TWO_NODES, "-p", "cancel20"))
    job.wait_for_start(1)
    job.preempt()
    job.wait_for_start(2)
    assert job.end() == "COMPLETED", job.output
    assert job.newest() == 20
