"""Fetches remote shards before they are read: the plan knows which come next."""

from __future__ import annotations

import copy
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from vitdist.data.index import Split
from vitdist.data.plan import TrainPlan
from vitdist.data.storage.cache import ShardCache, Wanted
from vitdist.data.storage.remote import RemoteError
from vitdist.data.storage.remote_set import wanted_shard
from vitdist.data.views import View
from vitdist.errors import ResourceError

AHEAD_BYTES = 4 << 30  # a rank, of shards whose turn has not come yet
SHARE = 16  # of a bounded cache no rank fetches more than this part ahead
NUM_THREADS = 4

log = logging.getLogger(__name__)


class Prefetch:
    """Walks the shards of a plan ahead of its reader, at most so many bytes.

    `upcoming` yields (position at which it is first needed, shard) with positions that never fall. What cannot be
    fetched is left to the reader, who asks again and says why. Threads of the process that reads; `close` ends them.
    """

    def __init__(self, split: Split, upcoming: Iterator[tuple[int, int]], *, ahead_bytes: int = AHEAD_BYTES) -> None:
        assert split.cache is not None
        self._split, self._cache, self._upcoming = split, split.cache, upcoming
        self._ahead_bytes = ahead_bytes if split.cache.limit is None else min(ahead_bytes, split.cache.limit // SHARE)
        self._position = -1
        self._ahead: deque[tuple[int, int]] = deque()  # (position, bytes) of what was fetched or is being fetched
        self._changed = threading.Condition()
        self._walking = threading.Lock()
        self._is_closed = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(NUM_THREADS)]
        for thread in self._threads:
            thread.start()

    def at(self, position: int) -> None:
        """The reader has come here: what was needed up to this position makes room for more."""
        with self._changed:
            self._position = position
            self._changed.notify_all()

    def close(self) -> None:
        """Stop after the downloads under way."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._walking:  # one walks the plan, and waits for its turn; the others download
                shard = self._next()
            if shard is None:
                return
            wanted = wanted_shard(self._split, shard)
            if wanted is not None:
                _fetch(self._cache, wanted)

    def _next(self) -> int | None:
        for position, shard in self._upcoming:
            with self._changed:
                size = self._split.shards[shard].bytes
                self._changed.wait_for(partial(self._may_go_on, size))
                if self._is_closed:
                    return None
                self._ahead.append((position, size))
            return shard
        return None

    def _may_go_on(self, size: int) -> bool:
        while self._ahead and self._ahead[0][0] <= self._position:
            self._ahead.popleft()
        return self._is_closed or not self._ahead or sum(size for _, size in self._ahead) + size <= self._ahead_bytes


@contextmanager
def prefetched(
    split: Split | None, upcoming: Iterator[tuple[int, int]], worker: int
) -> Iterator[Callable[[int], None]]:
    """Prefetch for as long as a source is read, in one worker of each rank; gives what is told the position."""
    if split is None or split.cache is None or not split.is_remote or worker != 0:
        yield lambda position: None
        return
    ahead = Prefetch(split, upcoming)
    try:
        yield ahead.at
    finally:
        ahead.close()


def _fetch(cache: ShardCache, wanted: Wanted) -> None:
    try:
        cache.fetch(wanted, wait=False)
    except (RemoteError, ResourceError) as error:
        log.debug("not fetched ahead: %s", error)


def shards_of_plan(plan: TrainPlan, first_slot: int, num_slots: int, position: int) -> Iterator[tuple[int, int]]:
    """(position, shard) as a run of slots of every batch first needs a shard in each epoch, from a position on."""
    plan = copy.deepcopy(plan, {id(plan.view): plan.view})  # its memory of blocks must not be shared with a reader
    seen: set[int] = set()
    for number in itertools.count(position):
        slots = plan.slots(number, first_slot, first_slot + num_slots)
        if number % plan.steps_per_epoch == 0:
            seen.clear()
        shards = np.unique(np.searchsorted(plan.view.shard_starts, slots.rows, side="right") - 1).tolist()
        yield from ((number, shard) for shard in shards if shard not in seen)
        seen.update(shards)


def shards_of_span(view: View, span: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(position, shard) of a span of a view, in file order."""
    ends = np.cumsum(view.shard_counts)
    first, last = np.searchsorted(ends, [span[0], span[1] - 1], side="right") if span[0] < span[1] else (0, -1)
    for shard in range(int(first), int(last) + 1):
        if view.shard_counts[shard]:
            yield max(span[0], int(ends[shard] - view.shard_counts[shard])), shard
