"""One training from its recipe to its report: take the folder, build the parts, train, test, and say how it ended."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdist import logs
from vitdist.checkpoint.store import Store
from vitdist.errors import LostError, Stopped, UsageError, VitdistError
from vitdist.metrics_log import MetricsLog, read_metrics
from vitdist.progress import Progress
from vitdist.recipe.batch import split_batch
from vitdist.recipe.schema import Recipe
from vitdist.runtime import rng
from vitdist.runtime.agree import FailedElsewhere, everywhere, on_main
from vitdist.runtime.engine import Engine, set_threads
from vitdist.runtime.failures import Exit, classify, one_line
from vitdist.runtime.faults import Faults
from vitdist.runtime.lock import RunLock
from vitdist.runtime.ranks import Ranks, discover
from vitdist.runtime.stop import Reason, StopFlag
from vitdist.tracking import WandbTracker
from vitdist.training import assemble, folder
from vitdist.training.datasets import Datasets, open_datasets
from vitdist.training.ema import ModelEMA
from vitdist.training.finish import finish
from vitdist.training.folder import Start
from vitdist.training.guard import NonFiniteGuard
from vitdist.training.job import Job, restore
from vitdist.training.journal import Journal, cut_samples
from vitdist.training.loop import End, train
from vitdist.training.probe import start_from_probe
from vitdist.training.state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe."""

    resume: str = "auto"
    allow_inexact: bool = False
    debug: bool = False


def run(recipe: Recipe, options: Options) -> int:
    """Train a recipe; 0 when done, 75 when stopped and resumable. Every rank calls this, alone or under a launcher."""
    ranks = discover()
    if options.debug and ranks.world > 1:
        raise UsageError(f"--debug is the single-device mode, but {ranks.world} ranks were started; leave the launcher out")
    split_batch(
        recipe.train.global_batch_size, ranks.world, recipe.train.micro_batch_size, mixing=_mixes(recipe)
    )  # refused before anything is touched
    stop = StopFlag(
        Path(recipe.out),
        max_seconds=recipe.train.max_time.seconds if recipe.train.max_time else None,
        is_main=ranks.is_main,
    )
    stop.install()
    set_threads(ranks)
    engine = Engine(
        ranks,
        precision=recipe.train.precision,
        timeout_seconds=recipe.parallel.timeout.seconds,
        deterministic=recipe.train.deterministic,
    )
    return _Run(recipe, options, ranks, engine, stop).go()


def _mixes(recipe: Recipe) -> bool:
    return recipe.augment.mixup > 0 or recipe.augment.cutmix > 0


class _Run:
    """The life of one start: what is held while it lasts, and let go however it ends."""

    def __init__(self, recipe: Recipe, options: Options, ranks: Ranks, engine: Engine, stop: StopFlag) -> None:
        self.recipe, self.options, self.ranks, self.engine, self.stop = recipe, options, ranks, engine, stop
        self.run_dir = Path(recipe.out)
        self.lock: RunLock | None = None
        self.start: Start | None = None
        self.job: Job | None = None

    def go(self) -> int:
        code = 1
        try:
            ending = self._train_and_test()
            code = ending.code
            return self._leave(ending)
        except Exception as error:  # whatever it is: the others hear of it, and the folder says how it ended
            failure = self._understand(error)
            code = failure.exit_code
            self._leave(self._exit(failure.exit_code, "error", failure=failure))
            raise failure from error
        finally:
            self._let_go(code)

    def _train_and_test(self) -> Exit:
        faults = Faults(self.ranks.rank)
        datasets = everywhere(self.engine, lambda: open_datasets(self.recipe))
        self.start = self._take_folder(datasets)
        faults.attempt = self.start.attempt
        self.job = job = self._build(datasets, faults)
        self._say_hello(job)
        end, reason = train(job)
        if end is End.STOPPED:
            log.info("stopped on request (%s) at step %d; start again to go on", reason.name.lower(), job.state.step)
            return self._exit(Stopped.exit_code, reason.name.lower(), reason)
        finish(job)
        return self._exit(0, "done")

    def _take_folder(self, datasets: Datasets) -> Start:
        """Collective: rank 0 takes the lock and decides; all hear where the run starts."""

        def take() -> dict[str, Any]:
            self.lock = RunLock(self.run_dir)
            try:
                start = folder.take(
                    self.recipe, self.lock, resume=self.options.resume, data_hash=datasets.index.hash
                )
            except BaseException:
                self.lock = None  # not ours: nothing of this start may be written into the folder
                raise
            return {"checkpoint": start.checkpoint, "attempt": start.attempt, "notes": start.notes}

        start = Start(**on_main(self.engine, take))
        logs.start(self.run_dir, self.ranks.rank)
        for note in start.notes:
            log.warning("%s", note)
        return start

    def _build(self, datasets: Datasets, faults: Faults) -> Job:
        """All parts of the training, restored when it goes on. Collective."""
        recipe, engine = self.recipe, self.engine
        assert self.start is not None
        # the same weights on every rank; what is drawn later (dropout) differs by rank
        rng.seed_everything(recipe.seed, 0)
        model = everywhere(engine, lambda: assemble.build_model(
            recipe, datasets.tree, weights="none" if self.start and self.start.checkpoint else None
        )).to(engine.device)  # fmt: skip
        preprocessing = assemble.preprocessing_of(recipe, model)
        plan = assemble.build_plan(recipe, datasets)
        max_steps = recipe.train.max_duration.steps(plan.steps_per_epoch)
        schedule = assemble.build_schedule_of(recipe, plan.steps_per_epoch, max_steps)
        optimizer = assemble.build_optimizer_of(recipe, model)
        num_workers = assemble.num_workers_of(recipe, self.ranks.local_world, debug=self.options.debug)
        ema = None if recipe.ema.decay is None else ModelEMA(model, recipe.ema.decay, warmup=recipe.ema.warmup)
        rng.seed_everything(recipe.seed, engine.rank)
        state = TrainState(num_threads=set_threads(self.ranks), world=engine.world)
        if self.start.checkpoint is not None:
            checkpoint = Path(self.start.checkpoint)
            state = everywhere(engine, lambda: restore(
                checkpoint, model=model, optimizer=optimizer, ema=ema, schedule=schedule,
                tree_json=datasets.tree.to_json(), rank=engine.rank, world=engine.world,
                allow_inexact=self.options.allow_inexact,
            ))  # fmt: skip
            if state.world == engine.world:
                set_threads(self.ranks, state.num_threads)
            state.world = engine.world
        elif recipe.model.head_init == "probe":
            start_from_probe(engine, recipe, model, datasets, preprocessing, num_workers=num_workers)
            ema = None if ema is None else ModelEMA(model, ema.decay, warmup=recipe.ema.warmup)
        if recipe.train.compile:
            model.compile()
        wrapped = engine.prepare(model)
        engine.warm_up(wrapped, preprocessing.image_size)
        guard = NonFiniteGuard(
            recipe.train.max_nonfinite_steps, engine.device, total=state.num_nonfinite, in_row=state.num_nonfinite_in_row
        )
        return Job(
            recipe=recipe,
            run_dir=self.run_dir,
            engine=engine,
            datasets=datasets,
            plan=plan,
            batch=split_batch(
                recipe.train.global_batch_size, engine.world, recipe.train.micro_batch_size, mixing=_mixes(recipe)
            ),
            preprocessing=preprocessing,
            model=model,
            wrapped=wrapped,
            optimizer=optimizer,
            schedule=schedule,
            ema=ema,
            guard=guard,
            state=state,
            max_steps=max_steps,
            num_workers=num_workers,
            stop=self.stop,
            faults=faults,
            journal=self._journal(state, max_steps),
            store=Store(self.run_dir, mark=lambda phase: faults.point(phase, state.step)),
            lock=self.lock,
            num_damaged=state.num_damaged,
        )

    def _journal(self, state: TrainState, max_steps: int) -> Journal:
        recipe, is_main = self.recipe, self.engine.is_main
        metrics = wandb = progress = None
        if is_main:
            metrics = MetricsLog(self.run_dir / "metrics.jsonl")
            metrics.truncate_to(state.step)
            cut_samples(self.run_dir, state.step)
            wandb = WandbTracker(
                recipe.tracking.wandb,
                self.run_dir,
                project=recipe.tracking.project,
                name=recipe.name,
                run_id=state.tracking_id or None,
                config=recipe.flat(),
            )
            state.tracking_id = wandb.run_id
            progress = Progress(max_steps, start=state.step)
        self.engine.barrier()  # the lists of samples are cut before anybody appends to them
        return Journal(
            self.run_dir,
            rank=self.engine.rank,
            metrics=metrics,
            wandb=wandb,
            progress=progress,
            log_samples=recipe.tracking.log_samples,
            evaluated={line["step"] for line in read_metrics(metrics.path) if "val/count" in line} if metrics else set(),
        )

    def _say_hello(self, job: Job) -> None:
        """Write down what runs here, and name the run in the log."""
        if not self.engine.is_main:
            return
        assert self.start is not None
        record = assemble.weights_record(job.model)
        for selection in (job.datasets.train, job.datasets.val):
            if selection is not None:
                text = folder.json.dumps(selection.describe(), indent=1) + "\n"
                folder.write_text(self.run_dir / "splits" / f"{selection.name}.json", text)
        known = folder.read_environment(self.run_dir)
        folder.write_environment(
            self.run_dir,
            self.start,
            world=self.engine.world,
            num_threads=job.state.num_threads,
            device=str(self.engine.device),
            data={"path": self.recipe.data.path, "hash": job.datasets.index.hash},
            weights=record.to_json() if record is not None else known.get("weights"),
            parameters=sum(p.numel() for p in job.model.parameters()),
        )
        log.info(
            "%s: %d training samples, %d steps of %d (%d ranks x %d x %d), %s, seed %d",
            self.run_dir, job.datasets.train.num_samples, job.max_steps, job.plan.global_batch_size,
            self.engine.world, job.batch.micro_batch_size, job.batch.accumulation, self.engine.device, self.recipe.seed,
        )  # fmt: skip
        if record is not None:
            log.info("%s", record)
        if self.start.checkpoint is not None:
            log.info("resumed from step %d (%s)", job.state.step, self.start.checkpoint)

    def _understand(self, error: Exception) -> VitdistError:
        """The error to end with: a lost peer's own word where it left one, and the first to fail speaks for all."""
        failure = classify(error)
        log.debug("failed", exc_info=error)
        if self.engine.world == 1 or isinstance(failure, FailedElsewhere):
            return failure
        said = self.engine.heard_failure()
        if said is None:
            self.engine.announce_failure(failure.exit_code, str(failure))
            said = self.engine.heard_failure()
        if said is not None and said["rank"] != self.engine.rank and isinstance(failure, LostError):
            return FailedElsewhere(said["code"], said["rank"], said["message"])
        return failure

    def _exit(
        self, code: int, word: str, reason: Reason = Reason.NONE, *, failure: VitdistError | None = None
    ) -> Exit:
        rank = failure.rank if isinstance(failure, FailedElsewhere) else self.ranks.rank
        step = self.job.state.step if self.job is not None else 0
        attempt = self.start.attempt if self.start is not None else 0
        requeue = reason.requeue or isinstance(failure, LostError) or code == LostError.exit_code
        word = "lost" if code == LostError.exit_code else word
        return Exit(code, word, step, rank, attempt, requeue, "" if failure is None else one_line(failure))

    def _leave(self, ending: Exit) -> int:
        """exit.json, written only by the process that holds the lock."""
        if self.lock is not None:
            ending.write(self.run_dir)
        return ending.code

    def _let_go(self, code: int) -> None:
        if self.job is not None:
            self.job.journal.close(code)
        if self.lock is not None:
            self.lock.release()
        for worker in multiprocessing.active_children():  # loader workers ignore signals, all but this one
            worker.kill()
        if code in (0, Stopped.exit_code):
            self.engine.close()

