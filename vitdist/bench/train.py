"""What the input costs the step: the step on resident batches, the input alone, both together, and the waiting."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from vitdist import optim
from vitdist.bench.inputs import Inputs
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
    """Interleaved rounds of the three, as a table; on the CPU the step has one core and the worker the others."""
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
    rounds = [_round(step, stream, resident, num_steps) for _ in range(num_rounds)]
    os.sched_setaffinity(0, cores)
    alone, given, both, waited = (statistics.median(column) for column in zip(*rounds, strict=True))
    asked = statistics.median(given / alone for alone, given, _, _ in rounds)
    lost = statistics.median(both / alone for alone, _, both, _ in rounds) - 1
    return "\n".join(
        [
            f"{'the step alone, inputs resident':36s} {size / alone:8.1f} img/s",
            f"{'the input alone':36s} {size / given:8.1f} img/s   the step asks for {100 * asked:.0f} % of it",
            f"{'both':36s} {size / both:8.1f} img/s   the step loses {100 * lost:.1f} % to the input",
            f"{'waiting for data':36s} {100 * waited / both:8.1f} %",
        ]
    )


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


def _round(
    step: _Step, stream: Iterator[Batch], resident: list[Batch], num_steps: int
) -> tuple[float, float, float, float]:
    """Seconds a step of: the step alone, the input alone, both; and of waiting in the last."""
    started = time.perf_counter()
    for number in range(num_steps):
        step(resident[number % len(resident)])
    alone = time.perf_counter() - started
    _drain(stream)
    started = time.perf_counter()
    for _ in range(num_steps):
        next(stream)
    given = time.perf_counter() - started
    waited, started = 0.0, time.perf_counter()
    for _ in range(num_steps):
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        step(batch)
    both = time.perf_counter() - started
    return alone / num_steps, given / num_steps, both / num_steps, waited / num_steps


def _drain(stream: Iterator[Batch]) -> None:
    """Take what was made in advance, so that what comes next is timed as it is made."""
    for _ in range(8):
        next(stream)
