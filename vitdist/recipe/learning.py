"""Sections on what is learned and how: model, loss, optimizer, average of weights, learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vitdist.recipe.durations import Duration, DurationOf
from vitdist.recipe.fields import Betas, Names, Section, Weight, key

MONITOR = r"^val/(loss|accuracy(/[^/]+)?)$"
MONITORS = "val/loss, val/accuracy (the finest level) or val/accuracy/LEVEL"
Steps = Annotated[Duration, DurationOf(("ep", "steps"))]
StepsOrNone = Annotated[Duration, DurationOf(("ep", "steps"), zero=True)]


class Model(Section):
    """The backbone, where its weights come from, and the head on top."""

    backbone: str = key(
        "a timm model by name.tag, hf-hub:OWNER/NAME, local-dir:PATH, or `vit` built from the five keys below",
        "vit_base_patch16_224.orig_in21k",
    )
    weights: str = key(
        "pretrained, none, or a safetensors file, checkpoint or run; a head of another tree is left out",
        "pretrained", path=True, allowed="pretrained, none or a path",
    )  # fmt: skip
    levels: Names | None = key(
        "levels of the class tree to predict; null takes all", None, allowed="a list of level names or null"
    )
    head: Literal["linear", "attention", "hierarchical"] = key(
        "linear on the pooled feature; attention pooling of the tokens; or a learned query a level", "hierarchical"
    )
    head_direction: Literal["fine_to_coarse", "coarse_to_fine", "parallel"] = key(
        "hierarchical only: which levels see the others (fine_to_coarse stops the coarse gradient)", "fine_to_coarse"
    )
    self_attention_blocks: int | None = key(
        "self-attention blocks over the tokens before pooling; null: 1 for attention, else 0",
        None, unit="blocks", ge=0, le=12,
    )  # fmt: skip
    head_init: Literal["random", "probe"] = key("start the head at random, or from a linear probe", "random")
    head_dropout: float = key("dropout in the head", 0.0, ge=0, lt=1)
    drop_path: float = key("stochastic depth at the last block, rising linearly from 0", 0.1, ge=0, lt=1)
    freeze: Literal["none", "backbone"] | Annotated[int, Field(ge=1, le=100)] = key(
        "what stays as loaded: nothing, the whole backbone, or its embedding and first N blocks", "none"
    )
    patch_size: int | None = key("vit only: side of a patch (16)", None, unit="pixels", ge=1, le=256)
    embed_dim: int | None = key("vit only: width of the tokens (384)", None, ge=8, le=8192)
    depth: int | None = key("vit only: number of blocks (12)", None, unit="blocks", ge=1, le=100)
    num_heads: int | None = key("vit only: attention heads a block (6)", None, ge=1, le=128)
    mlp_ratio: float | None = key("vit only: hidden width of the MLP over embed_dim (4)", None, gt=0, le=16)


class Loss(Section):
    """Cross-entropy summed over the levels, and penalties beside it."""

    level_weights: dict[str, Weight] | None = key(
        "weight of each level's loss; null weighs all 1, a level not named has 1", None,
        allowed="numbers >= 0 by level, such as {species: 1, genus: 0.5}, or null",
    )  # fmt: skip
    label_smoothing: float = key("share of the target spread over all classes", 0.1, ge=0, lt=1)
    class_weights: Literal["none", "balanced", "sqrt"] = key(
        "weigh classes in the loss by nothing, by 1/size or by its root", "none"
    )
    l1: float = key("coefficient of the sum of absolute weights in the loss", 0.0, ge=0, le=1)
    l2: float = key("coefficient of the sum of squared weights in the loss, beside weight decay", 0.0, ge=0, le=1)


class Optimizer(Section):
    """How gradients become updates."""

    name: Literal["adamw", "adam", "sgd"] = key("the rule (adam adds weight decay to the gradient)", "adamw")
    lr: float = key("peak learning rate of the backbone's last block", 1e-4, gt=0, le=100)
    lr_scaling: Literal["none", "linear", "sqrt"] = key(
        "how lr, given for lr_batch_size, follows train.global_batch_size", "none"
    )
    lr_batch_size: int | None = key(
        "the global batch that lr was found for; null where lr is not scaled", None, unit="samples", ge=1, le=2**20
    )
    head_lr_scale: float = key("the head's learning rate over lr", 5.0, gt=0, le=1000)
    weight_decay: float = key("decay of weight matrices (not of biases, norms, tokens, positions)", 0.05, ge=0, le=10)
    layer_decay: float = key(
        "learning rate of each block over that of the next one; 1 is off (and the default for vit and when frozen)",
        0.75, gt=0, le=1,
    )  # fmt: skip
    betas: Betas = key(
        "adam, adamw: decay of the averages of gradient and square", (0.9, 0.999),
        allowed="two numbers, each >= 0 and < 1",
    )  # fmt: skip
    momentum: float = key("sgd: momentum", 0.9, ge=0, lt=1)
    clip_grad_norm: float | None = key("largest norm of the whole gradient; null is off", 1.0, gt=0)


class Ema(Section):
    """An average of the weights, evaluated in their place."""

    decay: float | None = key("share of the average kept each step; null is off", None, gt=0, lt=1)
    warmup: bool = key("let decay rise as (1 + t) / (10 + t), so that a short run's average forgets its start", True)


class LrScheduler(Section):
    """How the learning rate changes."""

    name: Literal["plateau", "cosine", "constant"] = key("the rule after the warm-up", "cosine")
    warmup: StepsOrNone = key("linear rise from 0 to lr", Duration(1, "ep"))
    monitor: str = key("plateau: what must improve", "val/loss", pattern=MONITOR, allowed=MONITORS)
    factor: float = key("plateau: the cut when it does not", 0.5, gt=0, lt=1)
    patience: int = key("plateau: evaluations without improvement before a cut", 5, unit="evaluations", ge=0)
    threshold: float = key("plateau: relative change that counts as improvement", 0.01, ge=0, lt=1)
    cooldown: int = key("plateau: evaluations after a cut that are not counted", 0, unit="evaluations", ge=0)
    min_lr: float = key("plateau and cosine: where the learning rate ends", 0.0, ge=0, le=100)
