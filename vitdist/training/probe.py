"""Starting the head from a linear probe on the frozen backbone.

A random head sends noise through a pretrained backbone in the first steps and distorts its features; one that already
separates the classes does not (Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from vitdist.data.pixels.mixing import ToModelInput
from vitdist.data.pixels.transforms import Preprocessing
from vitdist.models.classifier import Classifier
from vitdist.recipe.schema import Recipe
from vitdist.runtime.agree import on_main
from vitdist.runtime.engine import Engine, evaluating
from vitdist.training.assemble import evaluation_batches
from vitdist.training.datasets import Datasets

log = logging.getLogger(__name__)

INVERSE_PENALTY = 0.1  # of the logistic regression on standardised features


def start_from_probe(
    engine: Engine,
    recipe: Recipe,
    model: Classifier,
    datasets: Datasets,
    preprocessing: Preprocessing,
    *,
    num_workers: int,
) -> None:
    """Fit each level's classifier on the features it sees of the training view. Collective.

    Every rank extracts its share of the features; rank 0 fits, and its head goes to all.
    """
    features, targets = _features(engine, recipe, model, datasets, preprocessing, num_workers)

    def fit() -> list[float]:
        return [_fit(model, level, features[:, level], targets[:, level]) for level in range(datasets.tree.num_levels)]

    shares = on_main(engine, fit)
    # an average is taken of the head before the ranks are joined
    model.head.load_state_dict(engine.tensors_from_main(model.head.state_dict()))
    said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(datasets.tree.levels, shares, strict=True))
    log.info("head starts from a linear probe on %d samples; it fits %s of them", len(targets), said)


def _features(
    engine: Engine,
    recipe: Recipe,
    model: Classifier,
    datasets: Datasets,
    preprocessing: Preprocessing,
    num_workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [N, L, D] what each level's classifier sees, int32 [N, L] targets), over all ranks. Collective."""
    loader = evaluation_batches(
        datasets.train,
        preprocessing,
        recipe.evaluation.batch_size,
        rank=engine.rank,
        world=engine.world,
        pin_memory=engine.device.type == "cuda",
        num_workers=num_workers,
    )
    num_levels = datasets.tree.num_levels
    features = [np.zeros((0, num_levels, model.backbone.width), dtype=np.float32)]
    targets = [np.zeros((0, num_levels), dtype=np.int32)]
    to_input = ToModelInput(preprocessing.mean, preprocessing.std).to(engine.device)
    with evaluating(model):
        for batch in loader:
            images = to_input(batch.images.to(engine.device))
            levels = model.head.features(model.backbone(images))
            features.append(torch.stack([level.float() for level in levels], dim=1).cpu().numpy()[batch.valid])
            targets.append(datasets.targets[batch.labels.numpy()][batch.valid])
    return engine.gather(np.concatenate(features)), engine.gather(np.concatenate(targets))


def _fit(model: Classifier, level: int, features: np.ndarray, targets: np.ndarray) -> float:
    """Put a logistic regression's solution into one classifier; returns the share of training samples it gets right."""
    from sklearn.linear_model import LogisticRegression  # most of a second to import, and most runs need no probe
    from sklearn.preprocessing import StandardScaler

    known = targets >= 0
    classes = np.unique(targets[known])
    if len(classes) < 2:
        return 1.0
    scaler = StandardScaler().fit(features[known])
    fitted = LogisticRegression(C=INVERSE_PENALTY, max_iter=500).fit(scaler.transform(features[known]), targets[known])
    weights, bias = _as_softmax(fitted)
    weights = weights / scaler.scale_  # undo the standardisation: W (x - m) / s + b
    bias = bias - weights @ scaler.mean_
    classifier = model.head.classifiers[level]
    assert isinstance(classifier, nn.Linear)
    with torch.no_grad():
        # classes that no sample shows stay impossible at the start, as far below as the least likely seen one
        classifier.weight.zero_()
        classifier.bias.fill_(float(bias.min()) - 5.0)
        classifier.weight[classes] = torch.from_numpy(weights).to(classifier.weight)
        classifier.bias[classes] = torch.from_numpy(bias).to(classifier.bias)
    return float(fitted.score(scaler.transform(features[known]), targets[known]))


def _as_softmax(fitted: Any) -> tuple[np.ndarray, np.ndarray]:
    """(weights [C, D], bias [C]); two classes are fitted as one row, split here between them."""
    weights, bias = fitted.coef_, fitted.intercept_
    if len(weights) == 1:
        weights, bias = np.concatenate((-weights, weights)) / 2, np.concatenate((-bias, bias)) / 2
    return weights, bias
