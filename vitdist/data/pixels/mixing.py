"""Mixup and cutmix over neighbouring slots (2i, 2i+1) of the GLOBAL batch: planned on the host, done on the device.

The plan is a pure function of (seed, epoch, step, pair), so it is the same for any world size, micro-batch or worker.
Mixup: Zhang et al., ICLR 2018. Cutmix: Yun et al., ICCV 2019. Pairs as in timm's "pair" mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vitdist.data.seeds import Purpose, hash_words


class Mix(IntEnum):
    """What happens to a slot."""

    NONE = 0
    MIXUP = 1
    CUTMIX = 2


_NAMES = {Mix.NONE: "none", Mix.MIXUP: "mixup", Mix.CUTMIX: "cutmix"}


class _Draw(IntEnum):
    """Each has its own stream, so that a pair's numbers do not depend on how many pairs come after it."""

    WHICH = 0
    MIXUP = 1
    CUTMIX = 2
    CENTRE = 3


@dataclass(frozen=True)
class Mixing:
    """Parameters of the Beta distributions, 0 = off; with both on, a pair gets either with probability 1/2."""

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    @property
    def active(self) -> bool:
        """Whether any pair is ever mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


@dataclass(frozen=True)
class MixPlan:
    """What happens to a run of n slots; both slots of a pair have the same entries, and partner(slot) is slot ^ 1.

    kind: int8 [n] of Mix. lam: float32 [n], the weight of the slot's own label. box: int32 [n, 4] (top, left, bottom,
    right) of what a cutmix slot takes from its partner; empty otherwise.
    """

    kind: npt.NDArray[np.int8]
    lam: npt.NDArray[np.float32]
    box: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.kind)

    def slots(self, start: int, stop: int) -> MixPlan:
        """The part of a rank or a micro-batch; pairs must stay whole."""
        assert start % 2 == 0 and (stop % 2 == 0 or stop == len(self)), f"slots {start}:{stop} cut a pair"
        return MixPlan(self.kind[start:stop], self.lam[start:stop], self.box[start:stop])

    def names(self) -> list[str]:
        """none, mixup or cutmix for each slot, for the log of samples."""
        return [_NAMES[Mix(kind)] for kind in self.kind.tolist()]

    def tensors(self) -> MixTensors:
        """On the CPU; pin and move them with the batch."""
        blend = np.where(self.kind == Mix.MIXUP, self.lam, np.float32(1))
        return MixTensors(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (self.lam, blend, self.box)))


class MixTensors(NamedTuple):
    """What the device needs: lam [B] for the loss, blend [B] and box [B, 4] for the pictures."""

    lam: torch.Tensor
    blend: torch.Tensor
    box: torch.Tensor

    def pin_memory(self) -> MixTensors:
        """In page-locked memory, so that `to` does not wait."""
        return MixTensors(*(tensor.pin_memory() for tensor in self))

    def to(self, device: torch.device) -> MixTensors:
        """On the device, without waiting for the copy."""
        return MixTensors(*(tensor.to(device, non_blocking=True) for tensor in self))


def mix_plan(seed: int, epoch: int, step: int, num_slots: int, size: int, mixing: Mixing) -> MixPlan:
    """The plan of one global batch of `num_slots` pictures, size x size; a last slot without partner stays as it is."""
    num_pairs = num_slots // 2
    key = int(hash_words(seed, Purpose.MIXING, epoch, step))

    def stream(draw: _Draw) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([key, draw], np.uint64)))

    kind = _kinds(mixing, num_pairs, stream(_Draw.WHICH))
    lam = np.ones(num_pairs)
    box = np.zeros((num_pairs, 4), np.int32)
    if (blended := np.flatnonzero(kind == Mix.MIXUP)).size:
        lam[blended] = stream(_Draw.MIXUP).beta(mixing.mixup_alpha, mixing.mixup_alpha, blended.size)
    if (cut := np.flatnonzero(kind == Mix.CUTMIX)).size:
        drawn = stream(_Draw.CUTMIX).beta(mixing.cutmix_alpha, mixing.cutmix_alpha, cut.size)
        box[cut], lam[cut] = _boxes(drawn, stream(_Draw.CENTRE).random((cut.size, 2)), size)
    return MixPlan(
        _per_slot(kind.astype(np.int8), num_slots, Mix.NONE),
        _per_slot(lam.astype(np.float32), num_slots, 1),
        _per_slot(box, num_slots, 0),
    )


def _kinds(mixing: Mixing, num_pairs: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    if mixing.mixup_alpha > 0 and mixing.cutmix_alpha > 0:
        return np.where(generator.random(num_pairs) < 0.5, Mix.MIXUP, Mix.CUTMIX)
    only = Mix.MIXUP if mixing.mixup_alpha > 0 else Mix.CUTMIX if mixing.cutmix_alpha > 0 else Mix.NONE
    return np.full(num_pairs, only)


def _boxes(
    lam: npt.NDArray[np.float64], centre: npt.NDArray[np.float64], size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Boxes [n, 4] of side size * sqrt(1 - lam) about uniform centres, clipped; and the share of the picture left."""
    side = (size * np.sqrt(1 - lam)).astype(np.int64)
    low = (centre * size).astype(np.int64) - side[:, None] // 2
    corners = np.clip(np.concatenate([low, low + side[:, None]], axis=1), 0, size)
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    return corners.astype(np.int32), 1 - area / (size * size)


def _per_slot(pairs: np.ndarray, num_slots: int, alone: float) -> np.ndarray:
    """Each pair's value for both of its slots, `alone` for a last slot without partner."""
    slots = np.full((num_slots, *pairs.shape[1:]), alone, pairs.dtype)
    slots[: 2 * len(pairs)] = np.repeat(pairs, 2, axis=0)
    return slots


class ToModelInput(torch.nn.Module):
    """uint8 batches on the device -> what the model sees; holds mean and deviation there, so no step copies them."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        assert all(math.isfinite(value) for value in (*mean, *std))
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = -255 * torch.tensor(mean, dtype=torch.float64) * scale
        self.register_buffer("scale", scale.float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, mix: MixTensors | None = None) -> torch.Tensor:
        """uint8 [B, S, S, 3] -> float32 [B, 3, S, S], normalised and mixed; no host synchronisation."""
        planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        planes = torch.addcmul(self.shift, planes, self.scale)
        return planes if mix is None else apply_mix(planes, mix)


def apply_mix(planes: torch.Tensor, mix: MixTensors) -> torch.Tensor:
    """[B, 3, S, S] blended with the partners (slot ^ 1), or with a box taken over from them."""
    num_pairs = len(planes) // 2
    paired = planes[: 2 * num_pairs]
    partner = paired.view(num_pairs, 2, *paired.shape[1:]).flip(1).view(paired.shape)
    own = _own_weight(mix.blend[: 2 * num_pairs], mix.box[: 2 * num_pairs], planes.shape[-2], planes.shape[-1])
    mixed = torch.lerp(partner, paired, own)  # exact where the weight is 0 or 1
    return mixed if len(mixed) == len(planes) else torch.cat([mixed, planes[2 * num_pairs :]])


def _own_weight(blend: torch.Tensor, box: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, 1, H, W]: blend, and 0 inside the box."""
    rows = torch.arange(height, device=box.device)
    columns = torch.arange(width, device=box.device)
    inside_rows = (rows >= box[:, 0:1]) & (rows < box[:, 2:3])
    inside_columns = (columns >= box[:, 1:2]) & (columns < box[:, 3:4])
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    return blend[:, None, None, None].masked_fill(inside, 0.0)
