"""What a run leaves behind while it goes: metrics.jsonl, its copy at W&B, the progress line, the samples used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from vitdist.data.loading.batch import Batch
from vitdist.durable import write_whole
from vitdist.errors import Stopped
from vitdist.metrics_log import MetricsLog
from vitdist.progress import Progress
from vitdist.tracking import WandbTracker

SAMPLES = "samples"


class Journal:
    """One per rank. Rank 0 keeps the metrics; every rank its own list of samples, when the recipe asks for it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        metrics: MetricsLog | None,
        wandb: WandbTracker | None,
        progress: Progress | None,
        log_samples: bool,
        evaluated: set[int],
    ) -> None:
        self._metrics = metrics
        self._wandb = wandb
        self._progress = progress
        self._evaluated = evaluated  # steps whose line is there: a stop between evaluation and save repeats one
        self._samples: IO[str] | None = None
        self._path = run_dir / SAMPLES / f"rank_{rank:05d}.jsonl"
        if log_samples:
            self._path.parent.mkdir(exist_ok=True)
            self._samples = self._path.open("a", encoding="utf-8")

    @property
    def tracking_id(self) -> str:
        return self._wandb.run_id if self._wandb is not None else ""

    def step(self, line: dict[str, Any]) -> None:
        """A training line."""
        self._write(line)

    def evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation line; one that stands already, as a resumed run may make it again, is left."""
        if line["step"] not in self._evaluated:
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self._metrics is None:
            return
        self._metrics.write(line)
        if self._wandb is not None:
            self._wandb.log(line, line["step"])
        if self._progress is not None:
            self._progress.update(line)

    def summary(self, values: dict[str, Any]) -> None:
        if self._wandb is not None:
            self._wandb.summary(values)

    def samples(self, batch: Batch, step: int) -> None:
        """What was really used, a line a sample; before the update, so that a lost step's lines are cut on resume."""
        if self._samples is None:
            return
        lam = None if batch.mix is None else batch.mix.lam.tolist()
        for index, (row, seed) in enumerate(zip(batch.rows.tolist(), batch.seeds.tolist(), strict=True)):
            slot = batch.slot + index
            record = {
                "step": step,
                "epoch": batch.epoch,
                "slot": slot,
                "key": batch.keys[index],
                "row": row,
                "seed": seed,
                "partner": slot ^ 1 if lam is not None else None,
                "mix": lam[index] if lam is not None else None,
            }
            self._samples.write(json.dumps(record) + "\n")
        self._samples.flush()

    def cut_samples(self, step: int) -> None:
        """Drop this rank's lines of steps that are done again."""
        if self._samples is not None:
            self._samples.close()
            _cut(self._path, step)
            self._samples = self._path.open("a", encoding="utf-8")

    def close(self, exit_code: int = 0) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._samples is not None:
            self._samples.close()
        if self._wandb is not None:
            # a launcher that asked us to stop kills us after 30 s: its copy must not take them
            self._wandb.finish(timeout=5.0 if exit_code == Stopped.exit_code else 30.0, exit_code=exit_code)


def cut_samples(run_dir: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again, from every rank's list."""
    for path in (run_dir / SAMPLES).glob("rank_*.jsonl"):
        _cut(path, step)


def _cut(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(kept))
