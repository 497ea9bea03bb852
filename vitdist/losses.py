"""The objective: one weighted cross entropy for each level of the class tree, and regularisation.

Each level's sum is divided by a denominator that the caller knows beforehand for the whole global batch, so that
micro-batches and ranks only add up, whatever they hold.

Shapes: B samples of a micro-batch, L levels, C_l classes of level l.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN = -1


def hierarchical_loss(
    logits: Sequence[Tensor],
    targets: Tensor,
    *,
    denominators: Sequence[float] | Tensor,
    lam: Tensor | None = None,
    partner_targets: Tensor | None = None,
    level_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    class_weights: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """A micro-batch's part of the loss: sum over levels of weight x (summed cross entropy) / denominator.

    `targets` int64 [B, L], -1 where a level is unknown: such an entry adds nothing. With mixing, `lam` [B] is the part
    of the own label and 1 - lam that of `partner_targets` [B, L]. Smoothing spreads over a level's own classes,
    weighted as torch's cross_entropy does. `denominators` [L] are `denominators_of` the global batch; a level that is
    known of no sample adds 0. Computed in float32; nothing waits for the device.
    """
    total = torch.zeros((), dtype=torch.float32, device=targets.device)
    for level, scores in enumerate(logits):
        weight = 1.0 if level_weights is None else level_weights[level]
        per_class = None if class_weights is None else class_weights[level]
        loss = _cross_entropy(scores, targets[:, level], label_smoothing, per_class)
        if lam is not None:
            assert partner_targets is not None, "mixing needs the partners' targets"
            other = _cross_entropy(scores, partner_targets[:, level], label_smoothing, per_class)
            loss = lam.float() * loss + (1.0 - lam.float()) * other
        total = total + weight * loss.sum() / _at_least_something(denominators[level])
    return total


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Cross entropy [B] in float32; 0 where the target is unknown."""
    return F.cross_entropy(
        logits.float(), targets, weight=class_weights, ignore_index=UNKNOWN, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip


def _at_least_something(denominator: float | Tensor) -> float | Tensor:
    if isinstance(denominator, Tensor):
        return torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return denominator if denominator > 0 else 1.0


def denominators_of(
    targets: Tensor,
    *,
    lam: Tensor | None = None,
    partner_targets: Tensor | None = None,
    class_weights: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """float64 [L]: the number of samples known at each level, or the sum of their class weights, of a global batch.

    With mixing an own label counts `lam`, its partner's 1 - lam. Meant for the CPU, where the plan of the global batch
    is known to every rank without asking the others.
    """
    sums = _label_weights(targets, class_weights)
    if lam is not None:
        assert partner_targets is not None, "mixing needs the partners' targets"
        part = lam.to(torch.float64)[:, None]
        sums = part * sums + (1.0 - part) * _label_weights(partner_targets, class_weights)
    return sums.sum(dim=0)


def _label_weights(targets: Tensor, class_weights: Sequence[Tensor | None] | None) -> Tensor:
    """float64 [B, L]: the weight of each label, 0 where it is unknown."""
    known = (targets != UNKNOWN).to(torch.float64)
    for level, weights in enumerate(class_weights or ()):
        if weights is not None:
            known[:, level] *= weights.to(torch.float64)[targets[:, level].clamp(min=0)]
    return known


def regularisation(parameters: Iterable[Tensor], *, l1: float = 0.0, l2: float = 0.0) -> Tensor | float:
    """l1 x (sum of absolute values) + l2 x (sum of squares) of the trained parameters, in float32.

    It belongs to the objective of a global batch: count it once a step, not once a micro-batch or a rank.
    """
    total: Tensor | float = 0.0
    for parameter in parameters if l1 or l2 else ():
        if parameter.requires_grad:
            values = parameter.float()
            total = total + l1 * values.abs().sum() if l1 else total
            total = total + l2 * values.square().sum() if l2 else total
    return total
