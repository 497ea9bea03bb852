"""One global batch: micro-batches forward and backward, one guarded update, and a report that is read a step later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitdist import optim
from vitdist.data.loading.batch import Batch
from vitdist.data.pixels.mixing import ToModelInput
from vitdist.data.storage.shards import Damage
from vitdist.errors import DataError, VitdistError
from vitdist.losses import hierarchical_loss
from vitdist.runtime.engine import PendingSum
from vitdist.runtime.failures import classify
from vitdist.runtime.stop import Reason
from vitdist.training.assemble import level_weights_of
from vitdist.training.device_memory import out_of_memory, stand_in
from vitdist.training.job import Job
from vitdist.training.weighting import Weighting

# places in the report's vector
_LOSS, _WAIT, _DAMAGED, _NORM, _TOTAL, _IN_ROW, _SCALE, _SAVE, _REASONS = range(9)
_RANKS = _REASONS + len(Reason)  # from here on, for each rank:
_FAILURE, _SPOILED, _STARVED, _EACH = range(4)  # its failure's code, whether its loss was no number or it had no memory


@dataclass(frozen=True)
class Report:
    """What all ranks know of a step, the same on each. `failures`: rank -> exit code of those that cannot go on."""

    step: int
    epoch: int
    lr: float
    loss: float
    data_wait: float  # seconds, the mean over ranks
    grad_norm: float
    loss_scale: float  # 0 where nothing is scaled
    num_damaged: int
    num_nonfinite: int
    num_nonfinite_in_row: int
    stop: Reason
    save: bool
    failures: dict[int, int]
    spoiled_by: list[int]  # ranks whose part of the loss was not finite
    starved: list[int]  # ranks that had no memory for it


@dataclass(frozen=True)
class Pending:
    """A step whose report is under way."""

    step: int
    epoch: int
    lr: float
    world: int
    total: PendingSum
    failure: VitdistError | None  # what this rank itself cannot go on for
    damages: list[Damage]  # met by this rank

    def read(self) -> Report:
        values = self.total.read()
        reasons = [reason for reason in Reason if reason and values[_REASONS + reason] > 0]
        each = [values[_RANKS + place :: _EACH] for place in range(_EACH)]
        codes = {rank: int(code) for rank, code in enumerate(each[_FAILURE]) if code > 0}
        return Report(
            step=self.step,
            epoch=self.epoch,
            lr=self.lr,
            loss=values[_LOSS],
            data_wait=values[_WAIT] / self.world,
            grad_norm=values[_NORM],
            loss_scale=values[_SCALE],
            num_damaged=int(values[_DAMAGED]),
            num_nonfinite=int(values[_TOTAL]),
            num_nonfinite_in_row=int(values[_IN_ROW]),
            stop=max(reasons, default=Reason.NONE),
            save=values[_SAVE] > 0,
            failures=codes,
            spoiled_by=[rank for rank, bad in enumerate(each[_SPOILED]) if bad > 0],
            starved=[rank for rank, bad in enumerate(each[_STARVED]) if bad > 0],
        )


@dataclass
class _Share:
    """This rank's part of a step: its part of the loss, seconds waited for data, and why it cannot go on."""

    loss: Tensor
    wait: float = 0.0
    damages: list[Damage] = field(default_factory=list)
    failure: VitdistError | None = None


class Stepper:
    """Runs steps of a job. Nothing in a call waits for the device or for another rank's host."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._to_input = ToModelInput(job.preprocessing.mean, job.preprocessing.std).to(job.engine.device)
        self._targets = torch.from_numpy(job.datasets.targets.astype(np.int64)).to(job.engine.device)
        self._level_weights = level_weights_of(job.recipe, job.datasets.tree)
        self._weighting = Weighting(job.recipe, job.datasets, job.plan, job.preprocessing.image_size, job.engine.device)
        self._starved = False  # this rank had no memory, and only takes part until all ranks know

    def __call__(self, stream: Iterator[Batch], *, save: bool) -> Pending:
        """Train on the next global batch of the stream. Collective. `save`: this rank wishes for a checkpoint."""
        job = self._job
        step = job.state.step
        lr = job.schedule.lr(step)
        optim.set_lr(job.optimizer, lr)
        job.at("step", step + 1)
        share = self._accumulate(stream, step)
        job.at("optimizer", step + 1)
        norm, found_inf = job.joined.update(job.guard)
        if job.ema is not None:
            job.ema.update(job.model, found_inf)
        job.at("report", step + 1)
        if share.failure is None and job.saver is not None and job.saver.failure is not None:
            share.failure = classify(job.saver.failure)
        total = self._report(share, norm, save)
        epoch = step // job.plan.steps_per_epoch
        return Pending(step + 1, epoch, lr, job.engine.world, total, share.failure, share.damages)

    def _accumulate(self, stream: Iterator[Batch], step: int) -> _Share:
        """This rank's micro-batches of a step, forward and backward."""
        job = self._job
        share = _Share(torch.zeros((), device=job.engine.device))
        denominators = self._weighting.denominators(step)
        for micro in range(job.batch.accumulation):
            last = micro == job.batch.accumulation - 1
            if not self._starved:
                batch = self._next(stream, step, share)
                try:
                    self._micro(batch, denominators, share, last=last)
                except RuntimeError as error:
                    if job.recipe.train.micro_batch_size != "auto" or not out_of_memory(error):
                        raise
                    self._starved = True
            if self._starved and last:
                stand_in(job)
        return share

    def _next(self, stream: Iterator[Batch], step: int, share: _Share) -> Batch:
        job = self._job
        started = time.perf_counter()
        job.at("data", step + 1)
        batch = next(stream)
        share.wait += time.perf_counter() - started
        share.damages += batch.damages
        if not batch.valid.all():
            share.failure = share.failure or _damaged(job.engine.rank, step + 1, batch)
        job.journal.samples(batch, step + 1)
        return batch

    def _micro(self, batch: Batch, denominators: list[float], share: _Share, *, last: bool) -> None:
        job = self._job
        step = job.state.step
        with job.joined.accumulate(last=last):
            job.at("forward", step + 1)
            loss = self.loss_of(batch.to(job.engine.device), denominators, job.joined)
            if share.failure is not None or job.faults.asked("nan", "loss", step + 1):
                # a rank that cannot go on spoils the gradient: the update is skipped on every rank, its report says why
                loss = loss * float("nan")
            if last:
                loss = loss + job.joined.penalty(l1=job.recipe.loss.l1, l2=job.recipe.loss.l2 / 2)
            job.at("backward", step + 1)
            job.joined.backward(loss)
        share.loss += loss.detach()

    def loss_of(self, batch: Batch, denominators: list[float], model: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        """A micro-batch's part of the loss; the batch is on the device."""
        images = self._to_input(batch.images, batch.mix)
        lam = None if batch.mix is None else batch.mix.lam
        targets = self._targets[batch.labels]
        return hierarchical_loss(
            model(images),
            targets,
            denominators=denominators,
            lam=lam,
            partner_targets=None if lam is None else _swap_neighbours(targets),
            level_weights=self._level_weights,
            label_smoothing=self._job.recipe.loss.label_smoothing,
            class_weights=self._weighting.class_weights,
        )

    def _report(self, share: _Share, norm: Tensor, save: bool) -> PendingSum:
        engine, guard = self._job.engine, self._job.guard
        mine = _RANKS + _EACH * engine.rank
        host = [0.0] * (_RANKS + _EACH * engine.world)
        host[_WAIT], host[_DAMAGED], host[_SAVE] = share.wait, float(len(share.damages)), float(save)
        host[_REASONS + self._job.stop.poll()] = 1.0
        host[mine + _FAILURE] = 0.0 if share.failure is None else float(share.failure.exit_code)
        host[mine + _STARVED] = float(self._starved)
        vector = torch.tensor(host, dtype=torch.float64, device=engine.device)
        vector[_LOSS] = share.loss
        vector[mine + _SPOILED] = ~torch.isfinite(share.loss)
        if engine.is_main:  # equal on all ranks: one tells
            vector[_NORM], vector[_TOTAL], vector[_IN_ROW] = norm, guard.total, guard.in_row
            if (scale := self._job.joined.scale) is not None:
                vector[_SCALE] = scale.value
        return engine.sum_later(vector)


def _damaged(rank: int, step: int, batch: Batch) -> DataError:
    return DataError(
        f"rank {rank}, step {step}: {batch.damages[0]}; repair it (vitdist data verify), or set data.on_bad_sample=skip"
    )


def _swap_neighbours(targets: Tensor) -> Tensor:
    """Targets of each slot's mixing partner: slots 2i and 2i+1 change places."""
    return targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
