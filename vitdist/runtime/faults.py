"""Failures on request, for tests: VITDIST_FAULT="kill:rank=1,step=17,phase=publish". Inert without the variable.

Several faults are separated by ';'. Kinds: kill (SIGKILL to itself), stop (SIGSTOP), term (SIGTERM to itself),
raise (RuntimeError), oserror (ENOSPC), oom (the device is out of memory, once), hang (this thread sleeps for ever),
slow (it sleeps for half a second), nan and cold (asked for, see `asked`: a NaN loss; no warm-up of DDP's buckets).
`attempt=N` limits a fault to the N-th start of a run, so that a restarted job survives.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

from vitdist.errors import UsageError

VARIABLE = "VITDIST_FAULT"
KINDS = {"kill", "stop", "term", "raise", "oserror", "oom", "hang", "slow", "nan", "cold"}
ASKED = {"nan", "cold"}


@dataclass(frozen=True)
class Fault:
    kind: str
    phase: str
    rank: int | None
    step: int | None
    attempt: int | None

    def matches(self, phase: str, rank: int, step: int, attempt: int) -> bool:
        return (
            self.phase == phase
            and self.rank in (None, rank)
            and self.step in (None, step)
            and self.attempt in (None, attempt)
        )


def parse(text: str) -> tuple[Fault, ...]:
    """The faults of a VITDIST_FAULT value; UsageError when it does not read."""
    return tuple(_parse_one(part.strip()) for part in text.split(";") if part.strip())


def _parse_one(text: str) -> Fault:
    kind, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    fields = {key: value for key, _, value in pairs}
    numbers = {key: int(fields[key]) for key in ("rank", "step", "attempt") if fields.get(key, "").isdigit()}
    unread = set(fields) - set(numbers) - {"phase"}
    if kind not in KINDS or unread or "phase" not in fields:
        raise UsageError(
            f"{VARIABLE}: {text!r} does not read; write kind:rank=N,step=N,phase=NAME, kind one of {sorted(KINDS)}"
        )
    return Fault(kind, fields["phase"], numbers.get("rank"), numbers.get("step"), numbers.get("attempt"))


class Faults:
    """The faults of one process; `point` is called where the program passes, and mostly does nothing."""

    def __init__(self, rank: int, text: str | None = None) -> None:
        self.rank = rank
        self.attempt = 1
        self._faults = parse(os.environ.get(VARIABLE, "") if text is None else text)

    def point(self, phase: str, step: int) -> None:
        """Fail here when a fault asks for it."""
        for fault in self._faults:
            if fault.kind not in ASKED and fault.matches(phase, self.rank, step, self.attempt):
                if fault.kind == "oom":  # or the step that is done again would fail again
                    self._faults = tuple(other for other in self._faults if other is not fault)
                _fail(fault)

    def asked(self, kind: str, phase: str, step: int) -> bool:
        """Whether a fault that the caller carries out itself (a NaN loss) is due."""
        return any(f.kind == kind and f.matches(phase, self.rank, step, self.attempt) for f in self._faults)


def _fail(fault: Fault) -> None:
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
    if fault.kind in signals:
        os.kill(os.getpid(), signals[fault.kind])
    elif fault.kind == "oserror":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fault.phase)
    elif fault.kind == "oom":
        import torch

        raise torch.OutOfMemoryError(f"{VARIABLE} asked for this: out of memory at {fault.phase}")
    elif fault.kind == "hang":
        time.sleep(10**6)
    elif fault.kind == "slow":
        time.sleep(0.5)
    else:
        raise RuntimeError(f"{VARIABLE} asked for this failure at {fault.phase}")
