"""`vitdist doctor RECIPE --resume`: is an interrupted run of this recipe, on this machine, the uninterrupted one?

Real trainings in processes of their own: k + m steps; k steps, stopped by a signal and saved; and m more from there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vitdist.checkpoint.state import MODEL, STATE, TRAINING, read_json
from vitdist.checkpoint.store import Store
from vitdist.errors import CheckpointError, UsageError, VitdistError
from vitdist.metrics_log import read_metrics
from vitdist.recipe.load import load_recipe
from vitdist.recipe.shipped import find_recipe
from vitdist.runtime.failures import EXIT_FILE
from vitdist.runtime.faults import VARIABLE

PARTS = {"optimizer/": "optimizer", "ema/": "EMA", "model/": "weights"}
_NOT_COMPARED = {"tracking_id"}  # a name, drawn anew for each run


def check_resume(name: str, overrides: Sequence[str], *, ranks: int, steps: tuple[int, int]) -> str:
    """A line that says that both are identical; CheckpointError naming the parts that differ."""
    recipe = load_recipe(find_recipe(name), list(overrides))
    beside = Path(recipe.out).absolute().parent
    while not beside.is_dir():
        beside = beside.parent
    first, rest = steps
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=beside) as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        words = [name, *overrides, "tracking.wandb=disabled", "tracking.log_samples=true"]
        for out, last in ((whole, first + rest), (cut, first), (cut, first + rest)):
            _train([*words, f"out={out}"], out, ranks, last)
            if out is cut and last == first and _last(cut).name == _last(whole).name:
                raise UsageError(
                    f"{name} ends before step {first + rest}, so it was not interrupted; give fewer --steps"
                )
        differences = list(compare(whole, cut))
        step = int(_last(whole).name.removeprefix("step_"))
    where = f"{step} steps on {ranks} rank{'s' * (ranks > 1)}, interrupted after {first}"
    if differences:
        raise CheckpointError(f"not identical ({where}): {'; '.join(differences)}")
    return f"identical ({where}): weights, optimizer, EMA, losses, order of samples, schedule, generators"


def _train(words: Sequence[str], out: Path, ranks: int, last: int) -> None:
    """Train until a signal stops it at step `last`; what the training itself says is raised when it fails."""
    command = [sys.executable, "-m", "vitdist", "train", *words]
    if ranks > 1:
        command[1:2] = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
                        "--rdzv-endpoint=localhost:0", "-m"]  # fmt: skip
    asked = os.environ.get(VARIABLE)
    environment = {**os.environ, VARIABLE: ";".join(filter(None, [asked, f"term:rank=0,step={last},phase=step"]))}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ending = _ending(out)
    code = int(ending.get("code", done.returncode)) if done.returncode else 0
    if code in (0, 75) and ending:
        return
    said = [line.removeprefix("vitdist: ") for line in done.stdout.splitlines() if _SPOKEN.match(line)]
    failure = VitdistError(said[0] if said else f"the training ended with {code}: {done.stdout.strip()[-300:]}")
    failure.exit_code = code or 1
    raise failure


_SPOKEN = re.compile(r"vitdist: |\S+\.yaml:\d+: |command line: ")


def _ending(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / EXIT_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _last(run: Path) -> Path:
    last = Store(run).pointed("last")
    if last is None:
        raise CheckpointError(f"{run} has no checkpoint")
    return last


# ---- what two runs left


def compare(whole: Path, cut: Path) -> Iterator[str]:
    """A line for each part in which two runs differ."""
    here, there = _last(whole), _last(cut)
    if here.name != there.name:
        yield f"one ended at {here.name}, the other at {there.name}"
        return
    yield from _compare_tensors(here, there)
    for part, (mine, theirs) in _plain_parts(whole, here, cut, there).items():
        if mine != theirs:
            yield f"{part} ({_first_difference(mine, theirs)})"


def _compare_tensors(here: Path, there: Path) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    totals: dict[str, int] = {}
    for file in (MODEL, TRAINING):
        with safe_open(here / file, "pt") as mine, safe_open(there / file, "pt") as theirs:
            ours, others = set(mine.keys()), set(theirs.keys())
            for name in sorted(ours | others):
                part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "weights to use")
                totals[part] = totals.get(part, 0) + 1
                if name not in ours & others:
                    found.setdefault(part, []).append(f"{name} is in one only")
                elif how := _differs(mine.get_tensor(name), theirs.get_tensor(name)):
                    found.setdefault(part, []).append(f"{name} {how}")
    for part, names in found.items():
        yield f"{part} ({len(names)} of {totals[part]} tensors; {names[0]})"


def _differs(mine: torch.Tensor, theirs: torch.Tensor) -> str:
    """How two tensors differ; nothing when every bit is the same."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return f"is {tuple(mine.shape)} and {tuple(theirs.shape)}"
    if torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)):
        return ""
    return f"by at most {(mine.double() - theirs.double()).abs().max():.2g}"


def _plain_parts(whole: Path, here: Path, cut: Path, there: Path) -> dict[str, tuple[Any, Any]]:
    """Part -> what both have of it, as dictionaries."""
    states = [read_json(folder / STATE) for folder in (here, there)]
    counters = [{k: v for k, v in state["train"].items() if k not in {"schedule", *_NOT_COMPARED}} for state in states]
    return {
        "losses": (_losses(whole), _losses(cut)),
        "learning rates": (_rates(whole), _rates(cut)),
        "order of samples": (_samples(whole), _samples(cut)),
        "schedule": (states[0]["train"]["schedule"], states[1]["train"]["schedule"]),
        "counters": (counters[0], counters[1]),
        "random generators": tuple(dict(enumerate(state["generators"])) for state in states),
    }


def _lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "lr" in line]


def _losses(run: Path) -> dict[str, Any]:
    return {f"step {line['step']}": line["train/loss"] for line in _lines(run)}


def _rates(run: Path) -> dict[str, Any]:
    return {f"step {line['step']}": line["lr"] for line in _lines(run)}


def _samples(run: Path) -> dict[str, Any]:
    """What stood in every slot of every global batch, with its augmentation's seed and its partner."""
    records = [json.loads(line) for file in (run / "samples").glob("*.jsonl") for line in file.read_text().splitlines()]
    return {f"step {r['step']} slot {r['slot']:05d}": [r["key"], r["seed"], r["partner"], r["mix"]] for r in records}


def _first_difference(mine: dict[Any, Any], theirs: dict[Any, Any]) -> str:
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    first = names[0]
    both = f"{str(mine.get(first))[:40]} and {str(theirs.get(first))[:40]}"
    return f"{len(names)} of {len({**mine, **theirs})}; {first}: {both}"
