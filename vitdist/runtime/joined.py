"""A model and its optimizer as all ranks train them. Here: whole on every rank; runtime/zero.py divides them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitdist import optim
from vitdist.checkpoint import state as files
from vitdist.losses import regularisation
from vitdist.runtime.scaling import LossScale

if TYPE_CHECKING:
    from vitdist.runtime.engine import Engine


class Guard(Protocol):
    """What skips bad steps (training.guard)."""

    def judge(self, norm: Tensor, forgiven: Tensor | None = None) -> Tensor: ...

    def is_past(self) -> Tensor: ...


class Joined:
    """Under DDP, or alone: every rank holds all weights, gradients and moments. Methods are collective."""

    forward_is_collective = False  # an evaluation then runs as many forwards on every rank
    config: dict[str, Any] | None = None  # DeepSpeed's

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None,
        scale: LossScale | None,
    ) -> None:
        self.engine, self.model, self.optimizer, self.clip, self.scale = engine, model, optimizer, clip, scale
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.wrapped = self._join()
        running = ("running_mean", "running_var")
        self._statistics = [buffer for name, buffer in model.named_buffers() if name.endswith(running)]

    def _join(self) -> nn.Module:
        return self.engine.replicate(self.model)

    @property
    def evaluated(self) -> nn.Module:
        """The module to evaluate: the plain one, so that ranks may have different numbers of batches."""
        return self.model

    # ---- a step

    def __call__(self, images: Tensor) -> Any:
        """Logits in training, in the recipe's precision."""
        with self.engine.autocast():
            return self.wrapped(images)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of a micro-batch: gradients travel only with the last one."""
        return self.engine.local_gradients(self.wrapped, local=not last)

    def backward(self, loss: Tensor) -> None:
        """`loss` is this rank's part of the objective, which is the sum over ranks and micro-batches."""
        loss = loss * self.engine.world  # the mean of the ranks' gradients is taken; the objective is a sum
        (loss if self.scale is None else loss * self.scale.value).backward()

    def penalty(self, *, l1: float, l2: float) -> Tensor | float:
        """This rank's share of the objective's L1 and L2 terms, to be added to its part of the loss once a step."""
        return regularisation(self.trained, l1=l1, l2=l2) / self.engine.world

    def update(self, guard: Guard) -> tuple[Tensor, Tensor]:
        """One update with the gradients collected, or none: (their norm, 1.0 where nothing was updated)."""
        if self.scale is not None:
            gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
            torch._foreach_mul_(gradients, self.scale.value.reciprocal())
        norm = optim.clip_grad_norm(self.trained, self.clip)
        found_inf = self._judged(guard, norm)
        optim.step(self.optimizer, found_inf)
        self.optimizer.zero_grad(set_to_none=True)
        self._share_statistics()
        return norm, found_inf

    def _share_statistics(self) -> None:
        """Batch norms' running statistics are rank 0's everywhere, for evaluations too; DDP waits for a forward."""
        for buffer in self._statistics if self.engine.world > 1 else ():
            dist.broadcast(buffer, 0)

    def _judged(self, guard: Guard, norm: Tensor) -> Tensor:
        found_inf = guard.judge(norm, None if self.scale is None else self.scale.forgives())
        if self.scale is not None:
            self.scale.update((~torch.isfinite(norm)).float())
        return found_inf

    # ---- its state, for a checkpoint: whole tensors by name, on rank 0; elsewhere nothing that counts

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the model under training."""
        return self.gathered(self.model.state_dict())

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """`name/key` -> tensor, as checkpoint.state names them."""
        return files.optimizer_tensors(self.optimizer)

    def gathered(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from what each rank holds of them, by the model's names."""
        return dict(held)

    def divided(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `gathered`: what this rank holds of whole tensors."""
        return {name: tensor.to(self.engine.device) for name, tensor in whole.items()}

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Put whole weights into the model; RuntimeError when they are of another."""
        self.model.load_state_dict(whole)

    def release(self) -> None:
        """Let go of weights that were collected for a forward."""

    def leave(self) -> None:
        """Another model is about to take this one's place: let its memory go with the last reference to it."""
        self.engine.forget()

    def holdings(self) -> str | None:
        """One line on what this rank holds of the whole, measured; None where it holds all."""
        return None
