"""Being asked to stop: signals, time limits and a stop file only set a flag; the loop agrees on it and saves.

Nothing is saved inside a handler: doing so hangs or corrupts (Lightning issue 21406).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType

from vitdist.errors import Stopped
from vitdist.runtime.workers import end_workers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE = "STOP"
# preemption may send SIGTERM twice within milliseconds; only a later one is a person (or a scheduler) losing patience
IMPATIENT_AFTER = 5.0
STOP_FILE_EVERY = 2.0
LEAD = 60.0
_PR_SET_PDEATHSIG = 1


class Reason(IntEnum):
    """Why a run stops, as agreed between ranks; the highest number wins. Names are those of exit.json."""

    NONE = 0
    SIGNAL = 1
    TIME_LIMIT = 2
    MAX_TIME = 3
    STOP_FILE = 4

    @property
    def requeue(self) -> bool:
        """Whether a batch script should start the run again."""
        return self in (Reason.SIGNAL, Reason.TIME_LIMIT)


class StopFlag:
    """What this rank knows of a wish to stop. `poll` is called once a step and costs microseconds."""

    def __init__(self, run_dir: Path, *, max_seconds: float | None, is_main: bool) -> None:
        self._stop_file = run_dir / STOP_FILE if is_main else None
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._limit = _slurm_deadline() if is_main else None
        self._first_at: dict[int, float] = {}  # when each signal came first
        self._parent = os.getppid()
        self._next_look = 0.0
        self.lead = LEAD  # seconds before the allocation's end at which we stop

    def install(self) -> None:
        """Take over the signals, in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._first_at.get(number)
        if first is None:  # a TERM long after another signal is a first one too
            self._first_at[number] = now
        elif number == signal.SIGINT or (number == signal.SIGTERM and now - first > IMPATIENT_AFTER):
            end_workers()
            os._exit(Stopped.exit_code)

    def leave_time_for(self, save_seconds: float) -> None:
        """A save has taken so long: stop early enough before the allocation's end for two such."""
        self.lead = max(self.lead, LEAD + 2 * save_seconds)

    def poll(self) -> Reason:
        """The most telling reason to stop that this rank sees."""
        now = time.monotonic()
        if self._stop_file is not None and now >= self._next_look:
            self._next_look = now + STOP_FILE_EVERY
            if self._stop_file.exists():
                return Reason.STOP_FILE
        if self._deadline is not None and now >= self._deadline:
            return Reason.MAX_TIME
        if self._limit is not None and time.time() >= self._limit - self.lead:
            return Reason.TIME_LIMIT
        # a dead launcher cannot forward anything: its orphans stop by themselves
        if self._first_at or os.getppid() != self._parent:
            return Reason.SIGNAL
        return Reason.NONE


def ignore_signals() -> None:
    """For loader workers: the rank decides when they end; where the system can see to it, its own end is theirs too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # not Linux: workers notice within seconds by themselves
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _slurm_deadline() -> float | None:
    """The end of the allocation in Unix seconds, where Slurm exports it (SLURM_JOB_END_TIME, Slurm >= 22.05)."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None
