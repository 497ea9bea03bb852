"""A training that is still going on, to be disturbed from outside."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import launching
from vitdist.metrics_log import read_metrics


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What the condition gives, once it is true."""
    by = time.monotonic() + seconds
    while time.monotonic() < by:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen in {seconds} s")


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl") if "lr" in line), default=0)


def wait_for_step(run: Path, step: int, job: launching.Job) -> int:
    def reached() -> bool:
        assert all(rank.process.is_alive() for rank in job.ranks), job.output
        return last_step(run) >= step

    wait_for(reached, f"step {step}")
    return last_step(run)


def children(pid: int) -> list[int]:
    """The loader workers of a rank."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def exit_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "exit.json").read_text())
    return found


class Leftovers:
    """What a job could leave behind: processes, files where TMPDIR says, shared memory with a process id (S7)."""

    def __init__(self, folder: Path) -> None:
        self._temporary = folder / "temporary"
        self._temporary.mkdir()
        self.env = {"TMPDIR": str(self._temporary)}
        self._workers: set[int] = set()
        self._all: set[int] = set()

    def note(self, job: launching.Job) -> None:
        """Take down who belongs to the job while it runs."""
        for rank in job.ranks:
            self._workers.update(children(rank.pid))
            self._all.update({rank.pid, *children(rank.pid)})

    def check(self) -> None:
        wait_for(lambda: not any(map(alive, self._workers)), "the end of the loader workers", 10)
        parts = set(map(str, self._all))
        left = [path for path in Path("/dev/shm").iterdir() if parts & set(re.split(r"[^0-9]", path.name))]
        left += self._temporary.iterdir()
        assert not left, f"left behind: {left}"
