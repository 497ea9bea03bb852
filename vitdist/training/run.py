"""One training from its recipe to its report: take the folder, build the parts, train, test, and say how it ended."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdist import logs
from vitdist.errors import LostError, Stopped, UsageError, VitdistError
from vitdist.recipe.schema import Recipe
from vitdist.runtime.agree import FailedElsewhere, everywhere, on_main
from vitdist.runtime.engine import Engine, set_threads
from vitdist.runtime.failures import Exit, classify, one_line
from vitdist.runtime.faults import Faults
from vitdist.runtime.lock import RunLock
from vitdist.runtime.ranks import Ranks, discover
from vitdist.runtime.stop import Reason, StopFlag
from vitdist.training import folder
from vitdist.training.build import batch_split, build_job, introduce
from vitdist.training.datasets import Datasets, open_datasets
from vitdist.training.finish import finish
from vitdist.training.folder import Start
from vitdist.training.job import Job
from vitdist.training.loop import End, train

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
        timeout_seconds=recipe.parallel.timeout.seconds,
        deterministic=recipe.train.deterministic,
    )
    return _Run(recipe, options, ranks, engine, stop).go()


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
        self.job = job = build_job(
            self.recipe, self.engine, datasets, self.start,
            stop=self.stop, faults=faults, lock=self.lock,
            debug=self.options.debug, allow_inexact=self.options.allow_inexact,
        )  # fmt: skip
        if self.engine.is_main:
            introduce(job, self.start)
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

