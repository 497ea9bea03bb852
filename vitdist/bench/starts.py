"""What a start in the middle of an epoch costs, beside one at its beginning: from nothing to the first batch."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from vitdist.bench.cores import on_core, two_cores
from vitdist.bench.data import Wish

PLACES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
STARTS = 5  # a round


@dataclass(frozen=True)
class Start:
    """Seconds from nothing (the plan is made anew, a worker started) to the first batch at a position of an epoch."""

    position: int
    rounds: list[float]


def measure_starts(wish: Wish, num_rounds: int) -> list[Start]:
    """Every position once a round, several rounds."""
    last = wish.plan().steps_per_epoch - 1
    found = {round(place * last): list[float]() for place in PLACES}
    for _ in range(STARTS * num_rounds):
        for position, seconds in found.items():
            seconds.append(_one_start(wish, position))
    return [Start(position, seconds) for position, seconds in found.items()]


def _one_start(wish: Wish, position: int) -> float:
    work, parent = two_cores()
    started = time.perf_counter()
    with on_core(work):
        stream = iter(wish.loader(position=position))
    with on_core(parent):
        next(stream)
    return time.perf_counter() - started


def table(found: list[Start]) -> str:
    """Milliseconds at each position, and how often those at the beginning."""
    lines = [f"{'start at batch':44s} {'ms':>7} {'times the first':>20}"]
    base = statistics.median(found[0].rounds)
    for start in found:
        middle = statistics.median(start.rounds)
        lines.append(f"{start.position:<44d} {1000 * middle:7.1f} {middle / base:20.2f}")
    return "\n".join(lines)
