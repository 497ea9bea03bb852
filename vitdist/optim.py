"""Optimizers: parameter groups by timm's rules, fused updates that can be skipped on the device, and clipping.

Nothing here waits for the device: a bad step is marked by a tensor and skipped by the fused kernels themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vitdist.errors import UsageError

OPTIMIZERS = ("adamw", "adam", "sgd")


class Groupable(Protocol):
    """A model that knows which parameters take no decay and which layer each stands in (models.Classifier)."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...

    def no_weight_decay(self) -> set[str]: ...

    def layer_ids(self) -> dict[str, int]: ...


def param_groups(
    model: Groupable, *, lr: float, head_lr_scale: float = 1.0, weight_decay: float = 0.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Trained parameters grouped by (`lr_scale`, weight decay), in the order they first come up in the model.

    Biases, vectors and `no_weight_decay()` take no decay. A layer i of n backbone layers learns at lr x
    layer_decay^(n - i) (BEiT, Bao et al. 2022, as in timm), counted from the head, which learns at lr x head_lr_scale.
    """
    undecayed = model.no_weight_decay()
    layers = model.layer_ids() if layer_decay != 1.0 else {}
    top = max(layers.values(), default=0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") or name in undecayed else weight_decay
        scale = layer_decay ** (top - layers[name]) if layers else 1.0
        scale *= head_lr_scale if name.startswith("head.") else 1.0
        group = groups.setdefault(
            (scale, decay), {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
        )
        group["params"].append((name, parameter))
    if not groups:
        raise UsageError("nothing is left to train: model.freeze leaves no parameter")
    return list(groups.values())


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> Optimizer:
    """AdamW, Adam (its weight decay an L2 term of the gradient) or SGD with Nesterov momentum, all fused."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    raise UsageError(f"there is no optimizer {name}; choose {', '.join(OPTIMIZERS)}")


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group its share of a base rate: lr x lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def step(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Update once, or not at all where `found_inf` (a 0-dim tensor on the device) is not 0; the host never looks.

    The fused kernels read `found_inf` themselves: parameters, moments and step counters then stay as they were.
    `optimizer` is torch's own, not a wrapper. SGD's momentum is made as zeros here, which is where its first step
    begins anyway: torch makes it without initialising it, and a skipped first step would leave it so.
    """
    _make_momentum(optimizer)
    optimizer.found_inf = (found_inf != 0).to(torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _make_momentum(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        if not group.get("momentum"):
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """The total 2-norm of the gradients [0-dim], which are scaled down to `max_norm` where they exceed it.

    With `max_norm` None nothing is scaled. A norm that is not finite spoils the gradients: skip that step.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, total)
    return total
