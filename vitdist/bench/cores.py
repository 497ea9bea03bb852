"""One core for the work and another for its parent, and how much of the first the work has had."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

WARM_UP = 10  # batches: until the queue, the worker's memory and its caches are as they stay


@dataclass(frozen=True)
class Taken:
    """What `count` photographs took: seconds of the work's core, and of the clock."""

    count: int
    core: float
    clock: float


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """This process, and what it starts meanwhile, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_cores() -> tuple[int, int]:
    """(the work's, its parent's); the same where there is but one."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[-1], cores[0]


def bare(work: Iterable[Any]) -> Taken:
    """In this process, on the work's core."""
    with on_core(two_cores()[0]):
        core, clock = time.process_time(), time.perf_counter()
        count = sum(1 for _ in work)
        return Taken(count, time.process_time() - core, time.perf_counter() - clock)


def streamed(make: Callable[[], Iterable[Any]], most: int, warm_up: int = WARM_UP) -> Taken:
    """A loader's worker on the work's core, its parent on the other, up to `most` photographs after a warm-up."""
    work, parent = two_cores()
    with on_core(work):
        stream = iter(make())  # starts the worker
    with on_core(parent):
        for _ in range(warm_up):
            next(stream)
        workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        core, clock, count = _seconds_of(workers), time.perf_counter(), 0
        seconds = 0.0
        for batch in stream:
            count += len(batch[0]) if isinstance(batch, (list, tuple)) else len(batch)
            seconds = max(seconds, _seconds_of(workers) - core)  # nothing is left of a worker that has ended
            if count >= most:
                break
        clock = time.perf_counter() - clock
    del stream
    return Taken(count, seconds, clock)


def _seconds_of(processes: list[int]) -> float:
    """A core's time that processes have had, all their threads: what a busy machine gives to others is not in it.

    By Linux's clock of another process (clock_getcpuclockid(3), which Python lacks): asked after every batch, files of
    /proc would keep the parent busy, and with it what the two cores share.
    """
    total = 0.0
    for process in processes:
        with suppress(OSError):  # it has ended
            total += time.clock_gettime(~process << 3 | 2)
    return total
