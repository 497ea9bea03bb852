"""After the last step: the chosen weights see the test split once, and the report is built."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from vitdist.data.index import is_url
from vitdist.evaluation import results
from vitdist.evaluation.report import build_report
from vitdist.training.choosing import measure
from vitdist.training.job import Job, take_weights

log = logging.getLogger(__name__)


def finish(job: Job) -> None:
    """Test and report. Collective; ranks other than 0 leave after the test."""
    if "test" not in job.datasets.index.splits:
        log.info("%s has no test split: nothing to test on", job.recipe.data.path)
    elif not _tested(job):
        _test(job)
    if job.engine.is_main:
        log.info("report: %s", build_report(job.run_dir))
        if job.state.damaged:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(job.state.damaged.items()))
            log.warning("%d damaged samples were replaced: %s", job.state.num_damaged, kinds)


def chosen(job: Job) -> Path:
    """The checkpoint that the protocol chooses: the best where something was monitored, else the last."""
    best = job.store.pointed("best")
    last = job.store.folder / f"step_{job.state.step:08d}"
    return best if job.recipe.checkpoint.monitor is not None and best is not None else last


def _tested(job: Job) -> bool:
    """Whether this state of the run was tested before: a test is not repeated for being asked again."""
    done = job.engine.is_main and _tested_step(job) == _chosen_step(job)
    return bool(job.engine.from_main(done))


def _chosen_step(job: Job) -> int:
    return int(chosen(job).name.removeprefix("step_"))


def _tested_step(job: Job) -> int | None:
    try:
        return int(json.loads((job.run_dir / results.FOLDER / "test.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return None


def _test(job: Job) -> None:
    """Load the chosen weights on every rank, evaluate, and write evaluation/test.json."""
    step = job.engine.from_main(_chosen_step(job) if job.engine.is_main else None)
    if step != job.state.step:
        take_weights(job, job.store.folder / f"step_{step:08d}")
        job.ema = None  # the chosen weights are in the model itself
    job.faults.point("test", job.state.step)
    selection = job.datasets.test()
    result = measure(job, selection)
    if not job.engine.is_main:
        return
    found = results.write(
        job.run_dir / results.FOLDER,
        result,
        job.datasets.tree,
        split="test",
        expected=selection.num_samples,
        weights="raw" if job.recipe.ema.decay is None else "ema",
        step=step,
        protocol=job.recipe.evaluation.protocol,
        seed=job.recipe.seed,
        split_hash=selection.describe()["sha256"],
        data_path=job.recipe.data.path if is_url(job.recipe.data.path) else str(job.datasets.index.root),
    )
    log.info("%s", results.headline(found))
    job.journal.summary({f"test/accuracy/{name}": level["accuracy"] for name, level in found["levels"].items()})
