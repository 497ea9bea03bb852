"""Skipping bad steps on the device: a gradient that is not finite changes nothing, too many stop everything.

After DDP's reduction the gradient norm is the same on all ranks, so they agree without a word, and without reading
anything back: the counters stay on the device and travel with the step's report.
"""

from __future__ import annotations

import torch


class NonFiniteGuard:
    """Counts non-finite gradients. `found_inf` is 1.0 where the optimizer must leave everything as it is."""

    def __init__(self, limit: int, device: torch.device, *, total: int = 0, in_row: int = 0) -> None:
        self._limit = limit
        self.total = torch.tensor(float(total), device=device)
        self.in_row = torch.tensor(float(in_row), device=device)

    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """float32 scalar for the optimizer's found_inf: this step is bad, or the limit was passed before."""
        bad = (~torch.isfinite(norm)).float()
        # past the limit the count never falls again: no later update takes effect until all ranks have stopped
        past = (self.in_row > self._limit).float()
        self.in_row = torch.where(past > 0, self.in_row + 1, (self.in_row + 1) * bad)
        self.total = self.total + bad
        return torch.maximum(bad, past)
