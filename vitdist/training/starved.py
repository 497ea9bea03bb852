"""Out of memory on the way, under `micro_batch_size: auto`: half the micro-batch, and that step anew.

The rank it happens to cannot leave the others waiting in the reduction: it takes part in it with a gradient that is no
number, so that the update is skipped on every rank, and says so in the report. The report is read a step later; until
then it goes on like this. Then all ranks go back to the step that failed. The sums run in another order from there on,
so the run is no longer bit-exact, and its metrics say so.
"""

from __future__ import annotations

import logging

from vitdist.errors import ResourceError
from vitdist.training import micro_batch, micro_batch_cache
from vitdist.training.device_memory import free
from vitdist.training.guard import NonFiniteGuard
from vitdist.training.job import Job
from vitdist.training.step import Report

log = logging.getLogger(__name__)


class Starved(Exception):
    """Raised on all ranks alike by the report of a step that had no memory on some of them."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"out of memory at step {report.step}")
        self.report = report


def shrink(job: Job, report: Report) -> None:
    """Go back to before the step, with half the micro-batch. Collective; ResourceError where none is smaller."""
    step, before = report.step, job.batch.micro_batch_size
    smaller = [size for size in micro_batch.choices(job) if size <= before // 2]
    ranks = ", ".join(map(str, report.starved))
    if not smaller:
        raise ResourceError(
            f"rank {ranks}: out of memory at step {step} with the smallest micro-batch, {before}; "
            "set train.grad_checkpointing=true, or take more ranks"
        )
    job.engine.barrier()  # the report of the step after is under way: its sum is done when this one is
    job.batch = micro_batch.split_by(job, smaller[-1])
    job.state.step, job.state.micro_batch_size, job.state.inexact = step - 1, smaller[-1], True
    job.guard = NonFiniteGuard(
        job.recipe.train.max_nonfinite_steps,
        job.engine.device,
        total=job.num_nonfinite[0],  # the skipped updates were no bad numbers
        in_row=job.num_nonfinite[1],
    )
    job.journal.cut_samples(job.state.step)
    free(job)
    if job.engine.is_main:
        micro_batch_cache.write(micro_batch_cache.describe(job), smaller[-1])
    log.warning(
        "step %d: rank %s had no memory for a micro-batch of %d; going on with %d from that step, no longer bit-exact",
        step, ranks, before, smaller[-1],
    )  # fmt: skip
