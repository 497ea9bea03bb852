"""From the recipe's words to objects: the model, its preprocessing, the optimizer, the schedule, the loaders."""

from __future__ import annotations

import os

import numpy as np
import timm
import torch

from vitdist.data.index import Split
from vitdist.data.loading.batch import Batch
from vitdist.data.loading.load import Load, Unseeded
from vitdist.data.loading.loader import Mix, batches
from vitdist.data.loading.places import EvaluationSource, TrainSource
from vitdist.data.pixels.mixing import Mixing
from vitdist.data.pixels.transforms import Augment, EvalTransform, Preprocessing, TrainTransform
from vitdist.data.plan import TrainPlan, evaluation_span, make_plan
from vitdist.errors import RecipeError
from vitdist.models.backbone import ViTShape, build_backbone, freeze
from vitdist.models.classifier import Classifier
from vitdist.models.heads import build_head
from vitdist.models.weights import load_weights
from vitdist.optim import build_optimizer, param_groups
from vitdist.recipe.batch import BatchSplit
from vitdist.recipe.learning_rate import peak_lr
from vitdist.recipe.rules import monitored_levels
from vitdist.recipe.schema import Recipe
from vitdist.runtime.stop import ignore_signals
from vitdist.schedules import Schedule, build_schedule
from vitdist.taxonomy import Taxonomy
from vitdist.training.datasets import Datasets, Selection

MAX_WORKERS = 8


def build_model(recipe: Recipe, taxonomy: Taxonomy, *, weights: str | None = None) -> Classifier:
    """The untrained or warm-started model of a recipe over the levels of a tree; `weights` overrides the recipe's."""
    wish = recipe.model
    backbone = build_backbone(
        wish.backbone,
        image_size=image_size(recipe),
        drop_path=wish.drop_path,
        grad_checkpointing=recipe.train.grad_checkpointing,
        vit=vit_shape(recipe) if wish.backbone == "vit" else None,
    )
    head = build_head(
        wish.head,
        backbone.width,
        taxonomy,
        token_width=backbone.token_width,
        direction=wish.head_direction,
        dropout=wish.head_dropout,
        self_attention_blocks=wish.self_attention_blocks,
    )
    model = Classifier(backbone, head)
    source = wish.weights if weights is None else weights
    if source != "none":
        model.backbone.record = load_weights(model, source, taxonomy)
    freeze(backbone, wish.freeze)
    return model.with_channels_last() if recipe.train.channels_last else model


def vit_shape(recipe: Recipe) -> ViTShape:
    """The shape of `backbone: vit`; the recipe has filled in its defaults."""
    wish = recipe.model
    assert None not in (wish.patch_size, wish.embed_dim, wish.depth, wish.num_heads, wish.mlp_ratio)
    return ViTShape(wish.patch_size, wish.embed_dim, wish.depth, wish.num_heads, wish.mlp_ratio)  # type: ignore[arg-type]


def image_size(recipe: Recipe) -> int:
    """The recipe's, else the backbone's own."""
    if recipe.data.image_size is not None:
        return recipe.data.image_size
    name = recipe.model.backbone
    config = None if ":" in name else timm.get_pretrained_cfg(name, allow_unregistered=True)
    return int(config.input_size[-1]) if config is not None else 224


def preprocessing_of(recipe: Recipe, model: Classifier) -> Preprocessing:
    """What the backbone's own data config asks for, at the run's image size."""
    config = model.backbone.data_config
    return Preprocessing(
        image_size=image_size(recipe),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        crop_pct=float(config["crop_pct"]),
    )


def build_optimizer_of(recipe: Recipe, model: Classifier) -> torch.optim.Optimizer:
    """The optimizer over timm's decay groups; each group's `lr_scale` multiplies the schedule's rate."""
    wish = recipe.optimizer
    lr = peak_lr(recipe)
    groups = param_groups(
        model,
        lr=lr,
        head_lr_scale=wish.head_lr_scale,
        weight_decay=wish.weight_decay,
        layer_decay=wish.layer_decay,
    )
    return build_optimizer(wish.name, groups, lr=lr, betas=wish.betas, momentum=wish.momentum)


def build_schedule_of(recipe: Recipe, steps_per_epoch: int, max_steps: int) -> Schedule:
    """The learning-rate rule, its durations in steps."""
    wish = recipe.lr_scheduler
    return build_schedule(
        wish.name,
        peak_lr(recipe),
        warmup=wish.warmup.steps(steps_per_epoch),
        total_steps=max_steps,
        mode=direction_of(wish.monitor),
        factor=wish.factor,
        patience=wish.patience,
        threshold=wish.threshold,
        cooldown=wish.cooldown,
        min_lr=wish.min_lr,
    )


def direction_of(monitor: str) -> str:
    """Whether lower ('min') or higher ('max') is better."""
    return "min" if monitor == "val/loss" else "max"


def check_monitors(recipe: Recipe, tree: Taxonomy) -> None:
    """RecipeError before the first step, where the first evaluation would find no accuracy of a monitored level."""
    wrong = {key: level for key, level in monitored_levels(recipe).items() if level not in tree.levels}
    if wrong:
        known = ", ".join(tree.levels)
        raise RecipeError(
            [f"{key}: the class tree has no level {level!r}; use one of {known}" for key, level in wrong.items()]
        )


def build_plan(recipe: Recipe, datasets: Datasets) -> TrainPlan:
    labels = datasets.train_labels() if recipe.data.sampling != "uniform" else np.empty(0, np.int32)
    return make_plan(
        datasets.train.view,
        labels,
        sampling=recipe.data.sampling,
        global_batch_size=recipe.train.global_batch_size,
        seed=recipe.seed,
    )


def augment_of(recipe: Recipe) -> Augment:
    """What is drawn anew for each photograph in training."""
    wish = recipe.augment
    return Augment(
        crop_scale=wish.crop_scale,
        flip=wish.flip,
        rotation=wish.rotation,
        color_jitter=wish.color_jitter,
        auto=wish.auto,
        erasing=wish.erasing,
    )


def train_batches(
    recipe: Recipe,
    split: Split,
    plan: TrainPlan,
    preprocessing: Preprocessing,
    batch: BatchSplit,
    *,
    rank: int,
    world: int,
    start: int,
    pin_memory: bool,
    num_workers: int,
) -> torch.utils.data.DataLoader[Batch]:
    """Micro-batches of one rank from a position on, without end."""
    wish = recipe.augment
    load = Load(
        split,
        TrainTransform(preprocessing, augment_of(recipe)),
        replacement=plan.replacement if recipe.data.on_bad_sample == "skip" else None,
        with_keys=recipe.tracking.log_samples,
    )
    mix = Mix(
        Mixing(wish.mixup, wish.cutmix),
        seed=recipe.seed,
        steps_per_epoch=plan.steps_per_epoch,
        global_batch_size=plan.global_batch_size,
        image_size=preprocessing.image_size,
    )
    source = TrainSource(
        plan, rank=rank, world=world, micro_batch_size=batch.micro_batch_size, start=start, split=split
    )
    return batches(
        source,
        load,
        preprocessing.image_size,
        batch.micro_batch_size,
        mix=mix,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_start=ignore_signals,
    )


def evaluation_batches(
    selection: Selection,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    rank: int,
    world: int,
    pin_memory: bool,
    num_workers: int,
) -> torch.utils.data.DataLoader[Batch]:
    """Every sample of this rank's span, once."""
    span = evaluation_span(selection.num_samples, rank, world)
    return batches(
        EvaluationSource(selection.view, span, batch_size, split=selection.split),
        Load(selection.split, Unseeded(EvalTransform(preprocessing))),
        preprocessing.image_size,
        batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_start=ignore_signals,
    )


def num_workers_of(recipe: Recipe, local_world: int, *, debug: bool = False) -> int:
    """Loader processes a rank: the recipe's, else what the cores this process may use leave to each rank."""
    if debug:
        return 0
    if recipe.data.num_workers is not None:
        return recipe.data.num_workers
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MAX_WORKERS, cores // local_world - (0 if torch.cuda.is_available() else 1)))


def level_weights_of(recipe: Recipe, taxonomy: Taxonomy) -> list[float]:
    """One weight a level; UsageError of the tree when the recipe names a level that is not learned."""
    wish = recipe.loss.level_weights or {}
    taxonomy.select(list(wish)) if wish else None
    return [float(wish.get(level, 1.0)) for level in taxonomy.levels]
