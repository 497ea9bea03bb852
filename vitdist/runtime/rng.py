"""The generators of one process: seeding them, and their state as plain tensors and numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed torch, numpy and python. Ranks differ, since dropout and drop path draw per rank."""
    torch.manual_seed(seed * 1_000_003 + rank)
    np.random.seed((seed * 1_000_003 + rank) % 2**32)
    random.seed(seed * 1_000_003 + rank)


def get_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, JSON) of all generators of this process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, python_keys, python_gauss = random.getstate()
    tensors["python"] = torch.tensor(python_keys, dtype=torch.int64)
    plain = {
        "numpy": [str(kind), int(position), int(has_gauss), float(gauss)],
        "python": [version, python_gauss],
    }
    return tensors, plain


def set_state(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    """Put back what `get_state` gave. KeyError or ValueError when it is not that."""
    torch.set_rng_state(tensors["torch"])
    kind, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, python_gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Whatever draws inside the block leaves the generators as they were."""
    tensors, plain = get_state()
    try:
        yield
    finally:
        set_state(tensors, plain)
