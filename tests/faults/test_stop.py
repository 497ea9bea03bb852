"""Asked to stop by signal, launcher, clock or file: agreed, saved, exit 75, nothing left behind (S1, S2, S5, S7)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import launching
from tests.conftest import ROOT, Recipes
from tests.faults.running import Leftovers, children, exit_of, last_step, wait_for, wait_for_step
from vitdist.checkpoint.manifest import verify
from vitdist.checkpoint.store import Store

stops: list[float] = []  # seconds from a signal to the last rank's end
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def endless(tiny_recipe: Recipes) -> Path:
    return tiny_recipe(
        train={"max_duration": "100000steps", "global_batch_size": 24}, checkpoint={"every": "1000steps"}
    )


def assert_saved(run: Path, reason: str, *, requeue: bool, since: int = 0) -> None:
    said = exit_of(run)
    assert (said["code"], said["reason"], said["requeue"]) == (75, reason, requeue), said
    last = Store(run).pointed("last")
    assert last is not None and not verify(last)
    assert int(last.name.removeprefix("step_")) == said["step"] == last_step(run) >= since
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("to", ["one", "all"])
def test_a_signal_to_one_rank_or_all(to: str, number: int, endless: Path, tmp_path: Path) -> None:
    left = Leftovers(tmp_path)
    job = launching.start(2, ["train", str(endless), "out=run"], tmp_path, env=left.env)
    step = wait_for_step(tmp_path / "run", 2, job)
    left.note(job)
    began = time.monotonic()
    for rank in job.ranks[1:] if to == "one" else job.ranks:
        os.kill(rank.pid, number)
    assert job.wait(30) == [75, 75], job.output
    stops.append(time.monotonic() - began)
    assert_saved(tmp_path / "run", "signal", requeue=True, since=step)
    left.check()


def test_a_stop_takes_no_more_than_a_step_and_a_save(endless: Path, tmp_path: Path) -> None:
    """5 s of the tiny model (S2); the quickest of the stops above counts, since other work may slow one down."""
    while len(stops) < 2:
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        test_a_signal_to_one_rank_or_all("one", signal.SIGTERM, endless, folder)
    print(f"stops took {sorted(round(seconds, 1) for seconds in stops)} s")
    assert min(stops) < 5


def test_agreed_within_two_steps(endless: Path, tmp_path: Path) -> None:
    fault = {"VITDIST_FAULT": "term:rank=1,step=5,phase=forward"}
    codes, output = launching.run(3, ["train", str(endless), "out=run"], tmp_path, env=fault)
    assert codes == [75] * 3, output
    assert 5 <= exit_of(tmp_path / "run")["step"] <= 7


def test_preemption_may_signal_twice_within_milliseconds(endless: Path, tmp_path: Path) -> None:
    job = launching.start(1, ["train", str(endless), "out=run"], tmp_path)
    step = wait_for_step(tmp_path / "run", 2, job)
    for _ in range(2):
        os.kill(job.ranks[0].pid, signal.SIGTERM)
        time.sleep(0.003)
    assert job.wait(30) == [75], job.output
    assert_saved(tmp_path / "run", "signal", requeue=True, since=step)


@pytest.mark.parametrize(("number", "pause"), [(signal.SIGINT, 0.3), (signal.SIGTERM, 5.3)], ids=["INT", "TERM"])
def test_a_second_signal_means_now(number: int, pause: float, endless: Path, tmp_path: Path) -> None:
    left = Leftovers(tmp_path)
    hang = {"VITDIST_FAULT": "hang:phase=snapshot", **left.env}
    job = launching.start(1, ["train", str(endless), "out=run", "data.num_workers=2"], tmp_path, env=hang)
    wait_for_step(tmp_path / "run", 2, job)
    left.note(job)
    os.kill(job.ranks[0].pid, number)
    time.sleep(pause)
    assert job.ranks[0].process.is_alive(), "it hangs in the save"
    began = time.monotonic()
    os.kill(job.ranks[0].pid, number)
    assert job.wait(10) == [75]
    assert time.monotonic() - began < 3
    left.check()


def test_a_first_sigterm_long_after_another_signal_is_not_impatience(endless: Path, tmp_path: Path) -> None:
    """Slurm's USR1 ahead of the limit, the save it asks for, and the limit's own TERM while that is written.

    Then it is killed, and takes its workers along, a frozen one too, which could not notice by itself (S7).
    """
    left = Leftovers(tmp_path)
    slow = {"VITDIST_FAULT": "hang:phase=snapshot", **left.env}
    job = launching.start(1, ["train", str(endless), "out=run"], tmp_path, env=slow)
    wait_for_step(tmp_path / "run", 2, job)
    os.kill(job.ranks[0].pid, signal.SIGUSR1)
    time.sleep(5.3)
    for _ in range(2):  # preemption's pair
        os.kill(job.ranks[0].pid, signal.SIGTERM)
        time.sleep(0.003)
    job.ranks[0].process.join(2)
    assert job.ranks[0].process.is_alive(), "it goes on saving"
    left.note(job)
    os.kill(children(job.ranks[0].pid)[0], signal.SIGSTOP)
    os.kill(job.ranks[0].pid, signal.SIGKILL)
    assert job.wait(10) == [-9]
    left.check()


def test_a_save_that_hangs_ends_by_force(endless: Path, tmp_path: Path) -> None:
    fault = {"VITDIST_FAULT": "term:rank=1,step=4,phase=step;hang:phase=before-publish"}
    codes, output = launching.run(
        2, ["train", str(endless), "out=run", "parallel.timeout=5s"], tmp_path, env=fault, timeout=60
    )
    assert codes == [7, 7], output
    assert output.count("has written a checkpoint for") == 1 and "rank 0" in output
    assert exit_of(tmp_path / "run")["code"] == 7


def test_the_recipes_clock(endless: Path, tmp_path: Path) -> None:
    codes, output = launching.run(2, ["train", str(endless), "out=run", "train.max_time=8s"], tmp_path)
    assert codes == [75, 75], output
    assert_saved(tmp_path / "run", "max_time", requeue=False, since=1)


def test_the_allocations_end(endless: Path, tmp_path: Path) -> None:
    env = {"SLURM_JOB_END_TIME": str(int(time.time()) + 66), "SLURM_JOB_ID": "17"}
    codes, output = launching.run(2, ["train", str(endless), "out=run"], tmp_path, env=env)
    assert codes == [75, 75], output
    assert time.time() < int(env["SLURM_JOB_END_TIME"]) - 30, "in time for the save"
    assert_saved(tmp_path / "run", "time_limit", requeue=True)


def test_a_stop_file(endless: Path, tmp_path: Path) -> None:
    job = launching.start(2, ["train", str(endless), "out=run"], tmp_path)
    step = wait_for_step(tmp_path / "run", 2, job)
    (tmp_path / "run" / "STOP").touch()
    assert job.wait(30) == [75, 75], job.output
    assert_saved(tmp_path / "run", "stop_file", requeue=False, since=step)
    job = launching.start(2, ["train", str(endless), "out=run"], tmp_path)
    wait_for_step(tmp_path / "run", exit_step := last_step(tmp_path / "run") + 2, job)
    assert exit_step > step, "the next start takes the file away and goes on"
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    assert job.wait(30) == [75, 75]


@pytest.mark.slow
def test_a_frozen_loader_worker_ends_with_its_rank(endless: Path, tmp_path: Path) -> None:
    """A rank that only took leave of its workers would wait for it (S7)."""
    left = Leftovers(tmp_path)
    unhurried = {"VITDIST_FAULT": "slow:phase=step", **left.env}  # so that a few batches lie ready
    job = launching.start(1, ["train", str(endless), "out=run", "data.num_workers=2"], tmp_path, env=unhurried)
    wait_for_step(tmp_path / "run", 2, job)
    left.note(job)
    os.kill(children(job.ranks[0].pid)[0], signal.SIGSTOP)
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    assert job.wait(30) == [75], job.output
    left.check()


def test_loader_workers_ignore_signals(endless: Path, tmp_path: Path) -> None:
    job = launching.start(1, ["train", str(endless), "out=run", "data.num_workers=2"], tmp_path)
    step = wait_for_step(tmp_path / "run", 2, job)
    workers = children(job.ranks[0].pid)
    assert len(workers) >= 2
    for worker in workers:
        for number in SIGNALS:
            os.kill(worker, number)
    wait_for_step(tmp_path / "run", step + 3, job)
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    assert job.wait(30) == [75], job.output


INTERRUPTED = pytest.param(signal.SIGINT, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [signal.SIGTERM, INTERRUPTED, signal.SIGKILL])
def test_a_signal_to_torchrun(number: int, endless: Path, tmp_path: Path) -> None:
    """SIGKILL stands for all that ends the launcher alone, USR1 among them: its orphans stop by themselves."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={launching.free_port()}",
    ]
    process = subprocess.Popen(
        [*command, str(ROOT / "launch" / "train.py"), str(endless), "out=run"],
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: last_step(tmp_path / "run") >= 2, "step 2", 120)
        os.kill(process.pid, number)
        process.wait(60)
        wait_for(lambda: (tmp_path / "run" / "exit.json").exists(), "exit.json", 30)
        wait_for(lambda: not (tmp_path / "run" / ".lock").exists(), "the lock's release", 30)
        assert_saved(tmp_path / "run", "signal", requeue=True, since=2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
