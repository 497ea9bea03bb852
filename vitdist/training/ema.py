"""The exponential moving average of a model's weights, kept in float32 beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitdist.errors import CheckpointError
from vitdist.runtime.shards import held

COUNT = "num_updates"
CHUNK = 64  # tensors averaged at once


class ModelEMA:
    """average <- decay x average + (1 - decay) x weights, for parameters and floating buffers.

    With `warmup` the decay of update t is min(decay, (1 + t) / (10 + t)), so that the average forgets the start of a
    short run: at 0.9999 alone it would still hold 81 % of it after 2,100 steps. Skipped updates do not count.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.decay = decay
        self.warmup = warmup
        self.average = {name: tensor.detach().float().clone() for name, tensor in _averaged(model).items()}
        device = next(iter(self.average.values())).device
        self.num_updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, model: nn.Module, found_inf: Tensor | None = None) -> None:
        """Take in the model's weights, or nothing where `found_inf` (0-dim, on the device) is not 0.

        Nothing waits for the device. Parameters are taken to be finite, as they are where bad updates are skipped.
        """
        taken = torch.ones_like(self.num_updates) if found_inf is None else (found_inf == 0).to(torch.float64)
        part = ((1.0 - self._decay()) * taken).float()
        self.num_updates += taken
        parameters, buffers = _parameters(model), _buffers(model)
        for names in _chunks(list(parameters)):
            _move([self.average[name] for name in names], [parameters[name] for name in names], part)
        for name, tensor in buffers.items():
            average = self.average[name]
            # Chosen, not multiplied by 0: a buffer that a bad batch made NaN must not come through.
            average.copy_(torch.where(taken == 0, average, torch.lerp(average, tensor.float(), part)))

    def _decay(self) -> Tensor:
        if not self.warmup:
            return torch.full_like(self.num_updates, self.decay)
        return ((1.0 + self.num_updates) / (10.0 + self.num_updates)).clamp(max=self.decay)

    def move(self, average: dict[str, Tensor]) -> None:
        """Go on with the same average elsewhere: on another device, or this rank's pieces of it."""
        self.average = average
        self.num_updates = self.num_updates.to(next(iter(average.values())).device)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by their names in the model, and the count of updates: plain tensors, no copies."""
        return {**self.average, COUNT: self.num_updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave; CheckpointError when it is of another model."""
        if set(state) != {*self.average, COUNT}:
            strange = sorted(set(state) ^ {*self.average, COUNT})
            raise CheckpointError(f"this average is of another model: {strange[0]} and {len(strange) - 1} more differ")
        for name, tensor in state.items():
            mine = self.num_updates if name == COUNT else self.average[name]
            if tensor.shape != mine.shape:
                raise CheckpointError(f"this average is of another model: {name} has another shape")
            mine.copy_(tensor)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with their average, cast to the model's types."""
        for name, tensor in _averaged(model).items():
            tensor.copy_(self.average[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model carries the average inside the block, and its own weights again, bit for bit, after it."""
        own = {name: tensor.detach().clone() for name, tensor in _averaged(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in _averaged(model).items():
                    tensor.copy_(own[name])


def _move(averages: list[Tensor], tensors: list[Tensor], part: Tensor) -> None:
    """averages += part x (tensors - averages), a few kernels for all of them."""
    moves = torch._foreach_sub([tensor.detach().float() for tensor in tensors], averages)
    torch._foreach_mul_(moves, part)
    torch._foreach_add_(averages, moves)


def _chunks(names: list[str]) -> Iterator[list[str]]:
    """A few at a time, so that the differences of a large model need not all be in memory at once."""
    for start in range(0, len(names), CHUNK):
        yield names[start : start + CHUNK]


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """The floating parameters and buffers of a model, as they stand in it."""
    return {**_parameters(model), **_buffers(model)}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds of them: under ZeRO-3 its pieces, whose average is the pieces of the average."""
    return {name: held(tensor) for name, tensor in model.named_parameters() if tensor.is_floating_point()}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_buffers() if tensor.is_floating_point()}
