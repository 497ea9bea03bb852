"""The training loop: one step, then whatever is due, each decided in one place and the same on all ranks."""

from __future__ import annotations

import logging
import time
from enum import Enum

from torch.utils.data import DataLoader

from vitdist.data.loading.batch import Batch
from vitdist.errors import DataError, NonFiniteError
from vitdist.runtime.agree import FailedElsewhere
from vitdist.runtime.stop import Reason
from vitdist.training.agenda import Agenda
from vitdist.training.assemble import train_batches
from vitdist.training.choosing import evaluate_and_choose
from vitdist.training.job import Job
from vitdist.training.nonfinite import NONFINITE, write_down
from vitdist.training.rollback import BlownUp
from vitdist.training.starved import Starved, shrink
from vitdist.training.step import Pending, Report, Stepper

log = logging.getLogger(__name__)


class End(Enum):
    """How the loop ended."""

    DONE = "done"
    EARLY = "early stopping"
    STOPPED = "stopped"


def train(job: Job) -> tuple[End, Reason]:
    """Train from the job's state to its end, or to an agreed stop, which is saved. Collective.

    Where `micro_batch_size: auto` turns out too large on the way, it goes on from that step with half of it.
    """
    while True:
        try:
            return _train(job)
        except Starved as starved:
            report = starved.report
        shrink(job, report)


def _train(job: Job) -> tuple[End, Reason]:
    """Step by step.

    A step's report is read while the next one runs: flags act one step late, and nothing waits for the device.
    """
    state, agenda = job.state, Agenda(job)
    run_step = Stepper(job)
    stream = iter(loader_of(job))
    pending: Pending | None = None
    seconds = 0.0
    over = _catch_up(job, agenda)
    while state.step < job.max_steps and not over:
        started = time.perf_counter()
        current = run_step(stream, save=agenda.save_by_the_clock())
        state.step += 1
        report = settle(job, pending, seconds)
        pending, seconds = current, time.perf_counter() - started
        if not agenda.anything_due(report):
            continue
        last, pending = settle(job, pending, seconds), None  # a boundary: what follows may know all of this step
        stop = max(r.stop for r in (report, last) if r is not None)
        best = False
        if agenda.evaluation_due() and not stop:
            best, over = _evaluate(job)
        if stop or best or over or agenda.save_due(report):
            job.save()
            agenda.saved()
        if stop:
            job.saved()
            return End.STOPPED, stop
    job.saved()
    return (End.EARLY if over else End.DONE), Reason.NONE


def _evaluate(job: Job) -> tuple[bool, bool]:
    """(a new best, time to stop early). Collective."""
    job.at("evaluation")
    return evaluate_and_choose(job)


def _catch_up(job: Job, agenda: Agenda) -> bool:
    """The evaluation that a stop came before: the uninterrupted run would have made it at this step."""
    if not agenda.evaluation_due() or job.state.evaluated_step == job.state.step:
        return False
    best, over = _evaluate(job)
    if best and job.engine.is_main:
        job.point_best()
    return over


def loader_of(job: Job) -> DataLoader[Batch]:
    """This rank's micro-batches from the job's step on."""
    return train_batches(
        job.recipe,
        job.datasets.train.split,
        job.plan,
        job.preprocessing,
        job.batch,
        rank=job.engine.rank,
        world=job.engine.world,
        start=job.state.step,
        pin_memory=job.engine.device.type == "cuda",
        num_workers=job.num_workers,
    )


def settle(job: Job, pending: Pending | None, seconds: float) -> Report | None:
    """Read a step's report, write it down, and stop here, on all ranks alike, when it says that it must be."""
    if pending is None:
        return None
    report = pending.read()
    job.at("log", report.step)
    if report.starved:
        raise Starved(report)
    job.note_damage(pending.damages)
    job.num_nonfinite = report.num_nonfinite, report.num_nonfinite_in_row
    if report.step == job.first_step:
        job.arm()
    job.num_damaged += report.num_damaged
    first_of_epoch = (report.step - 1) % job.plan.steps_per_epoch == 0
    job.state.damaged_in_epoch = report.num_damaged + (0 if first_of_epoch else job.state.damaged_in_epoch)
    job.journal.step(
        {
            "step": report.step,
            "epoch": report.epoch,
            "train/loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "data_wait": report.data_wait,
            "images_per_second": job.plan.global_batch_size / max(seconds, 1e-9),
            **({"loss_scale": report.loss_scale} if report.loss_scale else {}),
            **({"damaged": job.num_damaged} if job.num_damaged else {}),
            **({"inexact": True} if job.state.inexact else {}),
        }
    )
    _raise_failures(job, pending, report)
    if report.num_nonfinite_in_row > 0:
        _skipped(job, report)
    return report


def _skipped(job: Job, report: Report) -> None:
    """A step whose gradient was no number: written down, and past the limit the end, on all ranks alike."""
    ranks = ", ".join(map(str, report.spoiled_by)) or "none alone"
    log.warning("step %d: the gradient is not finite (from rank %s); its update is skipped", report.step, ranks)
    if job.engine.is_main:
        write_down(job, report.step, report.spoiled_by)
    if report.num_nonfinite_in_row <= job.recipe.train.max_nonfinite_steps:
        return
    num_rollbacks, allowed = len(job.state.rollbacks), job.recipe.train.max_rollbacks
    text = (
        f"{report.num_nonfinite_in_row} steps in a row up to step {report.step} had gradients that are not finite "
        f"(from rank {ranks}, after {num_rollbacks} of {allowed} rollbacks); {job.run_dir / NONFINITE} lists their "
        "samples; look at them, lower optimizer.lr, or raise train.max_rollbacks"
    )
    raise BlownUp(text, report) if num_rollbacks < allowed else NonFiniteError(text)


def _raise_failures(job: Job, pending: Pending, report: Report) -> None:
    """The first rank that cannot go on speaks; the others end with its code."""
    if report.failures:
        rank = min(report.failures)
        if rank == job.engine.rank and pending.failure is not None:
            raise pending.failure
        raise FailedElsewhere(report.failures[rank], rank, "could not go on")
    if job.state.damaged_in_epoch > job.recipe.data.max_bad_samples:
        raise DataError(
            f"{job.state.damaged_in_epoch} damaged samples by step {report.step} are more in one epoch than "
            f"data.max_bad_samples {job.recipe.data.max_bad_samples}; see train.log for which, and vitdist data verify"
        )
