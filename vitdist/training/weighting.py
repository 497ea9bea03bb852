"""What a step's loss is divided by: known from the plan before any image is read, the same on every rank."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitdist.data.pixels.mixing import Mixing, mix_plan
from vitdist.data.plan import TrainPlan
from vitdist.losses import denominators_of
from vitdist.recipe.schema import Recipe
from vitdist.training.datasets import Datasets

_EXPONENT = {"balanced": 1.0, "sqrt": 0.5}


class Weighting:
    """Class weights of each level, and the denominators of every step's loss."""

    def __init__(
        self, recipe: Recipe, datasets: Datasets, plan: TrainPlan, image_size: int, device: torch.device
    ) -> None:
        self._plan = plan
        self._image_size = image_size  # a cutmix weight depends on its box, which is cut in whole pixels
        self._mixing = Mixing(recipe.augment.mixup, recipe.augment.cutmix)
        self._seed = recipe.seed
        self._labels = datasets.train_labels()
        self._targets = datasets.targets
        train_targets = self._targets[self._labels[datasets.train.view.rows(0, datasets.train.num_samples)]]
        self._on_host = _class_weights(recipe.loss.class_weights, train_targets, datasets.tree.num_classes)
        self.class_weights = None if self._on_host is None else [weights.to(device) for weights in self._on_host]
        # where every sample counts as one at every level, there is nothing to look up
        self._constant = self._on_host is None and not bool((train_targets < 0).any())

    def denominators(self, position: int) -> list[float]:
        """[L]: samples known at each level of the global batch at a position, or the sum of their class weights."""
        size = self._plan.global_batch_size
        if self._constant:
            return [float(size)] * self._targets.shape[1]
        slots = self._plan.slots(position, 0, size)
        targets = torch.from_numpy(self._targets[self._labels[slots.rows]].astype(np.int64))
        lam = partners = None
        if self._mixing.active:
            lam = self._lam(slots.epoch, slots.batch, size)
            partners = targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        sums = denominators_of(targets, lam=lam, partner_targets=partners, class_weights=self._on_host)
        return [float(value) for value in sums]

    def _lam(self, epoch: int, batch: int, size: int) -> Tensor:
        plan = mix_plan(self._seed, epoch, batch, size, self._image_size, self._mixing)
        return torch.from_numpy(plan.lam)


def _class_weights(kind: str, targets: np.ndarray, num_classes: tuple[int, ...]) -> list[Tensor] | None:
    """Per level float32 [C]: 1/size or its root, scaled so that the mean over the training samples is 1."""
    if kind == "none":
        return None
    weights = []
    for level, classes in enumerate(num_classes):
        known = targets[targets[:, level] >= 0, level]
        sizes = np.maximum(np.bincount(known, minlength=classes), 1).astype(np.float64)
        inverse = sizes ** -_EXPONENT[kind]
        weights.append(torch.from_numpy((inverse / inverse[known].mean()).astype(np.float32)))
    return weights
