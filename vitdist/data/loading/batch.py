"""A micro-batch: what a loader worker makes, how it goes to its parent, and what of it goes to the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vitdist.data.loading.memory import Piece, received
from vitdist.data.pixels.mixing import MixTensors
from vitdist.data.storage.shards import Damage


@dataclass
class Batch:
    """A micro-batch of B samples. images uint8 [B, S, S, 3]; labels int64 [B], nodes of the packed tree.

    rows int64 [B], seeds uint64 [B] and valid bool [B] stay on the host; valid is False where a damaged sample has no
    replacement (then its image is black). position and slot say where it stands in the plan. mix is there when the
    recipe mixes.
    """

    images: torch.Tensor
    labels: torch.Tensor
    rows: np.ndarray
    seeds: np.ndarray
    valid: np.ndarray
    position: int
    epoch: int
    slot: int
    damages: list[Damage]
    keys: list[str]
    mix: MixTensors | None = None
    piece: Piece | None = None  # in a worker: where `images` lie

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """From a worker to its parent: no tensor, since each would be a file of torch's; the pixels where they lie."""
        images = self.images if self.piece is None else self.piece
        arrays = (self.labels.numpy(), self.rows, self.seeds, self.valid)
        mix = None if self.mix is None else [part.numpy() for part in self.mix]
        return _received, (images, arrays, mix, self.position, self.epoch, self.slot, self.damages, self.keys)

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that copies to the device do not wait."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            mix=None if self.mix is None else self.mix.pin_memory(),
        )

    def to(self, device: torch.device) -> Batch:
        """What the step needs on the device; the bookkeeping stays on the host."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            mix=None if self.mix is None else self.mix.to(device),
        )


def _received(
    images: torch.Tensor | Piece, arrays: tuple[np.ndarray, ...], mix: list[np.ndarray] | None, *told: Any
) -> Batch:
    """A batch as its worker sent it."""
    labels, rows, seeds, valid = arrays
    if isinstance(images, Piece):
        images = torch.from_numpy(received(images)[: len(rows)])
    batch = Batch(images, torch.from_numpy(labels), rows, seeds, valid, *told)
    batch.mix = None if mix is None else MixTensors(*map(torch.from_numpy, mix))
    return batch
