"""Loss scaling for float16: its gradients underflow below 6e-8, so the loss is multiplied by a factor that adapts."""

from __future__ import annotations

import torch
from torch import Tensor

START = 2.0**16
GROWTH_INTERVAL = 2000  # good steps before the factor is tried twice as large; torch's GradScaler takes the same


class LossScale:
    """The factor, on the device: halved after a step whose gradients were not finite, doubled after many good ones.

    torch's GradScaler keeps the same two numbers but asks the host at every step whether to go on.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), START, device=device)
        self.num_good = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Take in a step: `found_inf` is a 0-dim float on the device, 0 where its gradients were finite."""
        torch._amp_update_scale_(self.value, self.num_good, found_inf, 2.0, 0.5, GROWTH_INTERVAL)

    def forgives(self) -> Tensor:
        """Whether a step that is not finite may be the factor's fault (bool, 0-dim): it can still be made smaller."""
        return self.value > 1.0

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value, "num_good": self.num_good}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave; KeyError or RuntimeError when it is not that."""
        self.value.copy_(state["value"])
        self.num_good.copy_(state["num_good"])
