"""Every other way in which a job ends early, each on real nodes (S3, S4, S6)."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import launching, run_state
from tests.conftest import ROOT, Recipes
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import STEPS, Submit, Submitted, resumed_steps
from vitdist.checkpoint.store import Store
from vitdist.metrics_log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
Reference = Callable[[Path, int], Path]
MANY = 2000
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture
def mended(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with its nodes whole again afterwards."""
    yield cluster
    for name in set(cluster.nodes) - set(cluster.hosts):
        cluster.boot(name)
    for name in cluster.nodes:
        cluster.heal(name)
        cluster.try_call("scontrol", "update", f"nodename={name}", "state=resume")
    cluster.until(cluster.is_idle, 90, "all nodes to be back")


def cut_by_time_limit(job: Submitted) -> None:
    """Let the time limit come in 20 s, and take it away again for the next start."""
    number = job.num_starts
    end = datetime.now() + timedelta(seconds=20)
    job.cluster.call("scontrol", "update", f"jobid={job.id}", f"EndTime={end:%Y-%m-%dT%H:%M:%S}")
    job.cluster.until(lambda: job.cluster.state(job.id) == "PENDING", 120, "the requeue")
    job.cluster.call("scontrol", "update", f"jobid={job.id}", "TimeLimit=UNLIMITED")
    job.wait_for_start(number + 1)


def lose_a_node(job: Submitted, name: str) -> None:
    """Power off one of the job's nodes and wait until it runs on others."""
    number = job.num_starts
    job.cluster.kill(name)
    job.wait_for_start(number + 1)


def hosts(job: Submitted) -> list[str]:
    return job.cluster.call("scontrol", "show", "hostnames", job.cluster.show(job.id)["NodeList"]).split()


def test_preempted_cut_by_limits_and_a_killed_node_it_ends_the_same(
    long_recipe: Recipes, submit: Submit, reference: Reference, mended: Cluster
) -> None:
    # Slurm looks at time limits every 30 s, in which an idle machine makes 600 steps
    recipe = long_recipe(train__max_duration=f"{MANY}steps", checkpoint__every="50steps", tracking__wandb="offline")
    job = submit(recipe, options=(*TWO_NODES, "-p", "cancel20", "--time=60"))
    job.wait_for_step(20)
    job.preempt()
    job.wait_for_start(2)
    for _ in range(3):
        job.wait_for_step(job.newest() + 50)
        cut_by_time_limit(job)
    job.wait_for_step(job.newest() + 50)
    lose_a_node(job, hosts(job)[1])
    assert job.newest() < MANY, "too fast to show anything"
    assert job.end(600) == "COMPLETED", job.output
    assert job.num_starts == 6 and len(resumed_steps(job.output)) == 5, job.output
    whole = reference(recipe, 2)
    assert run_state.tensors(job.run) == run_state.tensors(whole)
    assert run_state.lines(job.run) == run_state.lines(whole)
    assert len({folder.name.rsplit("-", 1)[1] for folder in (job.run / "wandb").glob("offline-run-*")}) == 1


def test_the_batch_host_dies(long_recipe: Recipes, submit: Submit, reference: Reference, mended: Cluster) -> None:
    recipe = long_recipe()
    job = submit(recipe, options=TWO_NODES)
    job.wait_for_step(20)
    lose_a_node(job, hosts(job)[0])
    assert job.end() == "COMPLETED", job.output
    assert run_state.tensors(job.run) == run_state.tensors(reference(recipe, 2))


def test_a_node_cut_off_from_the_network_publishes_nothing_more(
    long_recipe: Recipes, submit: Submit, reference: Reference, mended: Cluster
) -> None:
    recipe = long_recipe(parallel__timeout="30s")
    job = submit(recipe, options=TWO_NODES)
    job.wait_for_step(20)
    batch_host = hosts(job)[0]
    mended.cut(batch_host)  # rank 0 lives on there, and sees the run's folder as before
    job.wait_for_start(2)
    assert batch_host not in hosts(job)
    assert job.end() == "COMPLETED", job.output
    mended.heal(batch_host)
    assert run_state.tensors(job.run) == run_state.tensors(reference(recipe, 2))


def test_a_job_ended_by_scancel_stays_ended(long_recipe: Recipes, submit: Submit) -> None:
    job = submit(long_recipe(), options=(*TWO_NODES, "-p", "cancel20"))
    job.wait_for_step(20)
    job.cluster.call("scancel", job.id)
    assert job.end() == "CANCELLED"
    job.cluster.until(lambda: job.id not in job.cluster.queue(), 30, "the job to leave")
    assert "ended by scancel" in job.output
    assert json.loads((job.run / "exit.json").read_text())["code"] == 75, "it saved before it went"
    stopped_at = job.newest()
    assert 20 < stopped_at < STEPS and job.num_starts == 1
    again = submit(long_recipe(), options=TWO_NODES)
    assert again.end() == "COMPLETED"
    assert resumed_steps(again.output) == [stopped_at]


def test_scancel_within_the_grace_time_stays_ended(long_recipe: Recipes, submit: Submit) -> None:
    job = submit(long_recipe(), options=(*TWO_NODES, "-p", "cancel20"))
    job.wait_for_step(20)
    job.preempt()
    job.cluster.until(lambda: job.cluster.show(job.id).get("PreemptTime", "None") != "None", 20, "preemption")
    job.cluster.call("scancel", job.id)
    assert job.end() == "CANCELLED", job.output
    assert job.num_starts == 1


def test_a_signal_sent_by_hand_saves_and_queues_again(long_recipe: Recipes, submit: Submit) -> None:
    job = submit(long_recipe(), options=TWO_NODES)
    job.wait_for_start(1)
    job.cluster.call("scancel", "--signal=USR1", "--batch", job.id)  # the ranks are still importing
    job.wait_for_start(2)
    job.wait_for_step(20)
    job.cluster.call("scancel", "--signal=USR1", "--full", job.id)
    job.wait_for_start(3)
    assert job.end() == "COMPLETED", job.output
    assert len(resumed_steps(job.output)) == 1


def test_a_signal_that_comes_before_srun_can_hand_it_on(long_recipe: Recipes, submit: Submit, tmp_path: Path) -> None:
    site = tmp_path / "site.sh"  # an srun that takes 10 s to start its tasks, and drops signals until then
    site.write_text('srun() { trap \'\' USR1; sleep 10; trap - USR1; exec "$(type -P srun)" "$@"; }\n')
    job = submit(long_recipe(), "train.max_duration=2000steps", options=TWO_NODES, env={"VITDIST_SITE": str(site)})
    job.wait_for_start(1)
    time.sleep(3)
    job.cluster.call("scancel", "--signal=USR1", "--batch", job.id)
    job.wait_for_start(2)
    assert "stopped before the training began" in job.output or "requeue: signal at step" in job.output


@pytest.mark.parametrize("way", ["max_time", "stop_file"])
def test_a_stop_that_was_asked_for_is_no_requeue(way: str, long_recipe: Recipes, submit: Submit) -> None:
    changes = {"train__max_duration": "2000steps"}
    job = submit(long_recipe(**changes), *(["train.max_time=8s"] if way == "max_time" else []), options=TWO_NODES)
    if way == "stop_file":
        job.wait_for_step(20)
        (job.run / "STOP").touch()
    assert job.end() == "FAILED"  # by its exit code, 75: what depends on the run's end must not start
    assert job.cluster.show(job.id)["ExitCode"] == "75:0"
    assert f"no requeue: {way} at step" in job.output


def test_from_two_ranks_to_four_to_one(
    long_recipe: Recipes, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    recipe = long_recipe(train__max_duration="400steps", checkpoint__keep_last=100)
    changes: list[int] = []
    for number, world in enumerate([2, 4, 1]):
        if number:
            changes.append(world_changes_here(tmp_path, number))
        job = submit(recipe, options=(f"--nodes={world}", "--ntasks-per-node=1"))
        if world == 1:
            assert job.end() == "COMPLETED", job.output
            break
        job.wait_for_step(job.newest() + 40)
        job.cluster.call("scancel", job.id)
        job.end()
        job.cluster.until(lambda job=job: job.id not in job.cluster.queue(), 30, "the job to leave")
    assert used(job.run) == used(reference(recipe, 2))
    for number, (step, old_world) in enumerate(zip(changes, [2, 4], strict=True), 1):
        unchanged = tmp_path / f"unchanged{number}"
        launching.run(old_world, ["train", str(recipe), f"out={unchanged.name}"], tmp_path, timeout=240)
        for a, b in zip(losses(job.run, step), losses(unchanged, step), strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def world_changes_here(tmp_path: Path, number: int) -> int:
    """Keep a copy of the run as it is before it goes on with another number of ranks; its step."""
    shutil.copytree(tmp_path / "job", tmp_path / f"unchanged{number}", symlinks=True)
    return Store(tmp_path / "job").published()[-1][0]


def losses(run: Path, after: int) -> list[float]:
    """The 20 losses after a step."""
    found = {line["step"]: line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "lr" in line}
    return [found[step] for step in range(after + 1, after + 21)]


def used(run: Path) -> list[tuple[Any, ...]]:
    """What stood in every slot of every global batch, whichever rank took it."""
    records = [json.loads(line) for file in (run / "samples").glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted((r["step"], r["epoch"], r["slot"], r["key"], r["seed"], r["partner"], r["mix"]) for r in records)


def test_seeds_of_an_array_train_apart_and_are_queued_again_apart(
    long_recipe: Recipes, submit: Submit, tmp_path: Path
) -> None:
    recipe = long_recipe()
    job = submit(recipe, options=("--array=3,5", "--nodes=1", "--ntasks-per-node=1"))
    third, fifth = (replace(job, run=job.run / f"seed-{seed}") for seed in (3, 5))
    third.wait_for_step(20)
    job.cluster.call("scancel", "--signal=USR1", "--full", f"{job.id}_3")
    third.wait_for_start(2)
    job.cluster.until(lambda: job.id not in job.cluster.queue(), 240, "the array's end")
    assert (third.num_starts, fifth.num_starts) == (2, 1), job.output
    for task, seed in ((third, 3), (fifth, 5)):
        assert task.newest() == STEPS and json.loads((task.run / "exit.json").read_text())["code"] == 0
        assert f"\nseed: {seed}\n" in (task.run / "recipe.yaml").read_text()
    codes, output = launching.run(1, ["train", str(recipe), "seed=3", "out=alone"], tmp_path, timeout=240)
    assert codes == [0], output
    assert run_state.tensors(third.run) == run_state.tensors(tmp_path / "alone")
    assert run_state.tensors(third.run) != run_state.tensors(fifth.run)


def test_the_doctor_looks_at_an_allocation(cluster: Cluster, long_recipe: Recipes, tmp_path: Path) -> None:
    command = ["srun", "-N2", "--ntasks-per-node=1", sys.executable, "-m", "vitdist", "doctor", str(long_recipe())]
    env = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    said = cluster.call(*command, "--slurm", "out=job", cwd=tmp_path, env=env).splitlines()
    assert time.monotonic() - began < 60
    assert any("all-reduce of 32 MB over 2 ranks on 2 hosts by gloo" in line for line in said), said
    nodes = re.findall(r"ok +network +(node\d): \1 is 10\.77\.0\.", "\n".join(said))
    assert len(set(nodes)) == len(nodes) == 2, said
    for node in nodes:
        assert sum(f"{node}: rank" in line for line in said) == 1
    assert sum("320 training samples" in line for line in said) == 1 and not any("MEND" in line for line in said)


def test_a_limit_that_no_signal_announced(long_recipe: Recipes, submit: Submit) -> None:
    recipe = long_recipe(train__max_duration="3000steps")
    job = submit(recipe, options=(*TWO_NODES, "--signal=B:USR2@0", "--time=60"))
    job.wait_for_step(20)
    cut_by_time_limit(job)
    assert job.end() == "COMPLETED", job.output
    assert "DUE TO TIME LIMIT" in job.output and len(resumed_steps(job.output)) == 1
