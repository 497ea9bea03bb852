"""The parts of one training, put together, and how they become a checkpoint and come back."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitdist.checkpoint import state as files
from vitdist.checkpoint.host import HostMemory
from vitdist.checkpoint.manifest import read_manifest
from vitdist.checkpoint.saver import Saver
from vitdist.checkpoint.store import Retention, Store
from vitdist.data.pixels.transforms import Preprocessing
from vitdist.data.plan import TrainPlan
from vitdist.data.storage.shards import Damage
from vitdist.errors import CheckpointError, VitdistError
from vitdist.models.classifier import Classifier
from vitdist.recipe.batch import BatchSplit
from vitdist.recipe.schema import Recipe
from vitdist.runtime import rng
from vitdist.runtime.agree import FailedElsewhere, everywhere, on_main
from vitdist.runtime.engine import Engine
from vitdist.runtime.faults import Faults
from vitdist.runtime.joined import Joined
from vitdist.runtime.lock import RunLock
from vitdist.runtime.stop import StopFlag
from vitdist.runtime.watch import Watch
from vitdist.schedules import Schedule
from vitdist.training.datasets import Datasets
from vitdist.training.ema import ModelEMA
from vitdist.training.guard import NonFiniteGuard
from vitdist.training.journal import Journal
from vitdist.training.state import TrainState

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One training. `model` is the plain module, `joined` what the ranks made of it; `state` is saved."""

    recipe: Recipe
    run_dir: Path
    engine: Engine
    datasets: Datasets
    plan: TrainPlan
    batch: BatchSplit
    preprocessing: Preprocessing
    model: Classifier
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    state: TrainState
    max_steps: int
    num_workers: int
    stop: StopFlag
    faults: Faults
    watch: Watch
    store: Store
    lock: RunLock | None  # on rank 0
    saver: Saver | None  # there too
    ema: ModelEMA | None = None
    host: HostMemory = field(default_factory=HostMemory)
    joined: Joined = field(init=False)
    guard: NonFiniteGuard = field(init=False)
    journal: Journal = field(init=False)
    loss_scale: dict[str, Tensor] = field(default_factory=dict)  # of fp16, as a checkpoint had it
    first_step: int = 1  # the first this start makes
    num_nonfinite: tuple[int, int] = (0, 0)  # updates skipped so far, and in a row, agreed by all ranks
    num_damaged: int = 0  # samples replaced so far, agreed by all ranks
    damaged_here: Counter[str] = field(default_factory=Counter)  # on this rank since the last save, by kind and shard

    def at(self, phase: str, step: int | None = None) -> None:
        """Pass a place of the program: the watch sees that this rank lives, and a fault may be asked for here."""
        step = self.state.step if step is None else step
        self.watch.at(phase, step)
        self.faults.point(phase, step)

    def arm(self) -> None:
        """The first step is done: from now on a rank that lets the others wait for parallel.timeout counts as lost."""
        seconds = self.recipe.parallel.timeout.seconds
        self.engine.set_timeout(seconds)
        self.watch.arm()
        if (line := self.joined.holdings()) is not None:
            log.info("%s", line)

    def save(self) -> None:
        """Publish a checkpoint of this step. Collective; rank 0 writes in a thread, and the steps go on meanwhile.

        A failure of the save before is raised here, on all ranks alike.
        """
        self.saved()  # the memory that is copied into is read until then
        self.at("snapshot")
        began = time.perf_counter()
        snapshot = self._snapshot()
        if snapshot is None or self.saver is None:
            return
        self.saver.save(
            snapshot,
            is_best=self.state.best_step == self.state.step,
            retention=self.retention,
            values={int(step): value for step, value in self.state.values.items()},
            stall=time.perf_counter() - began,
        )

    @property
    def retention(self) -> Retention:
        wish = self.recipe.checkpoint
        return Retention(wish.keep_last, 1 if wish.keep_best else 0)

    def saved(self) -> None:
        """Wait until what was handed to `save` is on disk. Collective: its failure is every rank's."""
        self.at("saving" if self.saver is not None else "agreeing")
        on_main(self.engine, self._wait_for_saver)
        self.at("report")

    def _wait_for_saver(self) -> None:
        if self.saver is None:
            return
        self.saver.wait()
        self.stop.leave_time_for(self.saver.seconds)

    def point_best(self) -> None:
        """Make `best` name this step's checkpoint, where it is published."""
        folder = self.store.path_of(self.state.step)
        if folder.is_dir():
            self.store.point("best", folder)

    def note_damage(self, damages: list[Damage]) -> None:
        """Count damaged samples of a batch that is being used, and name them in this rank's log."""
        for damage in damages:
            self.damaged_here[f"{damage.kind} in {damage.shard}"] += 1
            log.warning("damaged sample: %s", damage)

    def _gather_damage(self) -> None:
        """Add what every rank has met since the last save to the state, by kind and shard. Collective."""
        for counts in self.engine.gather_json(dict(self.damaged_here)):
            for kind, count in counts.items():
                self.state.damaged[kind] = self.state.damaged.get(kind, 0) + count
        self.damaged_here.clear()

    def _snapshot(self) -> files.Snapshot | None:
        """Collective: gathers every rank's generators, and tensors that are divided. On rank 0 only."""
        self._gather_damage()
        tensors, plain = rng.get_state()
        generators = self.engine.gather_json({"plain": plain, "tensors": {k: v.tolist() for k, v in tensors.items()}})
        here = self._tensors()
        if not self.engine.is_main:
            return None
        self.state.schedule = self.schedule.state_dict()
        self.state.num_nonfinite = int(self.guard.total.item())
        self.state.num_nonfinite_in_row = int(self.guard.in_row.item())
        model, training = self._copies(here)
        return files.Snapshot(
            step=self.state.step,
            model=model,
            training=training,
            state={"train": self.state.to_json(), "generators": generators},
            recipe=self.recipe.to_yaml(),
            taxonomy=self.datasets.tree.to_json(),
            preprocessing=self.preprocessing.to_json(),
            weights="raw" if self.ema is None else "ema",
        )

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, whole, as they stand. Collective; what counts is on rank 0."""
        here = files.under("optimizer/", self.joined.optimizer_tensors())
        here |= files.under("model/", self.joined.weights())
        if self.ema is not None:
            here |= files.under("ema/", self.joined.gathered(self.ema.state_dict()))
        if self.joined.scale is not None:
            here |= files.under("scale/", self.joined.scale.state_dict())
        return here

    def _copies(self, here: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the weights to use, what going on needs), in host memory, where they stay until the next call."""
        copies = self.host.copies(here)
        own = files.with_prefix(copies, "model/")
        if self.ema is None:
            return own, {name: copy for name, copy in copies.items() if not name.startswith("model/")}
        return {**own, **{name: copies[f"ema/{name}"] for name in self.ema.average}}, copies


def load_model(model: nn.Module, folder: Path, tree_json: Any) -> None:
    """Load model.safetensors strictly; CheckpointError when the checkpoint is of another tree or model."""
    _check_tree(files.read_json(folder / files.TAXONOMY), tree_json, folder)
    _load_strictly(model.load_state_dict, files.read_tensors(folder / files.MODEL), folder)


def _check_tree(found: Any, wanted: Any, folder: Path) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{folder} was trained on another class tree; give out=... for a new run, "
            f"or model.weights={folder} to start from it"
        )


def _load_strictly(load: Callable[[dict[str, Tensor]], object], tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        load(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit this model: {' '.join(str(error).split())[:300]}") from None


_STRANGE = (KeyError, IndexError, TypeError, ValueError, AttributeError)  # what a foreign state makes its readers raise


def restore(job: Job, folder: Path, *, allow_inexact: bool) -> TrainState:
    """Put a checkpoint back into a freshly built job, and return its plain state. Collective.

    Rank 0 reads and tells: ranks that see other files, or none, still go on from the same bytes. With another number of
    ranks the generators start anew, which is exact as long as nothing draws from them (dropout and drop path at 0).
    CheckpointError for what cannot be restored, unless `allow_inexact`.
    """
    read = _Files(job.engine, folder)
    weights = _read_weights(job, read)
    everywhere(job.engine, lambda: _load_strictly(job.model.load_state_dict, weights, folder))
    try:
        return _restore_training(job, read)
    except (*_STRANGE, VitdistError) as error:
        if not allow_inexact and isinstance(error, FailedElsewhere):
            raise FailedElsewhere(CheckpointError.exit_code, error.rank, str(error)) from None
        if not allow_inexact:
            raise CheckpointError(
                f"{folder} cannot be restored exactly: {error}; --allow-inexact-resume goes on from its weights"
            ) from None
        log.warning("%s is not restored exactly (%s); going on from its weights, as allowed", folder, error)
        return _only_weights(job, read, weights)


def take_weights(job: Job, folder: Path) -> None:
    """Put a checkpoint's weights into the joined model, as rank 0 reads them. Collective."""
    weights = _read_weights(job, _Files(job.engine, folder))
    everywhere(job.engine, lambda: _load_strictly(job.joined.load, weights, folder))


def _read_weights(job: Job, read: _Files) -> dict[str, Tensor]:
    weights = read.tensors(files.MODEL)
    _check_tree(read.json(files.TAXONOMY), job.datasets.tree.to_json(), read.folder)
    return weights


def _restore_training(job: Job, read: _Files) -> TrainState:
    """All that only going on needs; raises whatever a damaged or foreign state makes it raise, on all ranks."""
    record = read.json(files.STATE)
    state = TrainState.from_json(record["train"])
    if state.step != read.manifest()["step"]:
        raise CheckpointError(f"state.json is of step {state.step}, the manifest of another")
    training = read.tensors(files.TRAINING)
    everywhere(job.engine, lambda: _take_up(job, state, record["generators"], training, read.folder))
    return state


def _take_up(job: Job, state: TrainState, generators: Any, training: dict[str, Tensor], folder: Path) -> None:
    if job.ema is not None:
        _load_strictly(job.model.load_state_dict, files.with_prefix(training, "model/"), folder)
        job.ema.load_state_dict(files.with_prefix(training, "ema/"))
    files.load_optimizer(job.optimizer, files.with_prefix(training, "optimizer/"))
    job.loss_scale = files.with_prefix(training, "scale/")
    job.schedule.load_state_dict(state.schedule)
    if state.world == job.engine.world:
        _set_generators(generators[job.engine.rank])
    else:
        log.info(
            "a checkpoint of %d ranks goes on with %d: random generators start anew", state.world, job.engine.world
        )


def _only_weights(job: Job, read: _Files, weights: dict[str, Tensor]) -> TrainState:
    """Going on without the rest: a new optimizer and schedule, an average that starts from the weights."""
    job.optimizer.state.clear()
    _load_strictly(job.model.load_state_dict, weights, read.folder)
    if job.ema is not None:
        job.ema = ModelEMA(job.model, job.ema.decay, warmup=job.ema.warmup)
    step = read.manifest()["step"]
    return TrainState(step=step, num_threads=job.state.num_threads, world=job.engine.world, inexact=True)


class _Files:
    """A checkpoint's files as rank 0 reads them, on every rank. Each method is collective."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self.folder = engine, folder

    def json(self, name: str) -> Any:
        return on_main(self._engine, lambda: files.read_json(self.folder / name))

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = on_main(self._engine, lambda: read_manifest(self.folder))
        return found

    def tensors(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        on_main(self._engine, lambda: found.update(files.read_tensors(self.folder / name)))
        return self._engine.tensors_from_main(found)


def _set_generators(saved: Any) -> None:
    tensors = {
        name: torch.tensor(values, dtype=torch.int64 if name in ("numpy", "python") else torch.uint8)
        for name, values in saved["tensors"].items()
    }
    rng.set_state(tensors, saved["plain"])
