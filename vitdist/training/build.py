"""Putting a training together: every part built from the recipe, and restored where the run goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from vitdist.checkpoint.host import HostMemory
from vitdist.checkpoint.saver import Saver, free_bytes, no_room
from vitdist.checkpoint.state import num_bytes
from vitdist.checkpoint.store import Store
from vitdist.durable import write_whole
from vitdist.errors import ResourceError
from vitdist.metrics_log import MetricsLog, read_metrics
from vitdist.progress import Progress
from vitdist.recipe.batch import BatchSplit, split_batch
from vitdist.recipe.learning_rate import explained
from vitdist.recipe.schema import Recipe
from vitdist.runtime import rng
from vitdist.runtime.agree import everywhere, on_main
from vitdist.runtime.engine import Engine, set_threads
from vitdist.runtime.faults import Faults
from vitdist.runtime.lock import RunLock
from vitdist.runtime.shards import num_elements
from vitdist.runtime.stop import StopFlag
from vitdist.runtime.watch import Watch
from vitdist.tracking import WandbTracker
from vitdist.training import assemble, folder, micro_batch
from vitdist.training.datasets import Datasets
from vitdist.training.ema import ModelEMA
from vitdist.training.folder import Start
from vitdist.training.guard import NonFiniteGuard
from vitdist.training.job import Job, restore
from vitdist.training.journal import Journal, cut_samples
from vitdist.training.probe import start_from_probe
from vitdist.training.state import TrainState

log = logging.getLogger(__name__)


def batch_split(recipe: Recipe, world: int) -> BatchSplit:
    """A rank's micro-batches; RecipeError with the numbers when the global batch does not divide."""
    mixing = recipe.augment.mixup > 0 or recipe.augment.cutmix > 0
    return split_batch(recipe.train.global_batch_size, world, recipe.train.micro_batch_size, mixing=mixing)


def build_job(
    recipe: Recipe,
    engine: Engine,
    datasets: Datasets,
    start: Start,
    *,
    stop: StopFlag,
    faults: Faults,
    lock: RunLock | None,
    watch: Watch,
    debug: bool,
    allow_inexact: bool,
) -> Job:
    """All parts of a training, ready to step. Collective; `lock` is held on rank 0."""
    checkpoint = None if start.checkpoint is None else Path(start.checkpoint)
    assemble.check_monitors(recipe, datasets.tree)
    plan = assemble.build_plan(recipe, datasets)
    max_steps = recipe.train.max_duration.steps(plan.steps_per_epoch)
    rng.seed_everything(recipe.seed, 0)  # the same first weights on every rank
    model = everywhere(
        engine, lambda: assemble.build_model(recipe, datasets.tree, weights=None if checkpoint is None else "none")
    ).to(_home(recipe, engine))
    store = Store(Path(recipe.out), mark=faults.point)
    job = Job(
        recipe=recipe,
        run_dir=Path(recipe.out),
        engine=engine,
        datasets=datasets,
        plan=plan,
        batch=batch_split(recipe, engine.world),
        preprocessing=assemble.preprocessing_of(recipe, model),
        model=model,
        optimizer=assemble.build_optimizer_of(recipe, model),
        schedule=assemble.build_schedule_of(recipe, plan.steps_per_epoch, max_steps),
        state=TrainState(num_threads=torch.get_num_threads(), world=engine.world),
        max_steps=max_steps,
        num_workers=assemble.num_workers_of(recipe, engine.ranks.local_world, debug=debug),
        stop=stop,
        faults=faults,
        watch=watch,
        store=store,
        lock=lock,
        saver=None if lock is None else Saver(store, may=lock.check),
    )
    if checkpoint is None:
        _begin(job)
    else:
        _go_on(job, checkpoint, allow_inexact)
    on_main(engine, lambda: _check_room(job))
    _connect(job)
    return job


def _home(recipe: Recipe, engine: Engine) -> torch.device:
    """Where a model stands until the ranks are joined: what will be divided is whole in host memory before."""
    return engine.device if recipe.parallel.strategy == "ddp" else torch.device("cpu")


def _check_room(job: Job) -> None:
    """ResourceError before the first step when the volume has no room for the checkpoints that retention keeps.

    Memory for them is taken here too.
    """
    weights = num_bytes(job.model.state_dict())
    trained = num_bytes({name: p for name, p in job.model.named_parameters() if p.requires_grad})
    moments = trained * (1 if job.recipe.optimizer.name == "sgd" else 2)
    wish = job.recipe.checkpoint
    kept = wish.keep_last + (1 if wish.keep_best else 0) + 1  # one more is staged before an old one goes
    needed = (weights * (1 if job.ema is None else 3) + moments) * max(1, kept - len(job.store.published()))
    if free_bytes(job.store.folder) < needed:
        raise ResourceError(no_room(job.store.folder, needed))
    job.host = HostMemory(pinned=job.engine.device.type == "cuda")
    job.host.reserve(weights * (1 if job.ema is None else 2) + moments)


def _begin(job: Job) -> None:
    """A first start: the probe, the average, and generators that differ by rank. Collective."""
    rng.seed_everything(job.recipe.seed, job.engine.rank)
    if job.recipe.model.head_init == "probe":
        job.model.to(job.engine.device)
        start_from_probe(
            job.engine, job.recipe, job.model, job.datasets, job.preprocessing, num_workers=job.num_workers
        )
        job.model.to(_home(job.recipe, job.engine))
    job.ema = _average(job)


def _go_on(job: Job, checkpoint: Path, allow_inexact: bool) -> None:
    """A later start: everything as the checkpoint has it. Collective."""
    job.ema = _average(job)
    rng.seed_everything(job.recipe.seed, job.engine.rank)
    job.at("resume")
    job.state = restore(job, checkpoint, allow_inexact=allow_inexact)
    job.first_step = job.state.step + 1
    if job.state.world == job.engine.world:
        set_threads(job.engine.ranks, job.state.num_threads)
    job.state.world = job.engine.world
    job.num_damaged = job.state.num_damaged
    if job.engine.is_main:
        _point_back(job)
    log.info("resumed from step %d (%s)", job.state.step, checkpoint)


def _point_back(job: Job) -> None:
    """`best` names what was the best at the step that is gone on from, not what a given-up future found."""
    best = job.state.best_step
    if best is not None and job.store.path_of(best).is_dir() and job.store.pointed("best") != job.store.path_of(best):
        job.store.point("best", job.store.path_of(best))


def _average(job: Job) -> ModelEMA | None:
    wish = job.recipe.ema
    return None if wish.decay is None else ModelEMA(job.model, wish.decay, warmup=wish.warmup)


def _connect(job: Job) -> None:
    """Join the ranks' models, and open what is written while training. Collective."""
    state, recipe = job.state, job.recipe
    job.num_nonfinite = state.num_nonfinite, state.num_nonfinite_in_row
    job.guard = NonFiniteGuard(
        recipe.train.max_nonfinite_steps,
        job.engine.device,
        total=state.num_nonfinite,
        in_row=state.num_nonfinite_in_row,
    )
    if recipe.train.compile:
        job.model.compile()
    if recipe.train.micro_batch_size == "auto":
        job.batch = micro_batch.settle(job)
    job.joined = job.engine.join(
        job.model,
        job.optimizer,
        strategy=recipe.parallel.strategy,
        offload=recipe.parallel.offload == "cpu",
        clip=recipe.optimizer.clip_grad_norm,
        micro_batch_size=job.batch.micro_batch_size,
        accumulation=job.batch.accumulation,
    )
    if job.ema is not None:
        job.ema.move(job.joined.divided(job.ema.average))
    if job.joined.scale is not None and job.loss_scale:
        job.joined.scale.load_state_dict(job.loss_scale)
    # `cold` is the tests' negative control
    if recipe.parallel.strategy == "ddp" and not job.faults.asked("cold", "warm-up", 0):
        job.engine.warm_up(job.joined.wrapped, job.preprocessing.image_size)
    job.journal = _open_journal(job)


def _open_journal(job: Job) -> Journal:
    """Cut what a resumed run will do again, then open everything for appending. Collective."""
    recipe, state = job.recipe, job.state
    metrics = wandb = progress = None
    evaluated: set[int] = set()
    if job.engine.is_main:
        metrics = MetricsLog(job.run_dir / "metrics.jsonl")
        metrics.truncate_to(state.step)
        evaluated = {line["step"] for line in read_metrics(metrics.path) if "val/count" in line}
        cut_samples(job.run_dir, state.step)
        wandb = WandbTracker(
            recipe.tracking.wandb,
            job.run_dir,
            project=recipe.tracking.project,
            name=recipe.name,
            run_id=state.tracking_id or None,
            config=recipe.flat(),
        )
        state.tracking_id = wandb.run_id
        progress = Progress(job.max_steps, start=state.step)
    job.engine.barrier()  # the lists of samples are cut before anybody appends to them
    return Journal(
        job.run_dir,
        rank=job.engine.rank,
        metrics=metrics,
        wandb=wandb,
        progress=progress,
        log_samples=recipe.tracking.log_samples,
        evaluated=evaluated,
    )


def introduce(job: Job, start: Start) -> None:
    """Write down what runs here, and name the run in the log. Rank 0 only."""
    record = job.model.backbone.record
    for selection in (job.datasets.train, job.datasets.val):
        if selection is not None:
            text = json.dumps(selection.describe(), indent=1) + "\n"
            write_whole(job.run_dir / "splits" / f"{selection.name}.json", text)
    known = folder.read_environment(job.run_dir)
    folder.write_environment(
        job.run_dir,
        start,
        world=job.engine.world,
        num_threads=job.state.num_threads,
        device=str(job.engine.device),
        data={"path": job.recipe.data.path, "hash": job.datasets.index.hash},
        weights=record.to_json() if record is not None else known.get("weights"),
        parameters=sum(num_elements(parameter) for parameter in job.model.parameters()),
    )
    log.info(
        "%s: %d training samples, %d steps of %d = %d rank%s x micro-batch %d x accumulation %d, on %s, seed %d",
        job.run_dir, job.datasets.train.num_samples, job.max_steps, job.plan.global_batch_size,
        job.engine.world, "s" * (job.engine.world > 1), job.batch.micro_batch_size, job.batch.accumulation,
        job.engine.device.type, job.recipe.seed,
    )  # fmt: skip
    if job.recipe.optimizer.lr_scaling != "none":
        log.info("learning rate: %s", explained(job.recipe))
    if record is not None:
        log.info("%s", record)
    if job.joined.config is not None:
        write_whole(job.run_dir / "deepspeed.json", json.dumps(job.joined.config, indent=1) + "\n")
