"""What is due at a step: evaluations and checkpoints by steps, epochs and the clock."""

from __future__ import annotations

import time

from vitdist.training.job import Job
from vitdist.training.step import Report


class Agenda:
    """Steps and epochs are the same on every rank; the clock is rank 0's wish, agreed on in reports."""

    def __init__(self, job: Job) -> None:
        self._job = job
        per_epoch = job.plan.steps_per_epoch
        every = job.recipe.checkpoint.every
        self._save_steps = [wish.steps(per_epoch) for wish in every if not wish.is_time]
        self._save_seconds = [wish.seconds for wish in every if wish.is_time]
        self._evaluate_steps = job.recipe.evaluation.every.steps(per_epoch)
        self._saved_at = time.monotonic()

    def save_by_the_clock(self) -> bool:
        """Rank 0's wish for a checkpoint because time has passed."""
        waited = time.monotonic() - self._saved_at
        return self._job.engine.is_main and any(waited >= seconds for seconds in self._save_seconds)

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def anything_due(self, report: Report | None) -> bool:
        stop = report is not None and report.stop > 0
        return stop or self.evaluation_due() or self.save_due(report)

    def evaluation_due(self) -> bool:
        """Every so many steps and at the end, where something is held out to evaluate on."""
        step = self._job.state.step
        on_time = step > 0 and (step % self._evaluate_steps == 0 or step == self._job.max_steps)
        return on_time and self._job.datasets.val is not None

    def save_due(self, report: Report | None) -> bool:
        """At the end, every so many steps, or when rank 0 wished for it a step ago."""
        step = self._job.state.step
        on_time = step == self._job.max_steps or any(step % every == 0 for every in self._save_steps)
        return on_time or (report is not None and report.save)
