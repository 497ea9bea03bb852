"""One training from its recipe to its report: take the folder, build the parts, train, test, and say how it ended."""

from __future__ import annotations

import contextlib
import gc
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitdist import logs
from vitdist.errors import LostError, OwnLoss, RecipeError, Stopped, UsageError, VitdistError
from vitdist.recipe.schema import Recipe
from vitdist.runtime.agree import FailedElsewhere, everywhere, on_main
from vitdist.runtime.board import Word
from vitdist.runtime.engine import Engine, set_threads
from vitdist.runtime.failures import Exit, classify, one_line
from vitdist.runtime.faults import Faults
from vitdist.runtime.launcher import check_launcher
from vitdist.runtime.lock import RunLock
from vitdist.runtime.ranks import Ranks, discover
from vitdist.runtime.stop import Reason, StopFlag
from vitdist.runtime.watch import START_SECONDS, Watch
from vitdist.runtime.workers import end_workers, lost_worker
from vitdist.training import folder
from vitdist.training.build import batch_split, build_job, introduce
from vitdist.training.datasets import Datasets, check_alike, open_datasets
from vitdist.training.finish import finish
from vitdist.training.folder import Start
from vitdist.training.job import Job
from vitdist.training.loop import End, train
from vitdist.training.rollback import BlownUp, roll_back

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
        raise UsageError(
            f"--debug is the single-device mode, but {ranks.world} ranks were started; leave the launcher out"
        )
    check_launcher(recipe)
    batch_split(recipe, ranks.world)  # refused before anything is touched
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
        timeout_seconds=max(START_SECONDS, recipe.parallel.timeout.seconds),  # `Job.arm` shortens it
        deterministic=recipe.train.deterministic,
        tf32=recipe.train.tf32,
    )
    watch = Watch(ranks, timeout=recipe.parallel.timeout.seconds)
    return _Run(recipe, options, ranks, engine, stop, watch).go()


class _Run:
    """The life of one start: what is held while it lasts, and let go however it ends."""

    def __init__(
        self, recipe: Recipe, options: Options, ranks: Ranks, engine: Engine, stop: StopFlag, watch: Watch
    ) -> None:
        self.recipe, self.options, self.ranks, self.engine, self.stop = recipe, options, ranks, engine, stop
        self.watch = watch
        self.log_file: Path | None = None
        self.origin = ranks.rank  # where the failure began
        self.ended = False
        self.run_dir = Path(recipe.out)
        self.lock: RunLock | None = None
        self.start: Start | None = None
        self.job: Job | None = None

    def go(self) -> int:
        code = 1
        self.watch.on_abort = self._abandon
        self.watch.start()
        try:
            ending = self._train_and_test()
            code = ending.code
            return self._leave(ending)
        except Exception as error:  # whatever it is: the others hear of it, and the folder says how it ended
            failure = self._understand(lost_worker(error))
            code = failure.exit_code
            self._leave(self._failed(failure))
            raise failure from error
        finally:
            self._let_go(code)

    def _train_and_test(self) -> Exit:
        faults = Faults(self.ranks.rank)
        datasets = everywhere(self.engine, lambda: open_datasets(self.recipe))
        check_alike(self.engine, datasets.index)
        self.start = self._take_folder(datasets)
        faults.attempt = self.start.attempt
        self.job = self._build(datasets, faults, self.start)
        if self.engine.is_main:
            introduce(self.job, self.start)
        end, reason = self._train(datasets, faults, self.start)
        job = self.job
        assert job is not None
        if end is End.STOPPED:
            log.info("stopped on request (%s) at step %d; start again to go on", reason.name.lower(), job.state.step)
            return self._exit(Stopped.exit_code, reason.name.lower(), reason)
        self.watch.at("end", job.state.step)
        finish(job)
        return self._exit(0, "done")

    def _build(self, datasets: Datasets, faults: Faults, start: Start) -> Job:
        return build_job(
            self.recipe, self.engine, datasets, start,
            stop=self.stop, faults=faults, lock=self.lock, watch=self.watch,
            debug=self.options.debug, allow_inexact=self.options.allow_inexact,
        )  # fmt: skip

    def _train(self, datasets: Datasets, faults: Faults, start: Start) -> tuple[End, Reason]:
        """To the end or a stop, over as many rollbacks as the recipe allows: each is a resume within the process."""
        while True:
            assert self.job is not None
            try:
                return train(self.job)
            except BlownUp as error:
                start = replace(start, checkpoint=roll_back(self.job, error))
            self.job = None
            gc.collect()  # the old model goes before the new one comes
            self.job = self._build(datasets, faults, start)

    def _take_folder(self, datasets: Datasets) -> Start:
        """Collective: rank 0 takes the lock and decides; all hear where the run starts."""

        def take() -> dict[str, Any]:
            self.lock = RunLock(self.run_dir)
            try:
                start = folder.take(self.recipe, self.lock, resume=self.options.resume, data_hash=datasets.index.hash)
            except BaseException:
                self.lock = None  # not ours: nothing of this start may be written into the folder
                raise
            return {"checkpoint": start.checkpoint, "attempt": start.attempt, "notes": start.notes}

        start = Start(**on_main(self.engine, take))
        self.log_file = logs.start(self.run_dir, self.ranks.rank)
        if self.log_file is not None:
            self.watch.log_to(self.log_file)
        for note in start.notes:
            log.warning("%s", note)
        return start

    def _understand(self, error: Exception) -> VitdistError:
        """The error to end with: a lost peer's own word where it left one, and the first to fail speaks for all."""
        failure = classify(error)
        if failure.exit_code == VitdistError.exit_code:
            failure.log = self.log_file
        logs.only_to_file(log, f"failed at step {self._step()}", error)
        if isinstance(failure, FailedElsewhere):
            self.watch.leaving(failure.exit_code)
            return failure
        by_peer = isinstance(failure, LostError) and not isinstance(failure, OwnLoss) and self.engine.world > 1
        if by_peer:
            word = self.watch.explain(one_line(failure))
        else:
            word = self.watch.announce(failure.exit_code, self._named(failure))
        if word.teller != self.ranks.rank:
            return FailedElsewhere(word.code, word.rank, word.message)
        self.origin = word.rank
        failure.args = failure.args if isinstance(failure, RecipeError) else (word.message,)
        return failure

    def _named(self, failure: VitdistError) -> str:
        """The message, with the rank where the failure is one rank's own; what all find alike needs none."""
        text = one_line(failure)
        own = failure.exit_code in (1, 4, 6, 7) and not text.startswith("rank ")
        return f"rank {self.ranks.rank}: {text}" if own and self.job is not None else text

    def _step(self) -> int:
        return self.job.state.step if self.job is not None else 0

    def _exit(self, code: int, word: str, reason: Reason = Reason.NONE, *, rank: int = 0, message: str = "") -> Exit:
        attempt = self.start.attempt if self.start is not None else 0
        lost = code == LostError.exit_code
        return Exit(code, "lost" if lost else word, self._step(), rank, attempt, reason.requeue or lost, message)

    def _failed(self, failure: VitdistError) -> Exit:
        rank = failure.rank if isinstance(failure, FailedElsewhere) else self.origin
        return self._exit(failure.exit_code, "error", rank=rank, message=one_line(failure))

    def _leave(self, ending: Exit) -> int:
        """exit.json, written once, and only by the process that holds the lock."""
        if self.lock is not None and not self.ended and self.lock.is_held():
            self.ended = True
            ending.write(self.run_dir)
        return ending.code

    def _abandon(self, word: Word) -> None:
        """What the watch still does for a main thread that hangs."""
        self._wait_for_saver(seconds=5.0)
        self._leave(self._exit(word.code, "error", rank=word.rank, message=word.message))
        if self.lock is not None:
            self.lock.release()

    def _wait_for_saver(self, seconds: float) -> None:
        """A checkpoint that is nearly written is worth a moment; its own failure no longer matters."""
        if self.job is not None and self.job.saver is not None:
            with contextlib.suppress(Exception):
                self.job.saver.wait(seconds)

    def _let_go(self, code: int) -> None:
        in_order = code in (0, Stopped.exit_code)
        self.watch.leaving(code)
        self._wait_for_saver(seconds=20.0)
        if self.job is not None and hasattr(self.job, "journal"):
            self.job.journal.close(code)
        if self.lock is not None:
            self.lock.release()
        end_workers()
        if in_order:
            self.engine.close()
        else:
            self.watch.farewell()
        self.watch.close()
