"""Integer drawing for the demo set: dice, outlines and polygon filling that give the same bytes on every machine.

Lengths are in units of 1/16 of a sub-pixel: a picture of 64 x 64 pixels is drawn on 256 x 256 ink numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SIZE = 64
SUPERSAMPLING = 4
CANVAS = SIZE * SUPERSAMPLING
UNIT = 16 * SUPERSAMPLING  # units in one pixel of the picture

# Sine in 1/16384 for whole degrees: no entry is near a tie, so that every libm rounds to the same integer.
SINE = tuple(round(16384 * math.sin(math.radians(degree))) for degree in range(450))


class Dice:
    """Integers from the raw stream of PCG64, which numpy promises to keep, unlike its distributions (NEP 19)."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + ((int(self._bits.random_raw()) >> 32) * (high - low + 1) >> 32)

    def array(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        """int64 of the given shape, each from low to high, both included."""
        raw = np.asarray(self._bits.random_raw(math.prod(shape)), dtype=np.uint64).reshape(shape) >> np.uint64(32)
        return low + (raw * np.uint64(high - low + 1) >> np.uint64(32)).astype(np.int64)


def polygon(*coordinates: float) -> np.ndarray:
    """int64 [K, 2] in units from x, y, x, y... in pixels."""
    return np.array([round(c * UNIT) for c in coordinates], dtype=np.int64).reshape(-1, 2)


def smooth(points: np.ndarray, rounds: int = 2) -> np.ndarray:
    """A closed outline with its corners cut (Chaikin, 1974): towards the quadratic B-spline of its points."""
    for _ in range(rounds):
        following = np.roll(points, -1, axis=0)
        points = np.stack([3 * points + following, points + 3 * following], axis=1).reshape(-1, 2) >> 2
    return points


def turn(points: np.ndarray, degrees: int, scale: int = 256) -> np.ndarray:
    """Points turned clockwise (on the screen) about the origin and scaled by `scale`/256."""
    sine, cosine = SINE[degrees % 360], SINE[degrees % 360 + 90]
    x, y = points[:, 0], points[:, 1]
    return np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=1) * scale >> 22


def oval(x: float, y: float, across: float, down: float, tilt: int = 0) -> np.ndarray:
    """An ellipse of 24 corners about (x, y); `tilt` turns it clockwise."""
    axes = polygon(across, down)[0]
    ring = np.array([(SINE[degree + 90], SINE[degree]) for degree in range(0, 360, 15)]) * axes >> 14
    return turn(ring, tilt) + polygon(x, y)


def fill(canvas: np.ndarray, outline: np.ndarray, ink: int, only: Sequence[int] = ()) -> None:
    """Paint a polygon (even-odd) where sub-pixel centres lie inside it, and, given `only`, over those inks alone."""
    spans = _spans(outline)
    if spans is None:
        return
    top, left, inside = spans
    window = canvas[top : top + inside.shape[0], left : left + inside.shape[1]]
    inside = inside[:, : window.shape[1]]
    if only:
        inside = inside & np.isin(window, only)
    window[inside] = ink


def _spans(outline: np.ndarray) -> tuple[int, int, np.ndarray] | None:
    """Top row, left column and the bool mask of a polygon's bounding box; None when it covers no row."""
    ends = np.roll(outline, -1, axis=0)
    upward = (outline[:, 1] > ends[:, 1])[:, None]
    start, end = np.where(upward, ends, outline), np.where(upward, outline, ends)
    first = np.clip((start[:, 1] + 7) >> 4, 0, CANVAS)  # rows whose centre 16 r + 8 lies in [start, end)
    count = np.clip((end[:, 1] + 7) >> 4, 0, CANVAS) - first
    edge = np.repeat(np.arange(len(outline)), count)
    if not len(edge):
        return None
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    (x, y), (dx, dy) = start[edge].T, (end - start)[edge].T
    column = np.clip((x + (row * 16 + 8 - y) * dx // dy + 7) >> 4, 0, CANVAS)
    top, left = int(row.min()), int(column.min())
    height, width = int(row.max()) - top + 1, int(column.max()) - left + 1
    crossings = np.bincount((row - top) * width + column - left, minlength=height * width)
    return top, left, np.bitwise_xor.accumulate((crossings & 1).astype(bool).reshape(height, width), axis=1)
