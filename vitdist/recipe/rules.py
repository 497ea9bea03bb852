"""Contradictions between keys, each with what to do about it.

Only what the recipe alone can tell: world size, the tree and the backbone's shape are checked where they are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

from vitdist.recipe.durations import Duration
from vitdist.recipe.learning_rate import peak_lr
from vitdist.recipe.schema import Recipe

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".npz", ".tar")
SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss")  # as vitdist.data.storage.connections has them
VIT_KEYS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


@dataclass(frozen=True)
class Conflict:
    """Keys that do not go together; reported under the first, at the first that was given."""

    keys: tuple[str, ...]
    text: str


Rule = Callable[[Recipe], Iterator[Conflict]]


def refit_chooses_nothing(recipe: Recipe) -> Iterator[Conflict]:
    """Refit trains on all of train: no held-back photographs are left that could decide anything (promise P11)."""
    if recipe.evaluation.protocol != "refit":
        return
    why = "protocol refit trains on all of train and holds nothing back to decide by"
    if recipe.lr_scheduler.name == "plateau":
        yield Conflict(("lr_scheduler.name", "evaluation.protocol"), f"plateau, but {why}; use cosine or constant")
    if recipe.early_stopping.patience is not None:
        yield Conflict(("early_stopping.patience", "evaluation.protocol"), f"is set, but {why}; use null")
    if recipe.checkpoint.monitor is not None:
        text = f"{recipe.checkpoint.monitor}, but {why}; use null"
        yield Conflict(("checkpoint.monitor", "evaluation.protocol"), text)


def scratch_vit(recipe: Recipe) -> Iterator[Conflict]:
    """The five keys of `backbone: vit`, and only for it."""
    model = recipe.model
    if model.backbone != "vit":
        for name in VIT_KEYS:
            if getattr(model, name) is not None:
                text = f"only for `backbone: vit`, and the backbone is {model.backbone}; remove it"
                yield Conflict((f"model.{name}", "model.backbone"), text)
        return
    if model.weights == "pretrained":
        keys = ("model.weights", "model.backbone")
        yield Conflict(keys, "pretrained, but nobody published weights for `backbone: vit`; use none or a path")
    size, patch = recipe.data.image_size, model.patch_size
    if size and patch and size % patch:
        near = sorted({max(patch, size // patch * patch), -(-size // patch) * patch})
        text = f"{size} is no multiple of model.patch_size {patch}; nearest: {' or '.join(map(str, near))}"
        yield Conflict(("data.image_size", "model.patch_size", "model.backbone"), text)
    if model.embed_dim and model.num_heads and model.embed_dim % model.num_heads:
        text = f"{model.embed_dim} does not divide by model.num_heads {model.num_heads}; 64 a head is usual"
        yield Conflict(("model.embed_dim", "model.num_heads"), text)


def weights_named_fully(recipe: Recipe) -> Iterator[Conflict]:
    """A bare timm name is whatever timm's default tag is this year; and pickles run code when they are read."""
    backbone, weights = recipe.model.backbone, recipe.model.weights
    if weights == "pretrained" and backbone != "vit" and ":" not in backbone and "." not in backbone:
        text = (
            f"{backbone} does not say which weights; write name.tag, such as vit_base_patch16_224.orig_in21k, "
            "or weights: none"
        )
        yield Conflict(("model.backbone", "model.weights"), text)
    if PurePath(weights).suffix.lower() in PICKLES:
        text = f"{PurePath(weights).name} can run code when it is read; convert it to .safetensors first"
        yield Conflict(("model.weights",), text)
    if weights.lower() in ("none", "pretrained", "null", "") and weights not in ("none", "pretrained"):
        yield Conflict(("model.weights",), f"'{weights}' is none; allowed: pretrained, none or a path")


def random_features(recipe: Recipe) -> Iterator[Conflict]:
    """What needs a backbone that already sees something."""
    if recipe.model.weights != "none":
        return
    if recipe.model.head_init == "probe":
        text = "probe needs a trained backbone, and model.weights is none; use random"
        yield Conflict(("model.head_init", "model.weights"), text)
    if recipe.model.freeze != "none":
        text = f"{recipe.model.freeze} would keep random weights, since model.weights is none; use none"
        yield Conflict(("model.freeze", "model.weights"), text)


def head(recipe: Recipe) -> Iterator[Conflict]:
    """Keys of one head given to another."""
    model = recipe.model
    if model.head == "linear" and model.self_attention_blocks:
        text = f"{model.self_attention_blocks}, but a linear head has none; use 0, or head: attention"
        yield Conflict(("model.self_attention_blocks", "model.head"), text)
    if model.freeze == "backbone" and recipe.optimizer.layer_decay < 1:
        text = f"{recipe.optimizer.layer_decay} scales blocks that model.freeze keeps still; use 1 or remove it"
        yield Conflict(("optimizer.layer_decay", "model.freeze"), text)


def levels(recipe: Recipe) -> Iterator[Conflict]:
    """Levels named in one place and left out in another."""
    chosen, weights = recipe.model.levels, recipe.loss.level_weights
    for level in weights or {}:
        if chosen is not None and level not in chosen:
            text = f"is not in model.levels ({', '.join(chosen)}); remove it or add the level"
            yield Conflict((f"loss.level_weights.{level}", "loss.level_weights", "model.levels"), text)
    named = set(chosen or ()) & set(weights or ()) == set(chosen or ())
    if weights and chosen and named and not any(weights[level] for level in chosen):
        yield Conflict(("loss.level_weights",), "all weights are 0, so nothing is learned; give one level a weight")
    for key, level in monitored_levels(recipe).items():
        if chosen is not None and level not in chosen:
            text = (
                f"val/accuracy/{level} is of a level that is not in model.levels ({', '.join(chosen)}); use one of them"
            )
            yield Conflict((key, "model.levels"), text)


def monitored_levels(recipe: Recipe) -> dict[str, str]:
    """Key -> the level whose accuracy it watches by name; not those that watch the loss or the finest level."""
    monitors = {
        "checkpoint.monitor": recipe.checkpoint.monitor or "",
        "early_stopping.monitor": recipe.early_stopping.monitor,
        "lr_scheduler.monitor": recipe.lr_scheduler.monitor,
    }
    prefix = "val/accuracy/"
    return {key: text.removeprefix(prefix) for key, text in monitors.items() if text.startswith(prefix)}


def batches(recipe: Recipe) -> Iterator[Conflict]:
    """Batch arithmetic that no world size can rescue; mixing pairs neighbouring slots, so it wants even batches."""
    size, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    keys = ("train.micro_batch_size", "train.global_batch_size")
    if isinstance(micro, int) and size % micro:
        near = [n for n in (size // micro * micro, -(-size // micro) * micro) if n]
        text = f"{micro} does not divide train.global_batch_size {size}; nearest batch: {' or '.join(map(str, near))}"
        yield Conflict(keys, text)
    if micro == "auto" and recipe.parallel.strategy != "ddp":
        text = (
            f"auto tries on one device, and parallel.strategy {recipe.parallel.strategy} shares a step among several; "
        )
        yield Conflict((keys[0], "parallel.strategy"), text + "use a number, or null for the whole share of a rank")
    mixing = next((key for key in ("mixup", "cutmix") if getattr(recipe.augment, key)), None)
    if mixing and size % 2:
        text = f"{size} is odd, and augment.{mixing} mixes pairs; use {size + 1} or {mixing}: 0"
        yield Conflict(("train.global_batch_size", f"augment.{mixing}"), text)
    elif mixing and isinstance(micro, int) and micro % 2:
        text = f"{micro} is odd, and augment.{mixing} mixes pairs; use an even one or {mixing}: 0"
        yield Conflict(("train.micro_batch_size", f"augment.{mixing}"), text)


def classes_balanced_once(recipe: Recipe) -> Iterator[Conflict]:
    """Drawing rare classes more often and weighing them up corrects the same thing twice."""
    if recipe.loss.class_weights != "none" and recipe.data.sampling != "uniform":
        text = (
            f"{recipe.loss.class_weights} corrects class sizes a second time beside data.sampling "
            f"{recipe.data.sampling}; use none"
        )
        yield Conflict(("loss.class_weights", "data.sampling"), text)


def schedule(recipe: Recipe) -> Iterator[Conflict]:
    """Learning rates and lengths that leave no training in between."""
    rule, lr = recipe.lr_scheduler, peak_lr(recipe)
    if rule.name != "constant" and rule.min_lr > lr:
        scaled = " as scaled" if recipe.optimizer.lr_scaling != "none" else ""
        text = f"{rule.min_lr:g} is above optimizer.lr {lr:g}{scaled}; use a smaller one"
        yield Conflict(("lr_scheduler.min_lr", "optimizer.lr"), text)
    length = recipe.train.max_duration
    if _longer(rule.warmup, length):
        text = f"{rule.warmup} is longer than train.max_duration {length}; use a shorter one"
        yield Conflict(("lr_scheduler.warmup", "train.max_duration"), text)
    patience = recipe.early_stopping.patience
    if rule.name == "plateau" and patience is not None and patience <= rule.patience:
        text = (
            f"{patience} stops before lr_scheduler.patience {rule.patience} can cut the learning rate; "
            f"use {rule.patience + 1} or more"
        )
        yield Conflict(("early_stopping.patience", "lr_scheduler.patience"), text)


def scaled_rate(recipe: Recipe) -> Iterator[Conflict]:
    """A rate for a reference batch needs both: the batch, and the rule by which it follows."""
    wish = recipe.optimizer
    keys = ("optimizer.lr_scaling", "optimizer.lr_batch_size")
    if wish.lr_scaling != "none" and wish.lr_batch_size is None:
        text = f"{wish.lr_scaling}, but from which batch? set optimizer.lr_batch_size to the one lr was found for"
        yield Conflict(keys, text)
    if wish.lr_scaling == "none" and wish.lr_batch_size is not None:
        text = f"{wish.lr_batch_size}, but optimizer.lr_scaling is none; use linear (sgd) or sqrt (adam), or null here"
        yield Conflict(keys[::-1], text)


def _longer(part: Duration, whole: Duration) -> bool:
    return part.unit == whole.unit and part.value > whole.value


def remote_data(recipe: Recipe) -> Iterator[Conflict]:
    """A set at an address needs a reader for its scheme, and a folder that its shards are copied to."""
    data = recipe.data
    if data.path.startswith("pipe:"):
        yield Conflict(("data.path",), "nothing runs commands for data; use a folder, or an address")
        return
    scheme, separator, _ = data.path.partition("://")
    if separator and scheme.isalnum():
        if scheme not in SCHEMES:
            text = f"nothing reads {scheme}:// addresses; use a folder, or one of {', '.join(SCHEMES)}"
            yield Conflict(("data.path",), text)
        elif data.cache_dir is None:
            text = "is an address; set data.cache_dir to a folder on each node's own disk"
            yield Conflict(("data.path", "data.cache_dir"), text)
    if data.cache_size is not None and data.cache_dir is None:
        yield Conflict(("data.cache_size", "data.cache_dir"), f"{data.cache_size}, but data.cache_dir is null")


def folds(recipe: Recipe) -> Iterator[Conflict]:
    """A fold beyond the last."""
    val = recipe.data.val
    num_folds = round(1 / val.fraction)
    if val.fold >= num_folds:
        text = f"{val.fold} is beyond the last: data.val.fraction {val.fraction:g} makes folds 0 to {num_folds - 1}"
        yield Conflict(("data.val.fold", "data.val.fraction"), text)


def strategy(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go with the way the ranks share."""
    if recipe.parallel.offload == "cpu" and recipe.parallel.strategy == "ddp":
        keys = ("parallel.offload", "parallel.strategy")
        yield Conflict(keys, "cpu, but ddp keeps optimizer state on the device; use none, or strategy: zero1")
    if recipe.train.compile and recipe.parallel.strategy == "zero3":
        keys = ("train.compile", "parallel.strategy")
        yield Conflict(keys, "true, but the weights that zero3 divides are not there to compile; use false, or zero2")


RULES: tuple[Rule, ...] = (
    refit_chooses_nothing, scratch_vit, weights_named_fully, random_features, head, levels, batches,
    classes_balanced_once, schedule, scaled_rate, remote_data, folds, strategy,
)  # fmt: skip


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Every contradiction in a recipe whose single values are all allowed."""
    for rule in RULES:
        yield from rule(recipe)
