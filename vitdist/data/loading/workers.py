"""A loader whose workers have really started: a forked process may hang before it runs a line of Python."""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from vitdist.errors import LostError

T_co = TypeVar("T_co", covariant=True)
PATIENCE = (5.0, 10.0, 20.0)  # seconds, by attempt; a worker starts in hundredths of one
# seconds in which the threads of a finished collective let go before a fork; without it 4 of 12 runs on 3.10 met a hang
LULL = 0.02 if sys.version_info < (3, 12) else 0.0

log = logging.getLogger(__name__)


class StartedLoader(DataLoader[T_co]):
    """A DataLoader that hands out its iterator when every worker runs, and forks anew where one does not.

    Up to CPython 3.11 a child hangs for ever when, at the moment of the fork, a thread of another library (of gloo, as
    it lets go of a finished collective) is just making itself known to the interpreter: the child waits for a lock that
    nobody is left to open. LostError when it happens again and again.
    """

    def __init__(self, *args: Any, worker_start: Callable[[int], None], **settings: Any) -> None:
        """`worker_start(number)` runs first in every worker."""
        self._worker_start = worker_start
        super().__init__(*args, **settings)

    def __iter__(self) -> Any:
        if self.num_workers == 0:
            return super().__iter__()
        for seconds in PATIENCE:
            before = multiprocessing.active_children()
            reader, writer = os.pipe()
            self.worker_init_fn = _Reporting(self._worker_start, reader, writer)
            time.sleep(LULL)
            iterator = super().__iter__()
            os.close(writer)
            started = _all_started(reader, self.num_workers, seconds)
            os.close(reader)
            if started:
                return iterator
            log.warning("a loader worker did not start within %.0f s; all are started anew", seconds)
            del iterator  # torch takes leave of its workers, also of one that will not hear
            for child in multiprocessing.active_children():
                if child not in before:
                    child.kill()
                    child.join()
        raise LostError("loader workers do not start on this machine; data.num_workers=0 trains without any")


class _Reporting:
    """What a worker does first, and the byte by which its loader knows."""

    def __init__(self, start: Callable[[int], None], reader: int, writer: int) -> None:
        self._start, self._reader, self._writer = start, reader, writer

    def __call__(self, number: int) -> None:
        os.close(self._reader)
        self._start(number)
        os.write(self._writer, b"1")
        os.close(self._writer)


def _all_started(reader: int, num_workers: int, seconds: float) -> bool:
    """Whether all have reported in time; also True when the last is gone, which is torch's to tell."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while num_workers > 0:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
        reported = os.read(reader, num_workers)
        num_workers = num_workers - len(reported) if reported else 0
    return True
