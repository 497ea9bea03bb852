"""Watching that this rank and its peers get on, and ending in bounded time when one does not.

A thread gives signs of life, hears of failures elsewhere, and notices when the main thread does not move. It can end
the process while the main thread hangs in a collective, in a read, or for a loader worker that is gone.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from vitdist.errors import LostError, ResourceError
from vitdist.runtime.board import Board, Life, Word
from vitdist.runtime.ranks import Ranks
from vitdist.runtime.workers import describe_workers, end_workers

TICK = 0.5
START_SECONDS = 1800.0  # until the first step is done: weights are fetched, file systems warm up, kernels are built
SILENT_AFTER = 4 * TICK + 1.5  # without a sign of life for so long, a rank is dead, stopped or cut off
GRACE = 3.0  # for the main thread to end by itself after a failure elsewhere
LEAVE_WITHIN = 45.0  # for letting go of everything; tracking alone may take 30 s
ABANDON_WITHIN = 8.0  # for exit.json when the main thread hangs
SLACK = 10.0  # collectives have the recipe's time-out themselves; only when they do not keep to it, we act
# the order in which a step passes them: of ranks that wait for each other, the one furthest behind is at fault
PHASES = ("start", "step", "data", "forward", "backward", "optimizer", "report", "evaluation", "saving", "snapshot")
OWN = ("data", "evaluation", "saving")  # where a rank waits for nobody else


class Watch:
    """One per process. The main thread says where it is with `at`; everything else happens in the thread."""

    def __init__(self, ranks: Ranks, *, timeout: float) -> None:
        self._ranks = ranks
        self._timeout = timeout
        self._board = Board(ranks) if ranks.world > 1 else None
        self._place = (0, "start", time.monotonic())
        self._limit = max(START_SECONDS, timeout)
        self._end_by: float | None = None
        self._code = LostError.exit_code
        self._word: Word | None = None
        self._stacks: IO[str] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        # what must still be done when the process is ended from the thread: exit.json, the lock; given the failure
        self.on_abort: Callable[[Word], None] | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """The end is near and in order: nobody is watched any more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._stacks is not None:
            faulthandler.disable()
            self._stacks.close()
            self._stacks = None

    def log_to(self, path: Path) -> None:
        """Stacks go to this rank's log, those of a crash in C too."""
        self._stacks = path.open("a", encoding="utf-8")
        faulthandler.enable(self._stacks)

    def at(self, phase: str, step: int) -> None:
        """The main thread is alive, and here."""
        self._place = (step, phase, time.monotonic())

    def arm(self) -> None:
        """The first step is done: from now on the recipe's time-out counts."""
        self._limit = self._timeout

    # ---- failures

    def announce(self, code: int, message: str) -> Word:
        """This rank fails: tell the others. Returns the failure that stands for all, which may be another's."""
        word = Word(code, self._ranks.rank, message, self._ranks.rank)
        self._word = self._board.announce(word) if self._board is not None else word
        self.leaving(self._word.code)
        return self._word

    def explain(self, message: str) -> Word:
        """A collective failed: the word of who failed, or of the rank that is silent or furthest behind."""
        self._end_by = None
        word = self._word or (self._board.heard() if self._board is not None else None) or self._blame(message)
        self.leaving(word.code)
        self.dump_stacks(word.message)
        return word

    def heard(self) -> Word | None:
        return self._word

    def farewell(self) -> None:
        """Rank 0 may keep the store by which the others hear: it waits a moment until they have."""
        if self._board is None or self._ranks.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        by = time.monotonic() + GRACE
        while time.monotonic() < by and self._board.num_acknowledged() < self._ranks.world - 1 and self._board.answers:
            time.sleep(TICK / 5)

    def leaving(self, code: int) -> None:
        """The main thread is letting go; it has so long before the thread ends the process with this code."""
        self._code = code
        self._end_by = time.monotonic() + LEAVE_WITHIN

    def _blame(self, message: str) -> Word:
        """Find out who is at fault by watching the signs of life, and announce it."""
        assert self._board is not None
        rank, cause = 0, ""
        first = self._board.lives()
        by = time.monotonic() + SILENT_AFTER
        while time.monotonic() < by and self._board.answers:
            time.sleep(TICK / 2)
            heard = self._board.heard()
            if heard is not None:
                return heard
        now = self._board.lives()
        if not self._board.answers:
            cause = "it keeps the ranks' meeting point, which does not answer: killed, stopped, or cut off"
        else:
            rank, cause = _culprit(first, now, self._ranks)
        text = f"rank {rank} was lost: {cause} ({message}); start again to resume"
        return self._board.announce(Word(LostError.exit_code, rank, text, self._ranks.rank))

    # ---- the thread

    def _run(self) -> None:
        ticks = 0
        before = time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            if now - before > 10 * TICK:  # the whole process was stopped for a while: that is nobody's delay
                step, phase, since = self._place
                self._place = (step, phase, since + now - before)
            before = now
            ticks += 1
            self._live(ticks, now)
            self._listen(now)
            self._look(now)

    def _live(self, count: int, now: float) -> None:
        step, phase, since = self._place
        if self._board is not None:
            self._board.live(Life(count, step, phase, now - since))

    def _listen(self, now: float) -> None:
        if self._board is None or self._word is not None:
            return
        word = self._board.heard()
        if word is None or self._word is not None or word.teller == self._ranks.rank:
            return
        self._word = word
        self._board.acknowledge()
        if word.code == LostError.exit_code:
            self.dump_stacks(word.message)
        if self._end_by is None:
            self._code = word.code
            self._end_by = now + GRACE

    def _look(self, now: float) -> None:
        step, phase, since = self._place
        if self._end_by is not None:
            if now > self._end_by:
                self._abort(self._word or Word(self._code, self._ranks.rank, "", self._ranks.rank), speak=False)
            return
        limit = self._limit if phase in OWN else self._limit + SLACK
        if phase != "end" and now - since > limit:
            self._abort(self._stuck(step, phase, now - since))

    def _stuck(self, step: int, phase: str, seconds: float) -> Word:
        """The main thread does not move: this rank's own fault, or that of one it waits for."""
        rank = self._ranks.rank
        code, cause = LostError.exit_code, f"has not moved for {seconds:.0f} s ({phase})"
        if phase == "saving":
            code, cause = (
                ResourceError.exit_code,
                f"has written a checkpoint for {seconds:.0f} s without an end: does the disk hang?",
            )
        elif phase in ("data", "evaluation"):
            cause = f"has waited {seconds:.0f} s for its data: {describe_workers()}"
        elif self._board is not None:
            return self._blame(f"rank {rank} waited {seconds:.0f} s for it")
        text = f"rank {rank} {cause}; step {step}, parallel.timeout {self._timeout:g} s; start again to resume"
        word = Word(code, rank, text, rank)
        return self._board.announce(word) if self._board is not None else word

    def dump_stacks(self, why: str) -> None:
        """What every thread of this process is doing, into its log."""
        if self._stacks is not None:
            self._stacks.write(f"stacks of rank {self._ranks.rank} ({why}):\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def _abort(self, word: Word, *, speak: bool = True) -> None:
        """End the process although the main thread hangs."""
        self.dump_stacks(word.message)
        if speak and word.teller == self._ranks.rank:
            print(f"vitdist: {word.message}", file=sys.stderr, flush=True)
        if self.on_abort is not None:
            last = threading.Thread(target=self.on_abort, args=(word,), daemon=True)
            last.start()
            last.join(ABANDON_WITHIN)  # the disk may be what hangs
        self.farewell()
        end_workers()
        os._exit(word.code)


def _culprit(first: dict[int, Life], now: dict[int, Life], ranks: Ranks) -> tuple[int, str]:
    """(rank, cause): who gives no sign of life, else who is furthest behind."""
    others = [rank for rank in range(ranks.world) if rank != ranks.rank]
    for rank in others:
        if rank not in now or (rank in first and first[rank].count == now[rank].count):
            last = now.get(rank)
            where = f" since step {last.step} ({last.phase})" if last is not None else ""
            return rank, f"no sign of life{where}: killed, stopped, or cut off"
    rank = min(others, key=lambda r: (now[r].step, _order(now[r].phase), -now[r].seconds))
    return rank, f"it has been at step {now[rank].step} ({now[rank].phase}) for {now[rank].seconds:.0f} s"


def _order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)
