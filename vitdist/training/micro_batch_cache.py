"""Micro-batches found before, by device and by all that decides them, in one small JSON file of the user's.

`$XDG_CACHE_HOME/vitdist/micro_batch_size.json`, else `~/.cache/vitdist/...`: a list of {"for": ..., "size": N}, the
newest last. "for" holds the device and its memory (of a CPU: its threads), torch's version, the class tree, a rank's
share of the batch, and the recipe's values that change time or memory. The file may be deleted at any time; what cannot
be read is as good as none, and where it cannot be written nothing is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from vitdist.durable import write_whole
from vitdist.training.job import Job

MAX_ENTRIES = 200
KEYS = ("data.image_size", "train.precision", "train.compile", "train.grad_checkpointing", "train.deterministic",
        "optimizer.name", "optimizer.clip_grad_norm", "evaluation.batch_size", "parallel.strategy",
        "parallel.offload")  # fmt: skip


def path() -> Path | None:
    """Where the file is, or would be; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "vitdist" / "micro_batch_size.json"
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "vitdist" / "micro_batch_size.json"
    return None


def describe(job: Job) -> dict[str, Any]:
    """All that decides which micro-batch is the fastest that fits."""
    recipe, device = job.recipe.flat(), job.engine.device
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "device": properties.name if properties else f"{device.type} with {torch.get_num_threads()} threads",
        "memory": properties.total_memory if properties else None,
        "torch": torch.__version__,
        "classes": list(job.datasets.tree.num_classes),
        "share": job.recipe.train.global_batch_size // job.engine.world,
        "alone": job.engine.world == 1,
        "average": job.ema is not None,
        "mixing": bool(job.recipe.augment.mixup or job.recipe.augment.cutmix),
        **{key: recipe[key] for key in KEYS},
        **{key: value for key, value in recipe.items() if key.startswith("model.") and key != "model.weights"},
    }


def read(key: dict[str, Any]) -> int | None:
    """The size that was found for this very key."""
    wanted = json.loads(json.dumps(key))
    sizes = [entry["size"] for entry in _entries() if entry["for"] == wanted]
    return sizes[-1] if sizes else None


def write(key: dict[str, Any], size: int) -> None:
    """Keep it, in place of what was found before; readers see the old file or the new one."""
    file = path()
    if file is None:
        return
    wanted = json.loads(json.dumps(key))
    kept = [entry for entry in _entries() if entry["for"] != wanted][1 - MAX_ENTRIES :]
    with contextlib.suppress(OSError):  # a full or read-only home costs a search, not a run
        write_whole(file, json.dumps([*kept, {"for": wanted, "size": size}], indent=1) + "\n")


def _entries() -> list[dict[str, Any]]:
    file = path()
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file is not None else []
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(data, list):
        return []
    whole = [entry for entry in data if isinstance(entry, dict) and entry.keys() == {"for", "size"}]
    return [entry for entry in whole if isinstance(entry["size"], int) and not isinstance(entry["size"], bool)]
