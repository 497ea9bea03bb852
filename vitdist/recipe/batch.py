"""Batch arithmetic: global_batch_size = world x micro_batch_size x accumulation, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitdist.errors import RecipeError


@dataclass(frozen=True)
class BatchSplit:
    """A rank's share of a global batch: `accumulation` micro-batches of `micro_batch_size` samples."""

    micro_batch_size: int
    accumulation: int


def split_batch(
    global_batch_size: int, world: int, micro_batch_size: int | Literal["auto"] | None, *, mixing: bool = False
) -> BatchSplit:
    """Divide a global batch; without a micro_batch_size each rank's share is one; `mixing` wants it even, for pairs.

    "auto" counts as none until one is found. RecipeError in one line with the numbers and the nearest that divide.
    """
    micro_batch_size = None if micro_batch_size == "auto" else micro_batch_size
    if mixing and micro_batch_size is not None and micro_batch_size % 2:
        raise RecipeError(
            f"train.micro_batch_size: {micro_batch_size} is odd, and mixup and cutmix mix pairs; "
            f"use {micro_batch_size + 1}, or switch both off"
        )
    unit = world * (micro_batch_size or (2 if mixing else 1))
    if global_batch_size % unit:
        raise RecipeError(_refusal(global_batch_size, world, micro_batch_size, unit))
    micro = micro_batch_size or global_batch_size // world
    return BatchSplit(micro, global_batch_size // (world * micro))


def micro_batch_sizes(global_batch_size: int, world: int, *, mixing: bool) -> list[int]:
    """The micro-batches that divide a rank's share, smallest first; even ones for mixing."""
    share = global_batch_size // world
    return [size for size in range(2 if mixing else 1, share + 1, 2 if mixing else 1) if share % size == 0]


def _refusal(global_batch_size: int, world: int, micro_batch_size: int | None, unit: int) -> str:
    below = global_batch_size // unit * unit
    nearest = " or ".join(str(size) for size in (below, below + unit) if size)
    ranks = f"{world} ranks" if world > 1 else "1 rank"
    if micro_batch_size is None:
        pairs = " in pairs, as mixup and cutmix want" if unit == 2 * world else ""
        text = f"train.global_batch_size: {global_batch_size} does not divide over {ranks}{pairs}"
        return f"{text}; nearest that do: {nearest}"
    text = (
        f"train.global_batch_size: {global_batch_size} is no multiple of {ranks} x micro_batch_size {micro_batch_size} "
        f"= {unit}; nearest: {nearest}"
    )
    share, rest = divmod(global_batch_size, world)
    fits = [size for size in range(1, share + 1) if share % size == 0] if not rest else []
    if not fits:
        return text
    return f"{text}; or micro_batch_size {min(fits, key=lambda size: (abs(size - micro_batch_size), -size))}"
