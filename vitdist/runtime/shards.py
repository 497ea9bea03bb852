"""Who holds which elements of which tensor when a model is divided over ranks: plain arithmetic and one gather."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

CHUNK = 1 << 24  # elements that travel at once, so that collecting a large model needs little beside the device's own


@dataclass(frozen=True)
class Fragment:
    """flat[start : start + length] of a rank is element `offset` and following of the parameter `name`."""

    name: str
    offset: int
    start: int
    length: int


class Layout(Protocol):
    """How the parameters of one group lie in the equally long flat tensors of all ranks."""

    def fragments(self, rank: int) -> Iterator[Fragment]: ...


@dataclass(frozen=True)
class Cut:
    """ZeRO 1 and 2: parameters one behind the other, the whole cut into `size` elements a rank."""

    places: Sequence[tuple[str, int, int]]  # name, number of elements, where it starts in the whole
    size: int

    def fragments(self, rank: int) -> Iterator[Fragment]:
        low, high = rank * self.size, (rank + 1) * self.size
        for name, number, place in self.places:
            first, last = max(low, place), min(high, place + number)
            if first < last:
                yield Fragment(name, first - place, first - low, last - first)


@dataclass(frozen=True)
class Dealt:
    """ZeRO 3: each parameter is divided over all ranks by itself; the pieces of one rank lie one behind the other."""

    pieces: Sequence[tuple[str, int, int]]  # name, number of elements, length of a rank's piece, padding included

    def fragments(self, rank: int) -> Iterator[Fragment]:
        start = 0
        for name, number, piece in self.pieces:
            length = min(piece, number - rank * piece)
            if length > 0:
                yield Fragment(name, rank * piece, start, length)
            start += piece


def part_of(layout: Layout, rank: int, whole: Mapping[str, Tensor], into: Tensor) -> None:
    """Fill a rank's flat tensor from whole tensors; what a parameter lacks, and padding, is 0."""
    into.zero_()
    for fragment in layout.fragments(rank):
        if fragment.name in whole:
            values = whole[fragment.name].reshape(-1)[fragment.offset : fragment.offset + fragment.length]
            into[fragment.start : fragment.start + fragment.length].copy_(values)


def whole_of(layout: Layout, parts: Sequence[Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The whole tensors from the flat ones of all ranks, in the order of ranks."""
    found: dict[str, Tensor] = {}
    for rank, part in enumerate(parts):
        for fragment in layout.fragments(rank):
            if fragment.name not in found:
                found[fragment.name] = torch.empty(shapes[fragment.name], dtype=part.dtype)
            target = found[fragment.name].view(-1)[fragment.offset : fragment.offset + fragment.length]
            target.copy_(part[fragment.start : fragment.start + fragment.length])
    return found


def to_main(flat: Tensor, rank: int, world: int, device: torch.device) -> list[Tensor]:
    """The equally long flat tensors of all ranks, in rank 0's host memory; [] elsewhere. Collective."""
    if world == 1:
        return [flat.detach().to("cpu", copy=True)]
    parts = [torch.empty(flat.shape, dtype=flat.dtype) for _ in range(world)] if rank == 0 else []
    for begin in range(0, flat.numel(), CHUNK):
        mine = flat.detach()[begin : begin + CHUNK].to(device).contiguous()
        arrived = [torch.empty_like(mine) for _ in range(world)] if rank == 0 else None
        dist.gather(mine, arrived, 0)
        for part, chunk in zip(parts, arrived or (), strict=True):
            part[begin : begin + CHUNK].copy_(chunk)
    return parts


def held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: under ZeRO-3 its flat piece, padded with zeros, else all of it."""
    piece: Tensor = getattr(parameter, "ds_tensor", parameter)
    return piece


def without_padding(parameter: nn.Parameter, rank: int) -> Tensor:
    """What a rank holds of a divided parameter, less the padding, which DeepSpeed leaves as it finds it in memory."""
    piece = held(parameter).detach()
    return piece[: max(0, num_elements(parameter) - rank * piece.numel())]


def num_elements(parameter: nn.Parameter) -> int:
    """How many elements a parameter has over all ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """Memory that tensors take on this rank; several views of one storage count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
