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

    def is_past(self) -> torch.Tensor:
        """Whether the limit was passed (bool, 0-dim): then no later update may take effect."""
        return self.in_row > self._limit

    def judge(self, norm: torch.Tensor, forgiven: torch.Tensor | None = None) -> torch.Tensor:
        """float32 scalar for the optimizer's found_inf: this step is bad, or the limit was passed before.

        A bad step is skipped but not counted where it is `forgiven` (bool, 0-dim): a loss scale that can still fall.
        """
        bad = (~torch.isfinite(norm)).float()
        # past the limit the count never falls again: no later update takes effect until all ranks have stopped
        past = self.is_past().float()
        counted = bad if forgiven is None else bad * (~forgiven).float()
        self.in_row = torch.where(past > 0, self.in_row + 1, (self.in_row + 1) * counted)
        self.total = self.total + counted
        return torch.maximum(bad, past)
