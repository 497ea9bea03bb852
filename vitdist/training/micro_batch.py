"""`micro_batch_size: auto`: the fastest micro-batch that fits, at the recipe's global batch, the same on all ranks.

Each candidate does what a step does, on the run's own model before it is joined to the other ranks: forward, loss,
backward with gradients there already, clipping, optimizer and average, and once an evaluation's batch. The updates are
marked to be skipped, as those of a bad step are, so that nothing moves; buffers and generators are put back.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from vitdist import optim
from vitdist.data.loading.batch import Batch
from vitdist.data.pixels.mixing import MixTensors, ToModelInput
from vitdist.errors import ResourceError
from vitdist.recipe.batch import BatchSplit, micro_batch_sizes
from vitdist.runtime import rng
from vitdist.runtime.agree import everywhere
from vitdist.runtime.engine import evaluating
from vitdist.training import micro_batch_cache as cache
from vitdist.training.device_memory import free, out_of_memory
from vitdist.training.job import Job
from vitdist.training.step import Stepper

log = logging.getLogger(__name__)

ROUNDS = 3  # timed, after one that is not
BETTER = 1.02  # a larger one must be faster by so much: it costs memory
GIVE_UP = 2  # candidates in a row that are not faster
SPACING = 1.4  # between candidates: a share of 720 has 30 divisors


def choices(job: Job) -> list[int]:
    """Sizes that divide a rank's share, smallest first; even ones where pairs are mixed."""
    augment = job.recipe.augment
    return micro_batch_sizes(
        job.recipe.train.global_batch_size, job.engine.world, mixing=bool(augment.mixup or augment.cutmix)
    )


def settle(job: Job) -> BatchSplit:
    """What was found for this run before, else on this device for the same, else by trying. Collective."""
    possible = choices(job)
    kept = job.state.micro_batch_size
    key = cache.describe(job)
    if kept in possible:
        size, source = kept, "kept with the checkpoint"
    else:
        size, source = job.engine.from_main(cache.read(key)), f"found before on this device: {cache.path()}"
        if size not in possible:
            size, source = _search(job, _spaced(possible)), "the fastest that fits"
            if job.engine.is_main:
                cache.write(key, size)
    assert size is not None
    job.state.micro_batch_size = size
    log.info("micro-batch %d of %s (%s)", size, ", ".join(map(str, possible)), source)
    return split_by(job, size)


def split_by(job: Job, size: int) -> BatchSplit:
    return BatchSplit(size, job.recipe.train.global_batch_size // job.engine.world // size)


def _spaced(sizes: Sequence[int]) -> list[int]:
    kept = [sizes[0]]
    for size in sizes:
        if size >= SPACING * kept[-1] or (size == sizes[-1] and size > kept[-1]):
            kept.append(size)
    return kept


def _search(job: Job, sizes: Sequence[int]) -> int:
    """Collective; ResourceError where not even the smallest fits."""
    with undisturbed(job):
        probe = Probe(job)
        size = fastest(sizes, lambda size: _agreed(job, probe, size))
    if size is None:
        raise ResourceError(
            f"not even a micro-batch of {sizes[0]} fits into {job.engine.device.type} memory; "
            "set train.grad_checkpointing=true, or take a smaller model or data.image_size"
        )
    return size


def fastest(sizes: Sequence[int], measure: Callable[[int], float | None]) -> int | None:
    """The size with the shortest step, tried from small to large until one does not fit or several are no faster."""
    best: tuple[int, float] | None = None
    worse = 0
    for size in sizes:
        seconds = measure(size)
        if seconds is None:
            break
        if best is None or seconds * BETTER < best[1]:
            best, worse = (size, seconds), 0
        else:
            worse += 1
        if worse == GIVE_UP:
            break
    return None if best is None else best[0]


def _agreed(job: Job, probe: Probe, size: int) -> float | None:
    """The slowest rank's seconds, or None where it does not fit on one of them. Collective."""
    mine = everywhere(job.engine, lambda: probe.seconds(size))
    found = job.engine.gather_json(mine)
    seconds = None if None in found else float(max(found))
    speed = "does not fit" if seconds is None else f"{job.plan.global_batch_size / seconds:.1f} img/s"
    log.info("micro-batch %d: %s", size, speed)
    return seconds


@contextlib.contextmanager
def undisturbed(job: Job) -> Iterator[None]:
    """Generators, buffers, gradients and a fresh optimizer's emptiness are after the block as they were before it."""
    tensors, plain = rng.get_state()
    buffers = {name: buffer.clone() for name, buffer in job.model.named_buffers()}
    was_fresh = not job.optimizer.state
    try:
        yield
    finally:
        job.optimizer.zero_grad(set_to_none=True)
        if was_fresh:
            job.optimizer.state.clear()
        with torch.no_grad():
            for name, buffer in job.model.named_buffers():
                buffer.copy_(buffers[name])
        rng.set_state(tensors, plain)
        if job.recipe.train.compile:
            torch.compiler.reset()  # what was compiled for several sizes is not what one alone would get
        free(job)


class Probe:
    """Times a rank's share of a step at one micro-batch after the other. Not collective."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._step = Stepper(job)
        self._skip = torch.ones((), device=job.engine.device)
        self._trained = [p for group in job.optimizer.param_groups for p in group["params"]]
        self._evaluated = False
        # DDP's buckets, which are not there yet
        joined = sum(p.numel() * p.element_size() for p in self._trained) if job.engine.world > 1 else 0
        self._buckets = torch.empty(joined, dtype=torch.uint8, device=job.engine.device)

    def seconds(self, size: int) -> float | None:
        """None where it does not fit."""
        job = self._job
        job.at("probe")
        try:
            job.faults.point(f"probe-{size}", job.state.step)
            found = self._measure(size)
            self._evaluate()
            return found
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return None
        finally:
            job.optimizer.zero_grad(set_to_none=True)
            free(job)

    def _measure(self, size: int) -> float:
        batch = _blank(self._job, size)
        micro, update = [], []
        for _ in range(1 + ROUNDS):
            self._timed(lambda: self._micro(batch))  # makes the gradients that the next one finds
            micro.append(self._timed(lambda: self._micro(batch)))
            update.append(self._timed(self._update))
        share = self._job.recipe.train.global_batch_size // self._job.engine.world
        return share // size * statistics.median(micro[1:]) + statistics.median(update[1:])

    def _timed(self, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        if self._job.engine.device.type == "cuda":
            torch.cuda.synchronize(self._job.engine.device)
        return time.perf_counter() - started

    def _micro(self, batch: Batch) -> None:
        job = self._job
        denominators = [float(len(batch))] * job.datasets.tree.num_levels
        with job.engine.autocast():
            self._step.loss_of(batch.to(job.engine.device), denominators, job.model).backward()

    def _update(self) -> None:
        job = self._job
        optim.clip_grad_norm(self._trained, job.recipe.optimizer.clip_grad_norm)
        optim.step(job.optimizer, self._skip)
        if job.ema is not None:
            job.ema.update(job.model, self._skip)
        job.optimizer.zero_grad(set_to_none=True)

    def _evaluate(self) -> None:
        """Once: its batch is the recipe's, whatever the micro-batch; ResourceError where it does not fit."""
        job, size = self._job, self._job.recipe.evaluation.batch_size
        if self._evaluated:
            return
        self._evaluated = True
        images = _blank(job, size).to(job.engine.device).images
        to_input = ToModelInput(job.preprocessing.mean, job.preprocessing.std).to(job.engine.device)
        average = contextlib.nullcontext() if job.ema is None else job.ema.applied(job.model)
        try:
            with average, evaluating(job.model), job.engine.autocast():
                job.model(to_input(images))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            text = f"evaluation.batch_size {size} does not fit into memory; use a smaller one"
            raise ResourceError(text) from None


def _blank(job: Job, size: int) -> Batch:
    """A micro-batch of black pictures, mixed with themselves where the recipe mixes."""
    side = job.preprocessing.image_size
    mixed = job.recipe.augment.mixup or job.recipe.augment.cutmix
    mix = MixTensors(torch.ones(size), torch.ones(size), torch.zeros(size, 4, dtype=torch.int32)) if mixed else None
    label = int(np.asarray(job.datasets.train_labels())[0])
    return Batch(
        images=torch.zeros(size, side, side, 3, dtype=torch.uint8), labels=torch.full((size,), label),
        rows=np.zeros(size, np.int64), seeds=np.zeros(size, np.uint64), valid=np.ones(size, bool),
        position=0, epoch=0, slot=0, damages=[], keys=[], mix=mix,
    )  # fmt: skip
