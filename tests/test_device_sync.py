"""P7: nothing of ours in a step makes the host wait for the device.

item(), bool(), float(), `if tensor` and masks reach Python through the operations below, on the CPU too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_losses import batch, mixing, weights
from vitdist.losses import denominators_of, hierarchical_loss, regularisation
from vitdist.optim import OPTIMIZERS, build_optimizer, clip_grad_norm, set_lr, step
from vitdist.training.ema import ModelEMA

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}


class NoWaiting(TorchDispatchMode):
    """Raises where the host would read a value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_a_wait() -> None:
    for wait in (lambda x: x.item(), bool, lambda x: x[x > 0], lambda x: torch.equal(x, x)):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait(torch.ones(()))


def test_the_loss_does_not_wait() -> None:
    logits, targets = batch()
    lam, partners = mixing(targets)
    denominators = denominators_of(targets, lam=lam, partner_targets=partners, class_weights=weights())
    with NoWaiting():
        loss = hierarchical_loss(
            logits, targets, lam=lam, partner_targets=partners, level_weights=(1.0, 0.5, 0.5), label_smoothing=0.1,
            class_weights=weights(), denominators=denominators,
        )  # fmt: skip
        (loss + regularisation(logits, l1=0.1, l2=0.1)).backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_does_not_wait(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(name, [{"params": list(model.parameters()), "lr_scale": 1.0}], lr=0.1)
    ema = ModelEMA(model, 0.99)
    with NoWaiting():
        for _ in range(3):
            model(torch.randn(4, 4)).square().sum().backward()
            bad = (~torch.isfinite(clip_grad_norm(model.parameters(), 1.0))).float()
            set_lr(optimizer, 0.05)
            step(optimizer, bad)
            ema.update(model, bad)
