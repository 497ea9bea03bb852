"""All that must survive a stop, in one dataclass; with the tensors of model, optimizer and EMA it is a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vitdist.errors import CheckpointError

FORMAT = 1
_NUMBER = (int, float)
_MAX_THREADS = 1024
_MAX_WORLD = 10**6


@dataclass
class TrainState:
    """The plain part of a training's state. Epoch and position in the data follow from `step` alone."""

    step: int = 0  # global batches done, skipped ones included
    evaluated_step: int = 0  # the last evaluation was made here
    schedule: dict[str, Any] = field(default_factory=dict)
    best_value: float | None = None  # of checkpoint.monitor
    best_step: int | None = None
    values: dict[str, float] = field(default_factory=dict)  # checkpoint.monitor by step, for retention
    stopping_value: float | None = None  # of early_stopping.monitor
    stopping_count: int = 0  # evaluations without improvement
    num_nonfinite: int = 0  # updates skipped because of a number that was none
    num_nonfinite_in_row: int = 0
    # [from, to]: the steps after `from` up to `to` were undone
    rollbacks: list[list[int]] = field(default_factory=list)
    damaged: dict[str, int] = field(default_factory=dict)  # samples replaced, by kind and shard
    num_threads: int = 1  # changes bits, so it is kept
    damaged_in_epoch: int = 0  # of all ranks, in the epoch of `step`: what data.max_bad_samples is held against
    world: int = 1
    micro_batch_size: int | None = None  # what `auto` found
    tracking_id: str = ""
    inexact: bool = False  # resumed once without all of its state, or its micro-batch was halved

    @property
    def num_damaged(self) -> int:
        return sum(self.damaged.values())

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> TrainState:
        """Read and check what `to_json` wrote; CheckpointError when it is something else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError(f"state.json is not of format {FORMAT}")
        # earlier versions did not keep the first three
        values = {"damaged_in_epoch": 0, "micro_batch_size": None, "rollbacks": [], **data}
        del values["format"]
        expected = {f.name for f in fields(TrainState)}
        if set(values) != expected:
            raise CheckpointError(f"state.json has not the fields it should: {sorted(set(values) ^ expected)}")
        state = TrainState(**values)
        blank = TrainState()
        for name in expected:
            value, like = values[name], getattr(blank, name)
            fits = value is None or isinstance(value, _NUMBER) if like is None else type(value) is type(like)
            if not fits:
                raise CheckpointError(f"state.json: {name} is {str(value)[:40]!r}, which it cannot be")
        state._check()
        return state

    def _check(self) -> None:
        """CheckpointError for values that no training has, and that would do harm further on."""
        if not 0 <= self.step < 10**12:
            raise CheckpointError(f"state.json: step is {self.step}")
        if not 1 <= self.num_threads <= _MAX_THREADS or not 1 <= self.world <= _MAX_WORLD:
            raise CheckpointError(f"state.json: {self.num_threads} threads on {self.world} ranks")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= 2**20:
            raise CheckpointError(f"state.json: micro_batch_size is {self.micro_batch_size}")
        steps_fit = all(key.isascii() and key.isdigit() and len(key) <= 12 for key in self.values)
        if not steps_fit or not all(isinstance(value, _NUMBER) for value in self.values.values()):
            raise CheckpointError("state.json: values are not numbers by step")
        if not all(
            isinstance(pair, list) and len(pair) == 2 and all(type(step) is int for step in pair)
            for pair in self.rollbacks
        ):
            raise CheckpointError("state.json: rollbacks are not pairs of steps")
        counts = (self.damaged_in_epoch, *self.damaged.values())
        if not all(type(count) is int and count >= 0 for count in counts):
            raise CheckpointError("state.json: damaged samples are not counted in whole numbers")
