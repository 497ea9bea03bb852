"""Rolling back: past the limit of non-finite steps, on from the last good checkpoint and past the batches since.

PaLM's remedy (Chowdhery et al. 2022, section 5.1): the same weights rarely blow up again on other batches. The batches
passed over count as steps, as skipped ones do, so that position in the data stays one integer. What the run goes on
from is published as a checkpoint of its own, with the good one's tensors and the later step, and taken up as any other:
a run killed after that resumes as if it had not been, and one killed before goes back in the same way again.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from vitdist.checkpoint import state as files
from vitdist.checkpoint.manifest import MANIFEST, read_manifest
from vitdist.errors import NonFiniteError, Stopped
from vitdist.metrics_log import MetricsLog
from vitdist.runtime.agree import on_main
from vitdist.training.job import Job
from vitdist.training.journal import cut_samples
from vitdist.training.step import Report

log = logging.getLogger(__name__)


class BlownUp(NonFiniteError):
    """Past the limit with a rollback left: raised on all ranks alike by the report of a step."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def roll_back(job: Job, blown: BlownUp) -> str:
    """Publish the checkpoint to go on from, and return its folder; the job is at its end. Collective.

    NonFiniteError where no checkpoint is from before the first bad step.
    """
    job.engine.barrier()  # the report of the step after is under way: its sum is done when this one is
    job.saved()
    job.journal.close(Stopped.exit_code)
    job.joined.leave()
    job.engine.barrier()  # the lists of samples are closed before they are cut
    job.at("rollback", blown.report.step)
    folder: str = on_main(job.engine, lambda: str(_publish(job, blown)))
    return folder


def _publish(job: Job, blown: BlownUp) -> Path:
    bad = blown.report
    good, notes = job.store.newest(before=bad.step - bad.num_nonfinite_in_row + 1)
    if good is None:
        raise NonFiniteError(f"no checkpoint from before is there to go back to: {blown}")
    step = int(read_manifest(good)["step"])
    for note in notes + job.store.rewind(step):
        log.warning("%s", note)
    metrics = MetricsLog(job.run_dir / "metrics.jsonl")
    metrics.truncate_to(step)
    metrics.write({"step": bad.step, "rolled_back_to": step})
    metrics.close()
    cut_samples(job.run_dir, step)
    rollbacks = [*job.state.rollbacks, [step, bad.step]]
    changed = {
        "step": bad.step,
        "rollbacks": rollbacks,
        "num_nonfinite": bad.num_nonfinite,
        "num_nonfinite_in_row": 0,
        "damaged_in_epoch": job.state.damaged_in_epoch,
    }
    assert job.lock is not None
    folder = job.store.publish(bad.step, lambda stage: _copy(good, stage, changed), may=job.lock.check)
    job.store.prune(job.retention, {int(key): value for key, value in job.state.values.items()})
    log.warning(
        "rollback %d of %d: the weights are those of step %d again, the batches up to step %d are passed over",
        len(rollbacks), job.recipe.train.max_rollbacks, step, bad.step,
    )  # fmt: skip
    return folder


def _copy(good: Path, stage: Path, changed: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's files with some of its plain state changed; returns what the manifest says of them."""
    for file in good.iterdir():
        if file.name != MANIFEST:
            shutil.copyfile(file, stage / file.name)
    record = files.read_json(good / files.STATE)
    record["train"] |= changed
    (stage / files.STATE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return {"weights": read_manifest(good)["weights"]}
