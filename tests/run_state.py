"""What a run left, in a form that can be compared to the bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from vitdist.checkpoint.store import Store
from vitdist.metrics_log import read_metrics

WALL_CLOCK = {"images_per_second", "data_wait"}  # the only fields that may differ between identical runs


def losses(run: Path) -> list[tuple[int, str]]:
    """(step, loss as hex) of every training line."""
    return [(line["step"], line["train/loss"].hex()) for line in read_metrics(run / "metrics.jsonl") if "lr" in line]


def lines(run: Path) -> list[dict[str, Any]]:
    """All metrics lines without the wall clock."""
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in read_metrics(run / "metrics.jsonl")]


def tensors(run: Path) -> dict[str, str]:
    """sha256 of every tensor of the last checkpoint: weights, optimizer, average."""
    last = Store(run).pointed("last")
    assert last is not None, f"{run} has no last checkpoint"
    found = {}
    for file in sorted(last.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.name}:{name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return found
