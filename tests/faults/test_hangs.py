"""Nothing hangs: whatever happens to a rank, all end in bounded time with its code, and it is named (H1)."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests import launching
from tests.conftest import Recipes
from tests.data.tiny import tiny_packed
from tests.faults.running import children, exit_of, wait_for_step

BOUND = 50.0  # seconds, at the time-out below; 60 at one of 20 s
TIMEOUT = "parallel.timeout=10s"


@pytest.fixture
def endless(tiny_recipe: Recipes) -> Path:
    return tiny_recipe(
        train={"max_duration": "100000steps", "global_batch_size": 24},
        evaluation={"every": "6steps"},
        checkpoint={"every": "5steps"},
    )


def complaints(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("vitdist: ")]


def log_of(run: Path, rank: int) -> str:
    path = run / "train.log" if rank == 0 else run / "logs" / f"rank_{rank:05d}.log"
    return path.read_text()


def end(job: launching.Job, began: float) -> tuple[list[int], str]:
    codes = job.wait(BOUND)
    assert time.monotonic() - began < BOUND
    return codes, job.output


# rank 2 is nobody in particular; rank 0 keeps the store, the lock and the metrics
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_is_killed(rank: int, endless: Path, tmp_path: Path) -> None:
    job = launching.start(3, ["train", str(endless), "out=run", TIMEOUT], tmp_path)
    wait_for_step(tmp_path / "run", 2, job)
    began = time.monotonic()
    os.kill(job.ranks[rank].pid, signal.SIGKILL)
    codes, output = end(job, began)
    assert codes == [-9 if number == rank else 6 for number in range(3)], output
    assert time.monotonic() - began < 20, "noticed by the closed connection, not by the time-out"
    assert complaints(output)[0].startswith(f"vitdist: rank {rank} was lost: "), output
    if rank != 0:
        assert len(complaints(output)) == 1
        said = exit_of(tmp_path / "run")
        assert (said["code"], said["reason"], said["rank"], said["requeue"]) == (6, "lost", rank, True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["data", "forward", "snapshot", "evaluation", "log"])
def test_a_rank_raises(phase: str, rank: int, endless: Path, tmp_path: Path) -> None:
    if phase == "log" and rank == 1:
        phase = "before-manifest"  # in the thread that writes, which only rank 0 has
        rank = 0
    fault = {
        "VITDIST_FAULT": f"raise:rank={rank},phase={phase}" + (",step=4" if phase in ("data", "forward", "log") else "")
    }
    began = time.monotonic()
    job = launching.start(3, ["train", str(endless), "out=run", TIMEOUT], tmp_path, env=fault)
    codes, output = end(job, began)
    assert codes == [1, 1, 1], output
    (line, where) = complaints(output)
    assert line.startswith(f"vitdist: rank {rank}: internal error: RuntimeError: VITDIST_FAULT asked"), output
    assert "run/train.log" in where if rank == 0 else "run/logs/rank_00001.log" in where
    assert "Traceback" in log_of(tmp_path / "run", rank) and "Traceback" not in output
    said = exit_of(tmp_path / "run")
    assert (said["code"], said["reason"], said["rank"], said["requeue"]) == (1, "error", rank, False)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_frozen(rank: int, endless: Path, tmp_path: Path) -> None:
    job = launching.start(3, ["train", str(endless), "out=run", TIMEOUT], tmp_path)
    wait_for_step(tmp_path / "run", 2, job)
    began = time.monotonic()
    os.kill(job.ranks[rank].pid, signal.SIGSTOP)
    others = [number for number in range(3) if number != rank]
    try:
        for number in others:
            job.ranks[number].process.join(max(0.1, began + BOUND - time.monotonic()))
        assert [job.ranks[number].process.exitcode for number in others] == [6, 6], job.output
        assert complaints(job.output)[0].startswith(f"vitdist: rank {rank} was lost: "), job.output
        for number in others:
            assert "stacks of rank" in log_of(tmp_path / "run", number)
        os.kill(job.ranks[rank].pid, signal.SIGCONT)  # thawed, it hears that it is over
        assert job.wait(30)[rank] == 6, job.output
        assert "stacks of rank" in log_of(tmp_path / "run", rank) or "Traceback" in log_of(tmp_path / "run", rank)
    finally:
        if job.ranks[rank].process.is_alive():
            os.kill(job.ranks[rank].pid, signal.SIGKILL)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_loader_worker_is_lost(number: int, world: int, endless: Path, tmp_path: Path) -> None:
    timeout = TIMEOUT if world > 1 else "parallel.timeout=5s"
    job = launching.start(world, ["train", str(endless), "out=run", timeout, "data.num_workers=2"], tmp_path)
    wait_for_step(tmp_path / "run", 2, job)
    rank = world - 1
    workers = children(job.ranks[rank].pid)
    began = time.monotonic()
    os.kill(workers[0], number)
    codes, output = end(job, began)
    assert codes == [6] * world, output
    assert len(complaints(output)) == 1, output
    if world > 1:
        assert complaints(output)[0].startswith(f"vitdist: rank {rank}"), output
    assert str(workers[0]) in complaints(output)[0], "the worker is named"
    if number == signal.SIGSTOP:
        assert all("stacks of rank" in log_of(tmp_path / "run", r) for r in range(world))


def test_a_rank_hangs_in_its_own_work(endless: Path, tmp_path: Path) -> None:
    fault = {"VITDIST_FAULT": "hang:rank=1,step=5,phase=forward"}
    began = time.monotonic()
    job = launching.start(3, ["train", str(endless), "out=run", TIMEOUT], tmp_path, env=fault)
    codes, output = end(job, began)
    assert codes == [6, 6, 6], output
    assert complaints(output)[0].startswith("vitdist: rank 1 was lost: it has been at step 5 (forward)"), output
    assert "faults.py" in log_of(tmp_path / "run", 1), "its stack shows where"


@pytest.mark.slow
def test_a_rank_without_peers_hangs_in_its_own_work(endless: Path, tmp_path: Path) -> None:
    """Nobody's collective times out: the watch alone ends it."""
    fault = {"VITDIST_FAULT": "hang:step=5,phase=forward"}
    began = time.monotonic()
    job = launching.start(1, ["train", str(endless), "out=run", TIMEOUT], tmp_path, env=fault)
    codes, output = end(job, began)
    assert codes == [6], output
    assert complaints(output)[0].startswith("vitdist: rank 0 has not moved for "), output
    assert "faults.py" in log_of(tmp_path / "run", 0), "its stack shows where"


def test_a_shard_is_unreadable_on_one_rank(tiny_recipe: Recipes, tmp_path: Path) -> None:
    """Each rank has a copy of the data; on rank 1's a shard has other bytes than the index says."""
    tiny_packed(tmp_path / "zero" / "packed", num_classes=20, train_per_class=8, test_per_class=1)
    shutil.copytree(tmp_path / "zero", tmp_path / "one")
    for shard in (tmp_path / "one" / "packed" / "train").glob("*.tar"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    recipe = tiny_recipe(data={"path": "packed", "image_size": 32, "num_workers": 1, "val": {"fraction": 0.1}})
    began = time.monotonic()
    job = launching.start(
        2, ["train", str(recipe), f"out={tmp_path}/run", TIMEOUT], tmp_path / "zero", folders={1: tmp_path / "one"}
    )
    codes, output = end(job, began)
    assert codes == [4, 4], output
    (line,) = complaints(output)
    assert line.startswith("vitdist: rank 1, step 1: shard train/0000"), output


def test_rank_0s_disk_is_full(endless: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    fault = {"VITDIST_FAULT": "oserror:rank=0,phase=between-files"}
    job = launching.start(3, ["train", str(endless), "out=run", TIMEOUT], tmp_path, env=fault)
    codes, output = end(job, began)
    assert codes == [7, 7, 7], output
    (line,) = complaints(output)
    assert line.startswith("vitdist: rank 0: no room for a checkpoint in run/checkpoints: it needs "), output
    assert " bytes and " in line and " are free" in line
    assert exit_of(tmp_path / "run")["rank"] == 0
