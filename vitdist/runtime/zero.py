"""DeepSpeed's ZeRO 1, 2 and 3: optimizer, gradients and weights divided over the ranks, with DDP's numbers.

The parameters are float32 at every stage and `train.precision` is autocast inside the model, as under DDP: so
accumulation, moments and checkpoints are float32 too, and the strategies differ by rounding only. DeepSpeed's own bf16
mode would halve what ranks hold of the weights, and train another model than DDP does.

Attributes of DeepSpeed's engine and optimizers used here are those of 0.19.8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitdist.runtime.joined import Guard, Joined
from vitdist.runtime.scaling import LossScale
from vitdist.runtime.shards import (
    Cut,
    Dealt,
    Layout,
    held,
    num_bytes,
    num_elements,
    part_of,
    to_main,
    whole_of,
    without_padding,
)
from vitdist.runtime.zero_setup import deepspeed_for, quiet

if TYPE_CHECKING:
    from vitdist.runtime.engine import Engine


class Sharded(Joined):
    """The same as Joined, divided by DeepSpeed."""

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None,
        scale: LossScale | None,
        config: dict[str, Any],
    ) -> None:
        """Collective. What the optimizer knows of its parameters (a resumed run's moments) goes to whom it belongs."""
        self.config: dict[str, Any] = config
        self.forward_is_collective = config["zero_optimization"]["stage"] == 3
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._penalty: tuple[float, float] | None = None
        self._gradient_bytes = 0
        super().__init__(engine, model, optimizer, clip=clip, scale=scale)

    def _join(self) -> nn.Module:
        known = {self._names[id(parameter)]: state for parameter, state in self.optimizer.state.items()}
        self.optimizer.state.clear()
        deepspeed = deepspeed_for(self.engine)
        with quiet():
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=_InPrecision(self.model, self.engine), optimizer=self.optimizer, config=self.config
            )
            self.engine.also_times_out(self._zero.dp_process_group)
        self._groups = list(self._layouts())
        self._adopt(known)
        if self.forward_is_collective:
            for parameter in self.trained:
                parameter.register_hook(self._penalised(parameter))
        wrapped: nn.Module = self._engine
        return wrapped

    @property
    def evaluated(self) -> nn.Module:
        """Under ZeRO-3 the module whose hooks collect each layer's weights."""
        module: nn.Module = self._engine.module if self.forward_is_collective else self.model
        return module

    # ---- a step

    def __call__(self, images: Tensor) -> Any:
        return self._engine(images)

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        if self.scale is not None:
            self._zero.override_loss_scale(float(self.scale.value))
        # as under DDP the mean over ranks is taken, of a sum; DeepSpeed would divide by the accumulation as well
        self._engine.backward(loss * self.engine.world, scale_wrt_gas=False)
        self._penalty = None

    def penalty(self, *, l1: float, l2: float) -> Tensor | float:
        """Under ZeRO-3 no rank sees the whole sums: each adds its pieces', and the gradients come in by hooks."""
        if not self.forward_is_collective or not (l1 or l2):
            return super().penalty(l1=l1, l2=l2)
        self._penalty = (l1, l2)
        pieces = [without_padding(parameter, self.engine.rank) for parameter in self.trained]
        return sum(
            (l1 * piece.abs().sum() + l2 * piece.square().sum() for piece in pieces),
            torch.zeros((), device=self.engine.device),
        )

    def _penalised(self, parameter: nn.Parameter) -> Any:
        """Adds the penalty's gradient while a layer's weights are there for its backward."""

        def add(gradient: Tensor) -> Tensor:
            if self._penalty is None:
                return gradient
            (l1, l2), values = self._penalty, parameter.detach()
            scale = 1.0 if self.scale is None else float(self.scale.value)
            return gradient + scale * (l1 * values.sign() + 2.0 * l2 * values)

        return add

    def update(self, guard: Guard) -> tuple[Tensor, Tensor]:
        """DeepSpeed skips by itself what is not finite; past the guard's limit the fused kernels leave all as it is."""
        if not self._gradient_bytes:
            self._gradient_bytes = sum(gradient.nbytes for gradient in self._gradients())
        kept_still = guard.is_past().to(torch.float32)
        self.optimizer.found_inf = kept_still.cpu() if self._offloaded else kept_still  # type: ignore[attr-defined]
        try:
            self._engine.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        self._share_statistics()
        norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self.engine.device)
        return norm, self._judged(guard, norm)

    # ---- its state

    @property
    def _offloaded(self) -> bool:
        return "offload_optimizer" in self.config["zero_optimization"]

    def _layouts(self) -> Iterator[tuple[Tensor, Layout]]:
        """(this rank's flat tensor, which the optimizer updates; how the parameters lie in it) for each group."""
        if self.forward_is_collective:
            for flat, group in zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True):
                yield flat, Dealt([(self._names[id(p)], num_elements(p), p.partition_numel()) for p in group])
            return
        zero = self._zero
        flats, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        for flat, group, offsets in zip(flats, groups, zero.round_robin_bit16_offsets, strict=True):
            places = [(self._names[id(p)], p.numel(), offset) for p, offset in zip(group, offsets, strict=True)]
            yield flat, Cut(places, flat.numel())

    def _adopt(self, known: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give each flat tensor its part of the optimizer's state, by parameter."""
        for flat, layout in self._groups if known else ():
            names = {fragment.name for rank in range(self.engine.world) for fragment in layout.fragments(rank)}
            for key in {key for name in names for key in known.get(name, {})}:
                whole = {name: known[name][key] for name in names if key in known.get(name, {})}
                if key == "step":
                    value = next(iter(whole.values())).to(flat.device, copy=True)
                else:
                    value = torch.empty_like(flat, requires_grad=False)
                    part_of(layout, self.engine.rank, whole, value)
                self.optimizer.state[flat][key] = value

    def optimizer_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for flat, layout in self._groups:
            for key, value in sorted(self.optimizer.state.get(flat, {}).items()):
                if value.numel() == 1:  # the count of steps, one a group
                    names = {fragment.name for rank in range(self.engine.world) for fragment in layout.fragments(rank)}
                    found |= {f"{name}/{key}": value.detach().to("cpu", copy=True) for name in names}
                else:
                    found |= {f"{name}/{key}": tensor for name, tensor in self._collected(value, layout).items()}
        return dict(sorted(found.items())) if self.engine.is_main else {}

    def _collected(self, flat: Tensor, layout: Layout) -> dict[str, Tensor]:
        parts = to_main(flat, self.engine.rank, self.engine.world, self.engine.device)
        return whole_of(layout, parts, self._shapes)

    def weights(self) -> dict[str, Tensor]:
        return self.gathered(self._held())

    def _held(self) -> dict[str, Tensor]:
        """The state dict, with this rank's pieces in the place of parameters."""
        state = self.model.state_dict()
        pieces = {name: held(parameter) for name, parameter in self.model.named_parameters()}
        return {name: pieces.get(name, tensor) for name, tensor in state.items()}

    def gathered(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.forward_is_collective:
            return super().gathered(held)
        found = super().gathered({name: tensor for name, tensor in held.items() if name not in self._shapes})
        for name in [name for name in held if name in self._shapes]:  # in the same order on all ranks
            found |= self._collected(held[name], self._dealt(name, held[name]))
        return {name: found[name] for name in held} if self.engine.is_main else {}

    def divided(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.forward_is_collective:
            return super().divided(whole)
        pieces = {name: self._piece(name, tensor) for name, tensor in whole.items() if name in self._shapes}
        return super().divided({name: pieces.get(name, tensor) for name, tensor in whole.items()})

    def _piece(self, name: str, whole: Tensor) -> Tensor:
        like = held(self.model.get_parameter(name))
        piece = torch.empty_like(like, dtype=whole.dtype)
        part_of(self._dealt(name, piece), self.engine.rank, {name: whole}, piece)
        return piece

    def _dealt(self, name: str, piece: Tensor) -> Layout:
        return Dealt([(name, self._shapes[name].numel(), piece.numel())])

    @torch.no_grad()
    def load(self, whole: Mapping[str, Tensor]) -> None:
        if not self.forward_is_collective:
            return super().load(whole)
        self.release()
        mine = self._held()
        if set(whole) != set(mine) or any(whole[n].shape != self._shapes.get(n, mine[n].shape) for n in mine):
            raise RuntimeError("these weights are of another model")
        for name, tensor in self.divided(whole).items():
            mine[name].copy_(tensor)

    def leave(self) -> None:
        """DeepSpeed's hooks would keep the model for ever; at stage 3 it keeps this rank's part even so (0.19.8)."""
        self._engine.destroy()

    def release(self) -> None:
        if self.forward_is_collective:
            self._zero._partition_all_parameters()

    def holdings(self) -> str:
        parameters = list(self.model.parameters())
        mine = sum(held(parameter).numel() for parameter in parameters)
        whole = sum(num_elements(parameter) for parameter in parameters)
        trained = sum(num_elements(parameter) for parameter in self.trained)
        flats = [flat for flat, _ in self._groups]
        moments = [value for flat in flats for value in self.optimizer.state.get(flat, {}).values()]
        weights = [held(parameter) for parameter in parameters]
        masters = num_bytes([*weights, *flats]) - num_bytes(weights)
        return (
            f"zero{self.config['zero_optimization']['stage']}: this rank holds {mine} of {whole} parameters "
            f"({_mib(num_bytes(weights))}), gradients of {_mib(self._gradient_bytes)}, optimizer state of "
            f"{_mib(num_bytes(moments))} and {_mib(masters)} of weights to update"
            f"{' in host memory' if self._offloaded else ''}; "
            f"under ddp: {_mib(4 * whole)}, {_mib(4 * trained)}, {_mib(4 * trained * self._num_moments())} and none"
        )

    def _num_moments(self) -> int:
        state = self.optimizer.state.get(self._groups[0][0], {})
        return sum(value.numel() > 1 for value in state.values())

    def _gradients(self) -> list[Tensor]:
        """The gradients this rank keeps once they are reduced."""
        if self._offloaded:
            return [flat.grad for flat, _ in self._groups if flat.grad is not None]
        groups = self._zero.averaged_gradients.values()
        return [gradient for group in groups for gradient in group or () if gradient is not None]


class _InPrecision(nn.Module):
    """The model under autocast. DeepSpeed switches off an autocast around its forward, so it is inside."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.model = model
        self._engine = engine

    def forward(self, images: Tensor) -> Any:
        with self._engine.autocast():
            return self.model(images)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
