"""One writer a run: the second is told who the first is; the dead, the cut off and the same job are taken over (S6)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import launching
from tests.conftest import Recipes
from tests.faults.running import wait_for_step
from vitdist.errors import OwnLoss, UsageError
from vitdist.runtime.lock import DEAD_AFTER, LOCK, RunLock


def rewrite(run: Path, **changes: object) -> None:
    record = json.loads((run / LOCK).read_text())
    (run / LOCK).write_text(json.dumps({**record, **changes}))


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(UsageError, match=rf"process {os.getpid()} on {socket.gethostname()} .*out="):
        RunLock(tmp_path).acquire()
    first.check()
    first.release()
    second = RunLock(tmp_path)
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from vitdist.runtime.lock import RunLock; import os\n"
    code += "RunLock(Path(sys.argv[1])).acquire(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / LOCK).exists()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.check()
    lock.release()


def test_a_reused_process_id_is_not_its_owner(tmp_path: Path) -> None:
    RunLock(tmp_path).acquire()
    rewrite(tmp_path, started="1")
    RunLock(tmp_path).acquire()


def test_another_host_counts_as_dead_only_when_it_is_silent(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    rewrite(tmp_path, host="elsewhere", beat=time.time() - DEAD_AFTER / 2)
    with pytest.raises(UsageError, match="elsewhere"):
        RunLock(tmp_path).acquire()
    rewrite(tmp_path, host="elsewhere", beat=time.time() - DEAD_AFTER - 1)
    second = RunLock(tmp_path)
    second.acquire()
    with pytest.raises(OwnLoss, match="took over"):
        first.check()
    first.release()
    second.check()


def test_the_same_job_takes_its_own_lock_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    RunLock(tmp_path).acquire()
    rewrite(tmp_path, host="the node before")
    RunLock(tmp_path).acquire()
    # but not from a process of it that still runs
    with pytest.raises(UsageError, match="job 4711"):
        RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    rewrite(tmp_path, host="the node before")
    with pytest.raises(UsageError, match="job 4711"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"beat": "soon", "pid": "x"}', '{"beat": null}'])
def test_a_lock_that_does_not_read_is_no_lock(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.check()


def test_of_many_who_find_a_dead_lock_one_succeeds(tmp_path: Path) -> None:
    for _ in range(20):
        RunLock(tmp_path).acquire()
        rewrite(tmp_path, started="1")
        locks = [RunLock(tmp_path) for _ in range(8)]
        won: list[RunLock] = []
        gate = threading.Barrier(len(locks))

        def contend(lock: RunLock, gate: threading.Barrier = gate, won: list[RunLock] = won) -> None:
            gate.wait()
            try:
                lock.acquire()
                won.append(lock)
            except UsageError:
                pass

        threads = [threading.Thread(target=contend, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].check()
        won[0].release()


def test_a_second_training_of_a_run_ends_at_once_and_the_first_goes_on(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(train={"max_duration": "100000steps", "global_batch_size": 24})
    first = launching.start(2, ["train", str(recipe), "out=run"], tmp_path)
    step = wait_for_step(tmp_path / "run", 2, first)
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [2, 2], output
    (line,) = [line for line in output.splitlines() if line.startswith("vitdist: ")]
    assert f"is being written by process {first.ranks[0].pid} on {socket.gethostname()}" in line and "out=" in line
    assert not (tmp_path / "run" / "exit.json").exists(), "the folder is the first one's"
    wait_for_step(tmp_path / "run", step + 3, first)
    os.kill(first.ranks[0].pid, signal.SIGTERM)
    assert first.wait(30) == [75, 75], first.output
