"""A busy other core beside the step: what the machine itself takes from two cores at work, whatever the work is."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from vitdist.data.pixels.transforms import Augment, Preprocessing, TrainTransform, prepare_worker

PRODUCTS, DECODING = "small matrix products", "decoding, no hand-over"
SYSTEM = Path("/sys/devices/system/cpu")


@contextmanager
def beside(kind: str, cores: set[int]) -> Iterator[None]:
    """A process on these cores for as long, of work that reads nothing and gives nothing to anybody."""
    process = multiprocessing.get_context("fork").Process(target=_work, args=(KINDS[kind], cores), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _work(kind: Callable[[], Iterator[object]], cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    prepare_worker()
    for _ in kind():
        pass


def _products() -> Iterator[object]:
    """16 KB: they stay in a core's own cache."""
    factor = np.eye(64, dtype=np.float32)
    while True:
        yield factor @ factor


def _decoding() -> Iterator[object]:
    """A worker's work on one drawn picture of 300 x 300."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((300, 300)).save(file, "JPEG", quality=90)
    transform = TrainTransform(Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), Augment())
    data, out = file.getvalue(), np.empty((224, 224, 3), np.uint8)
    for draws in itertools.cycle(transform.draw(range(1000))):
        yield transform(data, draws, out)


KINDS = {PRODUCTS: _products, DECODING: _decoding}


def kinship(one: int, other: int) -> str:
    """What two processors of this machine share, as it says itself."""
    siblings, cache = (
        _processors(SYSTEM / f"cpu{one}" / place)
        for place in ("topology/thread_siblings_list", "cache/index3/shared_cpu_list")
    )
    if siblings is None:
        return "it is not known what they share"
    if other in siblings:
        return "two threads of one core"
    return "two cores that share a cache" if cache and other in cache else "two cores with caches of their own"


def _processors(file: Path) -> set[int] | None:
    """A list as Linux writes it, "0-3,8"; None where there is none."""
    try:
        parts = file.read_text().strip().split(",")
    except OSError:
        return None
    ranges = [part.partition("-") for part in parts if part]
    return {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}
