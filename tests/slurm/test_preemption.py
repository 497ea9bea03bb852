"""Preempted, queued again by the script, and the same weights in the end (S3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests import run_state
from tests.conftest import Recipes
from tests.slurm.conftest import STEPS, Submit, resumed_steps


def test_a_preempted_run_ends_with_the_same_weights(
    long_recipe: Recipes, submit: Submit, reference: Callable[[Path, int], Path]
) -> None:
    recipe = long_recipe()
    job = submit(recipe, options=("--nodes=2", "--ntasks-per-node=1", "-p", "cancel20"))
    job.wait_for_step(20)
    job.preempt()
    job.wait_for_start(2)
    assert 20 <= job.newest() < STEPS, "preempted too late to show anything"
    assert job.end() == "COMPLETED", job.output
    assert len(resumed_steps(job.output)) == 1
    whole = reference(recipe, 2)
    assert run_state.tensors(job.run) == run_state.tensors(whole)
    assert run_state.lines(job.run) == run_state.lines(whole)
