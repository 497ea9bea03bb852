"""One core for the work and another for its parent, and how much of the first the work has had."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
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
        core, clock, count = _workers_seconds(), time.perf_counter(), 0
        seconds = 0.0
        for batch in stream:
            count += len(batch[0]) if isinstance(batch, (list, tuple)) else len(batch)
            seconds = max(seconds, _workers_seconds() - core)  # nothing is left of a worker that has ended
            if count >= most:
                break
        clock = time.perf_counter() - clock
    del stream
    return Taken(count, seconds, clock)


def _workers_seconds() -> float:
    """A core's time that this process's children have had: what a busy machine gives to others is not in it."""
    total = 0.0
    for child in multiprocessing.active_children():
        with suppress(OSError):  # it has ended
            total += int(Path(f"/proc/{child.pid}/schedstat").read_text().split()[0]) / 1e9
    return total
