"""Writing down what a step that was no number had been fed: one line a step in nonfinite.jsonl."""

from __future__ import annotations

import json

from vitdist.data.storage.shards import DamagedSample, ShardReader
from vitdist.training.job import Job

NONFINITE = "nonfinite.jsonl"
_MAX_BYTES = 16 << 20  # a run that skips often must not fill the disk with it


def write_down(job: Job, step: int, ranks: list[int]) -> None:
    """The keys of a step's global batch in slot order, and the ranks whose loss was not finite. Rank 0 only."""
    path = job.run_dir / NONFINITE
    if path.exists() and path.stat().st_size > _MAX_BYTES:
        return
    size = job.plan.global_batch_size
    slots = job.plan.slots(step - 1, 0, size)
    reader = ShardReader(job.datasets.train.split)
    keys = [_key(reader, int(row)) for row in slots.rows]
    reader.close()
    share = size // job.engine.world
    record = {
        "step": step,
        "epoch": slots.epoch,
        "attempt": job.faults.attempt,
        "ranks": ranks,
        "slots": [[rank * share, (rank + 1) * share] for rank in ranks],
        "keys": keys,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _key(reader: ShardReader, row: int) -> str:
    try:
        return reader.key(row)
    except DamagedSample as error:
        return f"row {row}: {error}"
