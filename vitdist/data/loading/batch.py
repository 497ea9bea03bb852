"""A micro-batch: what a loader worker makes, how it goes to its parent, and what of it goes to the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from vitdist.data.loading.memory import Piece, received
from vitdist.data.pixels.mixing import MixTensors
from vitdist.data.storage.shards import Damage


@dataclass
class Batch:
    """A micro-batch of B samples. images uint8 [B, S, S, 3]; labels int64 [B], nodes of the packed tree.

    valid bool [B]: False where a damaged sample has no replacement (then its image is black). position and slot say
    where it stands in the plan. mix is there when the recipe mixes.
    """

    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    rows: torch.Tensor
    seeds: torch.Tensor
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
        """From a worker to its parent: few and small things as bytes, since each tensor would be a file of torch's."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.piece is not None:
            values["images"] = None
        for name in ("labels", "valid", "rows", "seeds"):
            values[name] = values[name].numpy()
        values["mix"] = None if self.mix is None else [part.numpy() for part in self.mix]
        return _received, (values,)

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


def _received(values: dict[str, Any]) -> Batch:
    """A batch as its worker sent it."""
    piece = values.pop("piece")
    if piece is not None:
        values["images"] = torch.from_numpy(received(piece)[: len(values["rows"])])
    for name in ("labels", "valid", "rows", "seeds"):
        values[name] = torch.from_numpy(values[name])
    if values["mix"] is not None:
        values["mix"] = MixTensors(*(torch.from_numpy(part) for part in values["mix"]))
    return Batch(**values)
