"""Starting ranks for tests: real processes, forked from a server that has imported torch once (0.5-4 s a case).

Only the launcher is left out, and with it 6-8 s of imports a rank; a few tests go through the real launchers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["vitdist.training.run", "vitdist.evaluation.run", "vitdist.predict"])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Rank:
    """One started rank; its output goes to a file."""

    process: Any
    log: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Job:
    """Some started ranks."""

    ranks: list[Rank]

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes in the order of ranks (negative: a signal); who is late is killed and fails the test."""
        deadline = time.monotonic() + timeout
        for rank in self.ranks:
            rank.process.join(max(0.1, deadline - time.monotonic()))
        late = [number for number, rank in enumerate(self.ranks) if rank.process.is_alive()]
        for number in late:
            os.kill(self.ranks[number].pid, signal.SIGKILL)
        assert not late, f"ranks {late} were still running after {timeout} s\n{self.output}"
        return [rank.process.exitcode for rank in self.ranks]

    @property
    def output(self) -> str:
        return "\n".join(f"--- rank {number}\n{rank.output}" for number, rank in enumerate(self.ranks))


def start(
    world: int,
    arguments: Sequence[str],
    cwd: Path,
    *,
    env: Mapping[str, str] | None = None,
    folders: Mapping[int, Path] | None = None,
    umask: int | None = None,
) -> Job:
    """Start `vitdist ARGUMENTS` on some ranks in a folder, or some of them each in its own (`folders`)."""
    port = free_port()
    job = Job([])
    for rank in range(world):
        log = cwd / f"output_{time.monotonic_ns()}_{rank}.txt"
        settings = {"ACCELERATE_USE_CPU": "true", **(env or {})}
        if world > 1:
            settings |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        process = _context.Process(
            target=_become, args=(list(arguments), str((folders or {}).get(rank, cwd)), settings, str(log), rank, umask)
        )
        process.start()
        job.ranks.append(Rank(process, log))
    return job


def run(
    world: int, arguments: Sequence[str], cwd: Path, *, timeout: float = 120, **options: Any
) -> tuple[list[int], str]:
    """Start, wait; (exit codes, all output)."""
    job = start(world, arguments, cwd, **options)
    return job.wait(timeout), job.output


def _become(
    arguments: list[str], cwd: str, settings: dict[str, str], log: str, rank: int, umask: int | None = None
) -> None:
    """In the forked process: take over output, folder and environment, then be the command line."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(cwd)
    if umask is not None:
        os.umask(umask)
    os.environ.update(settings)
    tempfile.tempdir = None  # TMPDIR may be another than the server's
    # one core a rank: threads follow the cores, threads change bits, and tests must not depend on the machine's size
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    from vitdist.cli import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
