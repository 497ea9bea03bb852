"""What the input costs the step: the step on resident batches, the input alone, both together, the waiting.

And on the CPU the step beside a busy core that is no input.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vitdist import optim
from vitdist.bench.inputs import Inputs
from vitdist.bench.neighbours import KINDS, beside, kinship
from vitdist.data.loading.batch import Batch
from vitdist.data.pixels.mixing import ToModelInput
from vitdist.losses import hierarchical_loss
from vitdist.recipe.batch import BatchSplit
from vitdist.runtime.engine import DTYPES
from vitdist.training import assemble
from vitdist.training.datasets import open_datasets

WARM_UP = 3


class _Step:
    """Forward, loss, backward and update of one micro-batch on one device, as training makes them; no other ranks."""

    def __init__(self, wish: Inputs) -> None:
        recipe = wish.recipe
        datasets = open_datasets(recipe)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = assemble.build_model(recipe, datasets.tree, weights="none").to(self.device).train()
        self.preprocessing = assemble.preprocessing_of(recipe, self.model)
        self._to_input = ToModelInput(self.preprocessing.mean, self.preprocessing.std).to(self.device)
        self._targets = torch.from_numpy(datasets.targets.astype(np.int64)).to(self.device)
        self._optimizer = assemble.build_optimizer_of(recipe, self.model)
        dtype = DTYPES[recipe.train.precision]
        self._autocast = torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        self._found_inf = torch.zeros((), device=self.device)
        self.plan = assemble.build_plan(recipe, datasets)

    def __call__(self, batch: Batch) -> None:
        batch = batch.to(self.device)
        with self._autocast:
            logits = self.model(self._to_input(batch.images, batch.mix))
        targets = self._targets[batch.labels]
        lam = None if batch.mix is None else batch.mix.lam
        loss = hierarchical_loss(
            logits,
            targets,
            denominators=[float(len(batch))] * targets.shape[1],
            lam=lam,
            partner_targets=None if lam is None else targets.view(-1, 2, targets.shape[1]).flip(1).view(targets.shape),
        )
        loss.backward()
        optim.step(self._optimizer, self._found_inf)
        self._optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_train(wish: Inputs, *, num_steps: int, num_rounds: int) -> str:
    """Interleaved rounds as a table; on the CPU the step has one core and the worker, or a neighbour, the others."""
    cores = sorted(os.sched_getaffinity(0))
    step = _Step(wish)
    on_cpu = step.device.type == "cpu"
    if on_cpu and len(cores) > 1:
        torch.set_num_threads(1)
    micro = wish.recipe.train.micro_batch_size
    size = micro if isinstance(micro, int) else wish.recipe.train.global_batch_size
    stream = _stream(wish, step, size, set(cores[1:]) if on_cpu and len(cores) > 1 else set(cores))
    if on_cpu:
        os.sched_setaffinity(0, {cores[0]})  # the worker was started before, on the others
    resident = list(itertools.islice(stream, WARM_UP))
    for batch in resident:
        step(batch)
    others = set(cores[1:]) if on_cpu else set[int]()
    rounds = [_round(step, stream, resident, num_steps, others) for _ in range(num_rounds)]
    os.sched_setaffinity(0, cores)
    lines = _table(rounds, size)
    if others:
        lines.append(f"processors {cores[0]} and {cores[1]} are, the machine says, {kinship(cores[0], cores[1])}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Round:
    """Seconds a step of: the step alone, the input alone, both, of waiting in that, and beside each busy neighbour."""

    alone: float
    given: float
    both: float
    waited: float
    beside: dict[str, float]


def _table(rounds: list[_Round], size: int) -> list[str]:
    """Medians; what is lost and asked for is of the same round."""

    def row(name: str, seconds: Callable[[_Round], float], share: str = "") -> str:
        return f"{name:46s} {size / statistics.median(map(seconds, rounds)):8.1f} img/s   {share}".rstrip()

    def lost(seconds: Callable[[_Round], float]) -> str:
        part = statistics.median(seconds(one) / one.alone for one in rounds) - 1
        return f"the step loses {100 * part:.1f} %"

    asked = statistics.median(one.given / one.alone for one in rounds)
    waited = statistics.median(one.waited / one.both for one in rounds)
    return [
        row("the step alone, inputs resident", lambda one: one.alone),
        row("the input alone", lambda one: one.given, f"the step asks for {100 * asked:.0f} % of it"),
        row("both", lambda one: one.both, f"{lost(lambda one: one.both)}, {100 * waited:.1f} % waiting for data"),
        *(row(f"no input; beside it {kind}", of := _beside(kind), lost(of)) for kind in rounds[0].beside),
    ]


def _beside(kind: str) -> Callable[[_Round], float]:
    return lambda one: one.beside[kind]


def _stream(wish: Inputs, step: _Step, size: int, cores: set[int]) -> Iterator[Batch]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    stream = iter(
        assemble.train_batches(
            wish.recipe,
            wish.split,
            step.plan,
            step.preprocessing,
            BatchSplit(size, wish.recipe.train.global_batch_size // size),
            rank=0,
            world=1,
            start=0,
            pin_memory=step.device.type == "cuda",
            num_workers=wish.recipe.data.num_workers or 1,
        )
    )
    first = next(stream)
    os.sched_setaffinity(0, before)
    return itertools.chain([first], stream)


def _round(step: _Step, stream: Iterator[Batch], resident: list[Batch], num_steps: int, others: set[int]) -> _Round:
    """The step alone is timed before and after both: a machine that slows down meanwhile is not the input."""
    beside_it = {}
    for kind in KINDS if others else ():
        with beside(kind, others):
            step(resident[0])  # meanwhile it starts
            beside_it[kind] = _steps(step, resident, num_steps)
    _drain(stream)
    started = time.perf_counter()
    for _ in range(num_steps):
        next(stream)
    given = (time.perf_counter() - started) / num_steps
    before = _steps(step, resident, num_steps)
    waited, started = 0.0, time.perf_counter()
    for _ in range(num_steps):
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        step(batch)
    both = (time.perf_counter() - started) / num_steps
    after = _steps(step, resident, num_steps)
    return _Round((before + after) / 2, given, both, waited / num_steps, beside_it)


def _steps(step: _Step, resident: list[Batch], num_steps: int) -> float:
    started = time.perf_counter()
    for number in range(num_steps):
        step(resident[number % len(resident)])
    return (time.perf_counter() - started) / num_steps


def _drain(stream: Iterator[Batch]) -> None:
    """Take what was made in advance, so that what comes next is timed as it is made."""
    for _ in range(8):
        next(stream)
