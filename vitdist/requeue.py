"""What slurm/train.sbatch asks before a start and after an end: `python -m vitdist.requeue begin|decide`.

`begin RECIPE [key=value ...]` checks the command line and prints, one a line, the run's folder and the words that this
start of the job adds to `vitdist train`. `decide RUN_DIR CODE` prints whether the job should be queued again and why;
its exit code is 0 for yes, 1 for no. What it goes by is kept in RUN_DIR/requeue.jsonl: a line a start, a line an end.
No torch: answers come in well under a second, and work while a dying job has only seconds left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdist.checkpoint.store import Store
from vitdist.errors import LostError, Stopped, UsageError, VitdistError, lines
from vitdist.runtime.failures import EXIT_FILE

HISTORY = "requeue.jsonl"
MAX_LOST_IN_ROW = 3
MAX_FRUITLESS = 3
ON_REQUEST = ("signal", "time_limit")
_ENVIRONMENT = "environment.json"


@dataclass(frozen=True)
class Task:
    """This start of a Slurm job, from its environment."""

    job: str
    restart: int
    array_task: str | None

    @staticmethod
    def of(environment: Mapping[str, str] = os.environ) -> Task:
        return Task(
            environment.get("SLURM_JOB_ID", ""),
            int(environment.get("SLURM_RESTART_COUNT") or 0),
            environment.get("SLURM_ARRAY_TASK_ID"),
        )


@dataclass(frozen=True)
class Attempt:
    """One start of a job and how it ended: `reason` is exit.json's, `preempted`, or `gone` when nobody could say."""

    start: int | None  # the newest checkpoint's step at the start
    reason: str


@dataclass(frozen=True)
class Decision:
    requeue: bool
    why: str

    def __str__(self) -> str:
        return f"{'requeue' if self.requeue else 'no requeue'}: {self.why}"


# ---- before a start


def begin(words: Sequence[str], task: Task) -> tuple[Path, list[str]]:
    """The run's folder and the words to add to the command line; UsageError when this job has tried often enough."""
    args = _command_line(words)
    from vitdist.recipe.load import load_recipe
    from vitdist.recipe.shipped import find_recipe

    recipe = load_recipe(find_recipe(args.recipe), args.overrides)
    run_dir, extra = Path(recipe.out), []
    if task.array_task is not None:
        if any(word.startswith("seed=") for word in args.overrides):
            raise UsageError("each task of a job array gets its number as seed; leave seed=... out, or --array")
        run_dir /= f"seed-{task.array_task}"
        extra = [f"seed={task.array_task}", f"out={run_dir}"]
    if task.restart and args.resume != "auto" and _started_training(run_dir, task):
        extra += ["--resume", "auto"]  # --resume never or PATH was meant for the first start
    _refuse_vain(run_dir, task)
    _note(run_dir, task, {"event": "start", "checkpoint": _newest(run_dir), "exit": _stamp(run_dir)})
    return run_dir, extra


def _command_line(words: Sequence[str]) -> argparse.Namespace:
    """The same words that `vitdist train` takes."""
    parser = argparse.ArgumentParser(prog="train.sbatch", usage="sbatch [options] train.sbatch RECIPE [key=value ...]")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--allow-inexact-resume", action="store_true")
    args = parser.parse_intermixed_args(words)
    if strange := [word for word in args.overrides if "=" not in word]:
        raise UsageError(f"{' '.join(strange)}: options of sbatch stand before the script, key=value behind the recipe")
    return args


def _started_training(run_dir: Path, task: Task) -> bool:
    """Whether an earlier start of this job got as far as taking the folder."""
    starts = _json(run_dir / _ENVIRONMENT).get("starts", [])
    return any(start.get("job") == task.job for start in starts)


def _refuse_vain(run_dir: Path, task: Task) -> None:
    """Slurm queues a job again by itself when a node fails: it must not do so for ever."""
    attempts = _attempts(run_dir, task.job)
    if task.restart and _num_fruitless(attempts, _newest(run_dir)) >= MAX_FRUITLESS:
        raise UsageError(
            f"{MAX_FRUITLESS} starts of job {task.job} ended without a new checkpoint in {run_dir}; see its logs, "
            "then submit it anew"
        )


# ---- after an end


def decide(run_dir: Path, code: int, task: Task, *, signalled: bool = False, preempted: bool = False) -> Decision:
    """Whether a job whose step ended with `code` is queued again; noted in the run's folder."""
    reason, wanted, where = _ending(run_dir, code, task, signalled=signalled)
    if preempted and wanted:  # also when TERM met ranks that were still starting and just died of it
        reason = "preempted"
    attempts = [*_attempts(run_dir, task.job)[:-1], Attempt(_start_checkpoint(run_dir, task), reason)]
    decision = _judge(attempts, _newest(run_dir), wanted, where)
    end = {"event": "end", "code": code, "reason": reason, "requeue": decision.requeue, "why": decision.why}
    _note(run_dir, task, end)
    return decision


def _judge(attempts: list[Attempt], newest: int | None, wanted: bool, where: str) -> Decision:
    reason = attempts[-1].reason
    if not wanted:
        return Decision(False, where)
    if reason == "preempted":
        return Decision(True, where)
    lost = _trailing(attempts, "lost")
    if lost > MAX_LOST_IN_ROW:
        return Decision(False, f"{where}; {MAX_LOST_IN_ROW} requeues in a row ended so, see the logs")
    fruitless = _num_fruitless(attempts, newest)
    if fruitless >= MAX_FRUITLESS:
        hint = "is the time limit too short to start in?" if reason in ON_REQUEST else "see the logs"
        return Decision(False, f"{where}; {fruitless} starts without a new checkpoint, {hint}")
    return Decision(True, where)


def _ending(run_dir: Path, code: int, task: Task, *, signalled: bool) -> tuple[str, bool, str]:
    """(reason, whether to go on, words) from exit.json; from the step's exit code where this start wrote none."""
    said = _json(run_dir / EXIT_FILE)
    if said and _stamp(run_dir) != _last(run_dir, task, "start").get("exit"):
        reason = str(said.get("reason"))
        message = f", {said['message']}" if said.get("message") else ""
        return reason, bool(said.get("requeue")), f"{reason} at step {said.get('step')}{message}"
    if code == 0:
        return "done", False, "done"
    if signalled or code == Stopped.exit_code:
        return "signal", True, "stopped before the training began"
    if code == LostError.exit_code or code >= 128:
        return "lost", True, f"exit code {code} and no word from rank 0"
    return "error", False, f"exit code {code} before the training began"


def _num_fruitless(attempts: list[Attempt], newest: int | None) -> int:
    """Starts that made no newer checkpoint than the one they found; preempted ones do not count."""
    return sum(attempt.start == newest and attempt.reason != "preempted" for attempt in attempts)


def _trailing(attempts: list[Attempt], reason: str) -> int:
    """How many of the last attempts ended so, in a row."""
    number = 0
    for attempt in reversed(attempts):
        if attempt.reason != reason:
            break
        number += 1
    return number


# ---- the history


def _note(run_dir: Path, task: Task, event: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"job": task.job, "restart": task.restart, **event}) + "\n")


def _events(run_dir: Path, job: str) -> list[dict[str, Any]]:
    """The job's events; a line that a full disk cut is passed over."""
    events = []
    try:
        text = (run_dir / HISTORY).read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("job") == job:
            events.append(event)
    return events


def _attempts(run_dir: Path, job: str) -> list[Attempt]:
    """The job's starts so far, each with its end; the last one's may be outstanding."""
    attempts: list[Attempt] = []
    for event in _events(run_dir, job):
        if event["event"] == "start":
            if event["restart"] == 0:
                attempts.clear()  # a cluster set up anew counts its jobs from 1
            attempts.append(Attempt(event.get("checkpoint"), "gone"))
        elif attempts:
            attempts[-1] = Attempt(attempts[-1].start, event["reason"])
    return attempts


def _last(run_dir: Path, task: Task, kind: str) -> dict[str, Any]:
    return next((event for event in reversed(_events(run_dir, task.job)) if event["event"] == kind), {})


def _start_checkpoint(run_dir: Path, task: Task) -> int | None:
    return _last(run_dir, task, "start").get("checkpoint")


def _newest(run_dir: Path) -> int | None:
    """The step of the newest published checkpoint; it is not verified, that is the training's affair."""
    published = Store(run_dir).published()
    return published[-1][0] if published else None


def _stamp(run_dir: Path) -> int | None:
    """Tells one exit.json from the next."""
    try:
        return (run_dir / EXIT_FILE).stat().st_mtime_ns
    except OSError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


# ---- the command


def main(arguments: Sequence[str]) -> int:
    """`begin` or `decide`; 0 yes, 1 no, else the exit code of a mistake in the command line."""
    try:
        if arguments[:1] == ["begin"]:
            run_dir, extra = begin(arguments[1:], Task.of())
            print(run_dir, *extra, sep="\n")
            return 0
        parser = argparse.ArgumentParser(prog="python -m vitdist.requeue", description=__doc__)
        parser.add_argument("command", choices=["begin", "decide"])
        parser.add_argument("run_dir", type=Path)
        parser.add_argument("code", type=int)
        parser.add_argument("--signalled", action="store_true", help="the batch script got a signal")
        parser.add_argument("--preempted", action="store_true", help="Slurm says that the job is preempted")
        args = parser.parse_args(arguments)
        decision = decide(args.run_dir, args.code, Task.of(), signalled=args.signalled, preempted=args.preempted)
        print(decision)
        return 0 if decision.requeue else 1
    except VitdistError as error:
        for line in lines(error):
            print(f"vitdist: {line}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
