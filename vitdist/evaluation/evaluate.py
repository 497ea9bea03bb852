"""Exact evaluation: every sample of a view once, at any number of ranks, as one table that all of them have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vitdist.data.loading.batch import Batch
from vitdist.data.pixels.mixing import ToModelInput
from vitdist.evaluation.predictions import PredictionTable, from_logits, merge
from vitdist.runtime.engine import Engine, evaluating


@dataclass(frozen=True)
class Evaluated:
    """The predictions of all ranks, and the damaged samples they met (as text, by rank)."""

    table: PredictionTable
    damages: list[str]

    def loss(self, level_weights: list[float]) -> float:
        """The weighted sum over levels of the mean cross-entropy, in float64; unknown labels are left out."""
        means = [self._mean(level) for level in range(self.table.num_levels)]
        return float(sum(weight * mean for weight, mean in zip(level_weights, means, strict=True)))

    def _mean(self, level: int) -> float:
        losses = self.table.loss[:, level].astype(np.float64)
        known = ~np.isnan(losses) | (self.table.targets[:, level] >= 0)
        return float(losses[known].mean()) if known.any() else 0.0

    def accuracy(self, level: int) -> float:
        """Correct over known, a ratio of integers."""
        known = self.table.targets[:, level] >= 0
        correct = int((self.table.predictions[known, level] == self.table.targets[known, level]).sum())
        return correct / max(1, int(known.sum()))


def evaluate(
    engine: Engine,
    model: nn.Module,
    loader: Iterable[Batch],
    targets: np.ndarray,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_levels: int,
    blank: int | None = None,
) -> Evaluated:
    """Predict this rank's span and join all ranks' predictions. Collective.

    `model` is the module itself, not its DDP wrapper: no collective runs inside, so ranks may have different numbers of
    batches. Where one does (ZeRO-3), `blank` is the side of the empty picture with which a rank goes along that has no
    more batches. targets int32 [num_nodes, L] turns a packed label into class indices.
    """
    parts = [_empty(num_levels)]
    damages: list[str] = []
    to_input = ToModelInput(mean, std).to(engine.device)
    with evaluating(model, collective=blank is not None), engine.autocast():
        for batch in loader if blank is None else engine.in_step(loader):
            if batch is None:
                model(torch.zeros(1, 3, blank or 0, blank or 0, device=engine.device))
                continue
            damages += [str(damage) for damage in batch.damages]
            images = to_input(batch.images.to(engine.device, non_blocking=True))
            logits = [level.float().cpu().numpy() for level in model(images)]
            table = from_logits(batch.rows, targets[batch.labels.numpy()], logits)
            parts.append(table.take(batch.valid))
    return Evaluated(_join(engine, parts), [text for texts in engine.gather_json(damages) for text in texts])


def _join(engine: Engine, parts: list[PredictionTable]) -> PredictionTable:
    """One table of all ranks. The first part is empty and gives the types; narrower top-k lists are padded like it."""
    width = max(part.topk_ids.shape[1] for part in parts[1:]) if len(parts) > 1 else 0
    width = int(engine.gather(np.array([width], dtype=np.int64)).max())
    mine = merge([_with_width(part, width) for part in parts])
    arrays = {name: engine.gather(getattr(mine, name)) for name in PredictionTable.__dataclass_fields__}
    return merge([PredictionTable(**arrays)])


def _with_width(part: PredictionTable, width: int) -> PredictionTable:
    if part.topk_ids.shape[1] == width:
        return part
    empty = np.zeros((0, width))
    return PredictionTable(part.rows, part.targets, part.predictions, empty, empty, part.margin, part.loss)


def _empty(num_levels: int) -> PredictionTable:
    none = np.zeros((0, num_levels))
    return PredictionTable(np.zeros(0), none, none, none, none, none, none)
