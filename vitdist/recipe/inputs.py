"""Sections on what goes in: the data and its augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from vitdist.recipe import sizes
from vitdist.recipe.fields import Interval, Section, key, section


class Val(Section):
    """How the validation view is cut out of train: a pure function of these keys, the same for every run."""

    fraction: float = key("share of the training set held back for validation", 0.1, gt=0, le=0.5)
    seed: int = key("draws the split; apart from `seed`, so that several seeds share one split", 0, ge=0, le=2**32 - 1)
    group: bool = key("keep samples of one group (an individual, a burst) on one side, where the set has groups", True)
    fold: int = key("which of the 1/fraction disjoint folds is held back", 0, ge=0)


class Data(Section):
    """Which photographs, and how they are read."""

    path: str = key(
        "folder with index.json, as `vitdist data` wrote it, or its http(s), s3, gs or az address",
        path=True, allowed="a path",
    )  # fmt: skip
    taxonomy: str | None = key(
        "CSV of another class tree (one row a class, coarse to fine); null takes the one packed with the data",
        None, path=True, allowed="a path or null",
    )  # fmt: skip
    image_size: int | None = key(
        "side of the square the model sees; null takes the backbone's own (224 for vit)",
        None, unit="pixels", ge=16, le=2048,
    )  # fmt: skip
    num_workers: int | None = key(
        "loader processes a rank; null takes what the machine's cores allow; changes no number of the run",
        None, unit="processes", ge=0, le=256,
    )  # fmt: skip
    val: Val = section("the validation view", Val)
    sampling: Literal["uniform", "balanced", "sqrt"] = key(
        "uniform: each sample once an epoch; balanced: classes equally often; sqrt: by the root of their size",
        "uniform",
    )
    on_bad_sample: Literal["raise", "skip"] = key("a damaged sample stops the run, or is replaced and counted", "raise")
    max_bad_samples: int = key("with skip: more damaged samples in one epoch stop the run", 100, unit="samples", ge=0)
    cache_dir: str | None = key(
        "folder on each node's own disk for copies of remote shards, shared by its ranks; null reads no remote ones",
        None, path=True, allowed="a path or null",
    )  # fmt: skip
    cache_size: Annotated[str, AfterValidator(sizes.checked)] | None = key(
        "bytes of shards kept in cache_dir, those not read for longest go first; what is read at once must fit: about "
        "100,000 photographs on one node, a part of that on each of several; null keeps all",
        None, allowed=sizes.ALLOWED,
    )  # fmt: skip


class Augment(Section):
    """What is varied in training pictures; all of it drawn from (seed, epoch, sample)."""

    crop_scale: Interval = key(
        "share of the picture's area that a random crop keeps, smallest and largest", (0.3, 1.0),
        allowed="two numbers [smallest, largest], each > 0 and <= 1",
    )  # fmt: skip
    flip: float = key("probability of a horizontal flip", 0.5, ge=0, le=1)
    rotation: float = key("largest random rotation to either side", 0.0, unit="degrees", ge=0, le=180)
    color_jitter: float = key("strength of random brightness, contrast and saturation; 0 is off", 0.0, ge=0, le=1)
    auto: Literal["none", "trivialaugment", "randaugment"] = key("a policy of drawn operations on top", "none")
    mixup: float = key("alpha of the Beta distribution that blends neighbouring pictures; 0 is off", 0.0, ge=0, le=100)
    cutmix: float = key("alpha of the Beta distribution that pastes a box of a neighbour; 0 is off", 0.0, ge=0, le=100)
    erasing: float = key("probability of erasing a random box", 0.0, ge=0, le=1)
