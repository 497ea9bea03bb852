"""Learning-rate rules as plain arithmetic: no optimizer inside, and all state a small JSON object.

`step` is the number of global batches done, so step 0 gives the rate of the first update. Every rule warms up linearly:
over `warmup` steps the rate is (step + 1) / warmup of what the rule says.
"""

from __future__ import annotations

import math
from typing import Any

from vitdist.errors import CheckpointError, UsageError

SCHEDULES = ("plateau", "cosine", "constant")


class Schedule:
    """The constant rule, and what the others share."""

    def __init__(self, lr: float, *, warmup: int = 0) -> None:
        self.base_lr = lr
        self.warmup = warmup

    def factor(self, step: int) -> float:
        """The rate of the update after `step` global batches, as a part of the base rate."""
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return ramp * self.rule(step)

    def lr(self, step: int) -> float:
        """The rate itself."""
        return self.base_lr * self.factor(step)

    def rule(self, step: int) -> float:
        """The factor without warm-up."""
        return 1.0

    def observe(self, metric: float) -> bool:
        """Take an evaluation's metric, already agreed by all ranks; True where it cut the rate."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class Cosine(Schedule):
    """Half a cosine from the base rate after warm-up to `min_lr` at `total_steps` (SGDR, Loshchilov & Hutter 2017)."""

    def __init__(self, lr: float, *, total_steps: int, warmup: int = 0, min_lr: float = 0.0) -> None:
        super().__init__(lr, warmup=warmup)
        self.total_steps = total_steps
        self.min_lr = min_lr

    def rule(self, step: int) -> float:
        done = (step - self.warmup) / max(1, self.total_steps - self.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, done))))
        floor = self.min_lr / self.base_lr
        return floor + (1.0 - floor) * cosine


class Plateau(Schedule):
    """Cut the rate when a metric has stopped improving: torch's ReduceLROnPlateau, evaluation by evaluation.

    `patience` counts evaluations: the rate is multiplied by `factor` at the first one past `patience` in a row without
    a metric better than the best by the part `threshold` of it (by its absolute value where `threshold_mode` is
    'abs'); `cooldown` evaluations after a cut do not count; never below `min_lr`. A NaN is no improvement.
    """

    def __init__(
        self,
        lr: float,
        *,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        warmup: int = 0,
    ) -> None:
        super().__init__(lr, warmup=warmup)
        assert mode in ("min", "max") and threshold_mode in ("rel", "abs")
        self.mode, self.cut, self.patience, self.cooldown, self.min_lr = mode, factor, patience, cooldown, min_lr
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.current_lr = lr
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad = 0
        self.cooldown_left = 0

    def rule(self, step: int) -> float:
        return self.current_lr / self.base_lr

    def observe(self, metric: float) -> bool:
        if self._better(metric):
            self.best, self.num_bad = metric, 0
        else:
            self.num_bad += 1
        if self.cooldown_left > 0:
            self.cooldown_left -= 1
            self.num_bad = 0
        if self.num_bad <= self.patience:
            return False
        self.cooldown_left, self.num_bad = self.cooldown, 0
        return self._reduce()

    def _better(self, metric: float) -> bool:
        sign = 1.0 if self.mode == "max" else -1.0
        if self.threshold_mode == "abs":
            bound = self.best + sign * self.threshold
        else:
            bound = self.best * (1.0 + sign * self.threshold)
        return metric > bound if self.mode == "max" else metric < bound

    def _reduce(self) -> bool:
        lower = max(self.current_lr * self.cut, self.min_lr)
        if self.current_lr - lower <= 1e-8:  # torch's eps: a smaller cut is none
            return False
        self.current_lr = lower
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "lr": self.current_lr,
            "best": self.best if math.isfinite(self.best) else str(self.best),  # JSON has no infinity
            "num_bad": self.num_bad,
            "cooldown_left": self.cooldown_left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self.current_lr = float(state["lr"])
            self.best = float(state["best"])
            self.num_bad, self.cooldown_left = int(state["num_bad"]), int(state["cooldown_left"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"this is no plateau schedule's state: {error}") from None


def build_schedule(
    name: str,
    lr: float,
    *,
    warmup: int = 0,
    total_steps: int | None = None,
    mode: str = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    cooldown: int = 0,
    min_lr: float = 0.0,
) -> Schedule:
    """A rule by its name; each takes from the rest what it needs. Warm-up and total in steps, `min_lr` as a rate."""
    if name == "constant":
        return Schedule(lr, warmup=warmup)
    if name == "cosine":
        if total_steps is None:
            raise UsageError("a cosine needs an end: set train.max_duration in epochs or steps")
        return Cosine(lr, total_steps=total_steps, warmup=warmup, min_lr=min_lr)
    if name == "plateau":
        return Plateau(
            lr, mode=mode, factor=factor, patience=patience, threshold=threshold, cooldown=cooldown, min_lr=min_lr,
            warmup=warmup,
        )  # fmt: skip
    raise UsageError(f"there is no learning-rate rule {name}; choose {', '.join(SCHEDULES)}")
