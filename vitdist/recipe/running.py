"""Sections on how a run goes: length and batch, stopping, evaluation, processes, checkpoints, tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vitdist.recipe.durations import Duration, DurationOf
from vitdist.recipe.fields import ALONE_OR_LISTED, DISTINCT, Section, key
from vitdist.recipe.learning import MONITOR, MONITORS, Steps

Clock = Annotated[Duration, DurationOf(("s", "min", "h"))]
Span = Annotated[Duration, DurationOf(("ep", "steps", "s", "min", "h"))]


class Train(Section):
    """Length, batch and arithmetic of the training."""

    max_duration: Steps = key("the whole training", Duration(30, "ep"))
    max_time: Clock | None = key("stop, resumable, after this time of one start; null is off", None)
    global_batch_size: int = key(
        "samples an update, over all ranks: world x micro_batch_size x accumulation", 64, unit="samples", ge=1, le=2**20
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=2**20)] | Literal["auto"] | None = key(
        "samples a rank holds at once; null: its whole share; auto: the fastest that fits; changes only rounding",
        None, unit="samples",
    )  # fmt: skip
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "number format of forward and backward; weights, gradients and moments are fp32, fp16 scales its loss", "fp32"
    )
    tf32: bool = key(
        "fp32 products with 10 bits of mantissa on GPUs that can (Ampere, 2020, and later): faster, less exact", False
    )
    deterministic: bool = key("only operations that repeat bit for bit on one kind of device; slower", False)
    compile: bool = key("compile the model; pays off on long runs", False)
    channels_last: bool = key("channels innermost in memory, which convolutions mostly like and ViTs ignore", False)
    grad_checkpointing: bool = key("recompute blocks in backward: less memory, a third more time", False)
    max_nonfinite_steps: int = key("steps in a row whose loss may be no number before the run stops", 5, ge=0, le=1000)
    max_rollbacks: int = key(
        "instead of stopping, go on from the last good checkpoint past the batches since, this often; 0 is off",
        0, ge=0, le=1000,
    )  # fmt: skip


class EarlyStopping(Section):
    """Ending before max_duration when nothing improves."""

    monitor: str = key("what must improve", "val/accuracy", pattern=MONITOR, allowed=MONITORS)
    patience: int | None = key("evaluations without improvement; null is off", None, unit="evaluations", ge=1)
    min_delta: float = key("change that counts as improvement", 0.0, ge=0)


class Evaluation(Section):
    """When and on what the model is measured."""

    every: Steps = key("between evaluations", Duration(1, "ep"))
    batch_size: int = key("samples a rank holds at once", 64, unit="samples", ge=1, le=2**20)
    protocol: Literal["val", "refit", "paper"] = key(
        "val: a view of train chooses; refit: all of train, nothing chooses; paper: test chooses, as the report says",
        "val",
    )


class Parallel(Section):
    """How ranks share the work."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = key(
        "what is divided over the ranks: nothing; optimizer state; gradients too; weights too", "ddp"
    )
    offload: Literal["none", "cpu"] = key("zero only: where optimizer state rests", "none")
    timeout: Clock = key("a rank that others have waited for so long counts as lost", Duration(10, "min"))


class Checkpoint(Section):
    """When state is saved, and what is kept."""

    every: Annotated[tuple[Span, ...], ALONE_OR_LISTED, DISTINCT] = key(
        "between checkpoints; several may be given, each counts", (Duration(1, "ep"), Duration(30, "min")),
        allowed="a duration like 1ep, 500steps or 30min, or a list of them",
    )  # fmt: skip
    keep_last: int = key("newest checkpoints to keep", 2, unit="checkpoints", ge=1, le=10000)
    keep_best: bool = key("keep the best by `monitor` too", True)
    monitor: str | None = key(
        "what makes a checkpoint the best; null: none is (refit)", "val/accuracy",
        pattern=MONITOR, allowed=MONITORS + " or null",
    )  # fmt: skip


class Tracking(Section):
    """Where numbers go besides metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] = key("Weights & Biases", "disabled")
    project: str = key("its project", "vitdist")
    log_samples: bool = key("write samples/rank_00000.jsonl: every sample really used", False)
