"""The run folder: taken by one writer, resumed, refused or moved aside, with a record of every start."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vitdist.checkpoint.manifest import read_manifest
from vitdist.checkpoint.store import Store, find_checkpoint
from vitdist.durable import write_whole
from vitdist.errors import CheckpointError, UsageError, VitdistError
from vitdist.recipe.changes import frozen_differences
from vitdist.recipe.load import load_recipe
from vitdist.recipe.schema import Recipe
from vitdist.runtime.failures import EXIT_FILE
from vitdist.runtime.lock import LOCK, RunLock
from vitdist.runtime.stop import STOP_FILE

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
PACKAGES = ("vitdist", "torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "wandb", "numpy")


@dataclass(frozen=True)
class Start:
    """How a run begins: from which checkpoint, and the how-manieth start of its folder this is."""

    checkpoint: str | None
    attempt: int
    notes: list[str]


def take(recipe: Recipe, lock: RunLock, *, resume: str, data_hash: str) -> Start:
    """Lock the folder and decide where the run starts. Rank 0 only; the lock is held when this returns.

    UsageError when the folder belongs to a run with another recipe or other data; CheckpointError when checkpoints are
    there and none verifies.
    """
    run_dir = Path(recipe.out)
    lock.acquire()
    try:
        if resume == "never" and (run_dir / RECIPE).exists():
            _set_aside(run_dir)
        notes: list[str] = []
        store = Store(run_dir)
        checkpoint = _checkpoint(store, run_dir, resume, notes)
        if checkpoint is not None and resume in ("auto", "never"):
            _refuse_another(run_dir, recipe, data_hash)
        if checkpoint is not None and checkpoint.parent.resolve() == store.folder.resolve():
            notes += store.rewind(read_manifest(checkpoint)["step"])
        for leftover in (EXIT_FILE, STOP_FILE):
            (run_dir / leftover).unlink(missing_ok=True)
        write_whole(run_dir / RECIPE, recipe.to_yaml())
        return Start(None if checkpoint is None else str(checkpoint), num_starts(run_dir) + 1, notes)
    except BaseException:
        lock.release()
        raise


def _set_aside(run_dir: Path) -> None:
    """Move everything but the lock into <out>.old-N: the folder starts anew, and nothing is lost."""
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    target.mkdir()
    for entry in run_dir.iterdir():
        if not entry.name.startswith(LOCK):
            os.rename(entry, target / entry.name)


def _checkpoint(store: Store, run_dir: Path, resume: str, notes: list[str]) -> Path | None:
    """Where to go on from: the newest that verifies, or the one asked for."""
    if resume not in ("auto", "never"):
        return find_checkpoint(Path(resume), prefer=("last",))
    store.sweep()
    newest, passed_over = store.newest()
    notes += passed_over
    if newest is None and store.published():
        raise CheckpointError(
            f"{run_dir} has checkpoints, and none verifies: {passed_over[0]}; nothing was deleted; "
            "start anew with out=... or --resume never"
        )
    return newest


def _refuse_another(run_dir: Path, recipe: Recipe, data_hash: str) -> None:
    """UsageError naming the keys in which the folder's recipe is another than this one."""
    ways = "give this run a folder with out=..., or move the old one aside with --resume never"
    try:
        old = load_recipe(run_dir / RECIPE)
    except VitdistError as error:
        raise UsageError(f"{run_dir / RECIPE} cannot be compared ({error}); {ways}") from None
    changed = frozen_differences(old, recipe)
    if changed:
        before, after = old.flat(), recipe.flat()
        said = ", ".join(f"{key} ({before[key]} -> {after[key]})" for key in changed)
        raise UsageError(f"{run_dir} holds a run with another recipe: {said}; {ways}")
    known = read_environment(run_dir).get("data", {}).get("hash")
    if known not in (None, data_hash):
        raise UsageError(f"{run_dir} was trained on other data than {recipe.data.path}; {ways}")


def read_environment(run_dir: Path) -> dict[str, Any]:
    """environment.json, or nothing where there is none that reads."""
    try:
        data = json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def num_starts(run_dir: Path) -> int:
    return len(read_environment(run_dir).get("starts", []))


def write_environment(run_dir: Path, start: Start, **more: Any) -> None:
    """Record this start: versions, commit, command, hardware; earlier starts are kept."""
    starts = read_environment(run_dir).get("starts", [])
    starts.append(
        {
            "attempt": start.attempt,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "resumed_from": start.checkpoint,
            "command": shlex.join(sys.argv),
            "world": more.get("world"),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
    )
    record = {"versions": versions(), "commit": commit(), "hardware": hardware(), **more, "starts": starts}
    write_whole(run_dir / ENVIRONMENT, json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of the code that runs, with a + when files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def hardware() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": devices,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
