"""Memory for batches, made before the workers are forked: they fill it, and their parent reads it in place.

torch would make a file in /dev/shm for every tensor of every batch, fill it page by page, and send its descriptor: on
one core that is a tenth of the input's time, and it fails where /dev/shm is small. Here a piece that the parent no
longer looks at is filled again. Nothing is copied, and nothing can be left behind.
"""

from __future__ import annotations

import math
import mmap
import weakref
from dataclasses import dataclass

import numpy as np

PIECES = 8  # a worker: those made ahead, those that the parent holds, and one or two to spare

_memories: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Piece:
    """A piece of a memory, as a worker names it to its parent."""

    memory: int
    number: int


class BatchMemory:
    """Room for PIECES batches of uint8 [B, S, S, 3] of each worker of one iteration over a loader."""

    def __init__(self, num_workers: int, batch_size: int, image_size: int) -> None:
        """OSError where there is not so much memory; it is used only as batches fill it."""
        self._shape = (batch_size, image_size, image_size, 3)
        self._pixels = mmap.mmap(-1, num_workers * PIECES * math.prod(self._shape))
        self._taken = mmap.mmap(-1, num_workers * PIECES)  # 1: filled, or read; set by a worker, cleared by the parent
        _memories[id(self)] = self

    def take(self, worker: int) -> Piece | None:
        """A piece of this worker's that nobody looks at; None where the parent holds on to all of them."""
        number = self._taken.find(b"\0", worker * PIECES, (worker + 1) * PIECES)
        if number < 0:
            return None
        self._taken[number] = 1
        return Piece(id(self), number)

    def array(self, piece: Piece) -> np.ndarray:
        """uint8 [B, S, S, 3]: the piece itself."""
        size = math.prod(self._shape)
        return np.frombuffer(self._pixels, np.uint8, size, piece.number * size).reshape(self._shape)

    def let_go(self, piece: Piece) -> None:
        self._taken[piece.number] = 0


def received(piece: Piece) -> np.ndarray:
    """In the parent: what a worker filled, its own until the array and everything made of it is gone."""
    memory = _memories[piece.memory]
    array = memory.array(piece)
    # its base, which every view of a view refers to
    weakref.finalize(array.base, memory.let_go, piece).atexit = False
    return array
