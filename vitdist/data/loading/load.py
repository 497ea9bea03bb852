"""From places to pictures: read, check, decode, transform; damaged samples are noted and, if asked, replaced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from vitdist.data.index import Split
from vitdist.data.loading.places import Place
from vitdist.data.pixels.images import DamagedImage
from vitdist.data.storage.shards import Damage, DamagedSample, ShardReader

MAX_REPLACEMENTS = 16
# Pictures that are drawn for, then read, then decoded: between two decodings, which empty the processor's caches of
# everything else, drawing and reading take two or three times as long.
TOGETHER = 32


class Transform(Protocol):
    """From bytes to a picture in `out` [S, S, 3], with what was drawn for its seed."""

    def draw(self, seeds: list[int], /) -> Sequence[Any]: ...

    def __call__(self, data: bytes, drawn: Any, out: np.ndarray, /) -> Any: ...


class Loaded(NamedTuple):
    """What became of a place: the row that was used there, or a gap, and the damage that was met."""

    row: int
    is_valid: bool
    damages: list[Damage]
    key: str


class Found(NamedTuple):
    """A sample as it was read, or the damage that was met."""

    data: bytes
    key: str
    damage: Damage | None = None


class Load:
    """From a place to an image: read, check, decode, transform; damaged samples are noted and, if asked, replaced."""

    def __init__(
        self,
        split: Split,
        transform: Transform,
        *,
        replacement: Callable[[int, int, int], int] | None = None,
        with_keys: bool = False,
    ) -> None:
        """`replacement(epoch, row, attempt)` gives the row that stands in for a damaged one; None leaves a gap."""
        self.split = split
        self._transform = transform
        self._replacement = replacement
        self._with_keys = with_keys
        self._reader: ShardReader | None = None

    def __call__(self, places: Sequence[Place], images: np.ndarray) -> list[Loaded]:
        """Put the pictures of places into `images` [B, S, S, 3]; a gap is black.

        Only the planned sample's damage is noted: that of a damaged stand-in counts where the plan has it.
        """
        loaded = list[Loaded]()
        for first in range(0, len(places), TOGETHER):
            group = places[first : first + TOGETHER]
            drawn = self._transform.draw([place.seed for place in group])
            found = [self._read(place.row) for place in group]
            loaded += map(self._fill, group, found, drawn, images[first : first + TOGETHER])
        return loaded

    def _read(self, row: int) -> Found:
        self._reader = self._reader or ShardReader(self.split)
        try:
            return Found(self._reader.read(row), self._reader.key(row) if self._with_keys else "")
        except DamagedSample as error:
            return Found(b"", "", error.damage)

    def _fill(self, place: Place, found: Found, drawn: Any, out: np.ndarray) -> Loaded:
        row, damages = place.row, list[Damage]()
        for attempt in itertools.count(1):
            damage = found.damage or self._view(row, found.data, drawn, out)
            if damage is None:
                return Loaded(row, True, damages, found.key)
            damages = damages or [damage]
            stand_in = self._next_row(place, attempt)
            if stand_in is None:
                break
            row, found = stand_in, self._read(stand_in)
        out[:] = 0
        return Loaded(place.row, False, damages, "")

    def _view(self, row: int, data: bytes, drawn: Any, out: np.ndarray) -> Damage | None:
        """Put a picture into `out`, or say what is wrong with it."""
        try:
            self._transform(data, drawn, out)
        except DamagedImage as error:
            assert self._reader is not None
            return self._reader.damaged(row, error.kind, str(error)).damage
        return None

    def _next_row(self, place: Place, attempt: int) -> int | None:
        if self._replacement is None or attempt > MAX_REPLACEMENTS:
            return None
        return self._replacement(place.epoch, place.row, attempt)


class Unseeded:
    """A transform that draws nothing, where one that takes a seed is expected."""

    def __init__(self, transform: Callable[[bytes], np.ndarray]) -> None:
        self._transform = transform

    def draw(self, seeds: list[int]) -> list[int]:
        return seeds

    def __call__(self, data: bytes, seed: int, out: np.ndarray) -> None:
        out[:] = self._transform(data)
