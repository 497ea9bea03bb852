"""What ranks tell each other outside the collectives: signs of life, and the first failure with its cause.

A client of its own to the rendezvous' store, so that a collective that hangs does not silence it.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vitdist.runtime.ranks import Ranks

ANSWER_WITHIN = 4.0  # seconds; a store on a stopped or dead rank 0 must not hold up the others' end
ASK_AGAIN_AFTER = 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class Word:
    """The first failure, as all ranks end with it: `rank` is where it began, `teller` who found out and prints it."""

    code: int
    rank: int
    message: str
    teller: int


@dataclass(frozen=True)
class Life:
    """A rank's sign of life: a count that only grows, and where its main thread is since how many seconds."""

    count: int
    step: int
    phase: str
    seconds: float


class Board:
    """One rank's view. Every call gives up after a few seconds; then `answers` is False and it returns nothing."""

    def __init__(self, ranks: Ranks) -> None:
        self._rank, self._world = ranks.rank, ranks.world
        self._prefix = f"vitdist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
        self.answers = True
        self._asked = 0.0
        self._lock = threading.Lock()
        self._store: TCPStore | None = None

    def _connected(self) -> TCPStore:
        if self._store is None:
            self._store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=ANSWER_WITHIN),
            )
        return self._store

    def announce(self, word: Word) -> Word:
        """Leave word of a failure; returns the word that stands: the first one's."""
        text = json.dumps(asdict(word))
        said = self._ask(lambda store: store.compare_set(self._prefix + "failure", "", text))
        return word if said is None else _word(said)

    def heard(self) -> Word | None:
        """The failure that somebody announced."""
        said = self._read("failure")
        return None if said is None else _word(said)

    def acknowledge(self) -> None:
        """Say that this rank has heard the failure."""
        self._ask(lambda store: store.add(self._prefix + "heard", 1))

    def num_acknowledged(self) -> int:
        return self._ask(lambda store: store.add(self._prefix + "heard", 0)) or 0

    def live(self, life: Life) -> None:
        """Give a sign of life."""
        self._ask(lambda store: store.set(f"{self._prefix}life/{self._rank}", json.dumps(asdict(life))))

    def lives(self) -> dict[int, Life]:
        """The latest sign of life of each rank that has given one."""
        texts = {rank: self._read(f"life/{rank}") for rank in range(self._world)}
        return {rank: Life(**json.loads(text)) for rank, text in texts.items() if text is not None}

    def _read(self, name: str) -> bytes | None:
        key = self._prefix + name
        return self._ask(lambda store: store.get(key) if store.check([key]) else None)

    def _ask(self, question: Callable[[TCPStore], T]) -> T | None:
        """One question at a time; after a failure the connection is made anew, but not at once.

        Asked from a thread that can be left behind: a store on a stopped machine never answers, whatever its time-out.
        """
        with self._lock:
            if not self.answers and time.monotonic() - self._asked < ASK_AGAIN_AFTER:
                return None
            answers: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
            threading.Thread(target=self._question, args=(question, answers), name="board", daemon=True).start()
            try:
                answer = answers.get(timeout=ANSWER_WITHIN)
            except queue.Empty:
                answer = None
            self.answers = answer is not None
            if answer is None:
                self._asked, self._store = time.monotonic(), None
                return None
            return answer[0]

    def _question(self, question: Callable[[TCPStore], T], answers: queue.SimpleQueue[tuple[T] | None]) -> None:
        try:
            answers.put((question(self._connected()),))
        except (RuntimeError, ValueError):  # torch's DistStoreError and DistNetworkError are RuntimeErrors
            answers.put(None)


def _word(text: bytes) -> Word:
    return Word(**json.loads(text))
