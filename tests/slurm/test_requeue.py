"""The decision to queue a job again (S4), from what a run left; the cluster is not needed for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Recipes
from vitdist.errors import RecipeError, UsageError
from vitdist.requeue import Decision, Task, begin, decide, main

JOB = "77"


class Life:
    """A job's life as the batch script sees it: starts, checkpoints, ends."""

    def __init__(self, recipe: Path, run: Path) -> None:
        self.recipe, self.run, self.restart, self.step = recipe, run, 0, 0

    @property
    def task(self) -> Task:
        return Task(JOB, self.restart, None)

    def start(self) -> None:
        begin([str(self.recipe), f"out={self.run}"], self.task)

    def checkpoint(self) -> None:
        self.step += 10
        (self.run / "checkpoints" / f"step_{self.step:08d}").mkdir(parents=True)

    def exit(self, code: int, reason: str, requeue: bool) -> None:
        """What rank 0 writes."""
        self.run.mkdir(parents=True, exist_ok=True)
        file = self.run / "exit.json"
        before = file.stat().st_mtime_ns if file.exists() else 0
        file.write_text(json.dumps({"code": code, "reason": reason, "step": self.step, "requeue": requeue}))
        os.utime(file, ns=(before + 1, before + 1))

    def end(self, code: int, **flags: bool) -> Decision:
        decision = decide(self.run, code, self.task, **flags)
        self.restart += 1
        return decision


@pytest.fixture
def life(tiny_recipe: Recipes, tmp_path: Path) -> Life:
    return Life(tiny_recipe(), tmp_path / "run")


@pytest.mark.parametrize(
    ("code", "reason", "requeue"),
    [(75, "signal", True), (75, "time_limit", True), (6, "lost", True), (75, "max_time", False),
     (75, "stop_file", False), (0, "done", False), (5, "error", False), (1, "error", False)],
)  # fmt: skip
def test_exit_json_decides(code: int, reason: str, requeue: bool, life: Life) -> None:
    life.start()
    life.checkpoint()
    life.exit(code, reason, requeue)
    decision = life.end(code)
    assert decision.requeue is requeue
    assert f"{reason} at step 10" in str(decision)


@pytest.mark.parametrize(
    ("code", "signalled", "requeue"),
    [(0, False, False), (2, False, False), (4, False, False), (75, False, True), (143, True, True), (138, True, True),
     (137, False, True), (6, False, True), (1, False, False)],
)  # fmt: skip
def test_without_exit_json_the_step_s_code_decides(code: int, signalled: bool, requeue: bool, life: Life) -> None:
    life.start()
    assert life.end(code, signalled=signalled).requeue is requeue


def test_an_exit_json_of_an_earlier_start_is_not_believed(life: Life) -> None:
    life.exit(75, "signal", True)
    life.start()
    assert not life.end(4).requeue
    life.restart = 0  # a new submission looks at the same folder
    life.start()
    assert life.end(137).requeue and "no word from rank 0" in (life.run / "requeue.jsonl").read_text()


def test_lost_three_times_in_a_row_with_progress_in_between(life: Life) -> None:
    answers = []
    for _ in range(4):
        life.start()
        life.checkpoint()
        life.exit(6, "lost", True)
        answers.append(life.end(6).requeue)
    assert answers == [True, True, True, False]


def test_a_preemption_between_losses_starts_the_count_anew(life: Life) -> None:
    for code, reason in [(6, "lost"), (6, "lost"), (6, "lost"), (75, "signal"), (6, "lost"), (6, "lost")]:
        life.start()
        life.checkpoint()
        life.exit(code, reason, True)
        assert life.end(code, preempted=reason == "signal").requeue


def test_three_starts_without_a_new_checkpoint_are_enough(life: Life) -> None:
    life.start()
    life.checkpoint()
    life.exit(75, "signal", True)
    assert life.end(75).requeue
    answers = []
    for _ in range(3):
        life.start()
        answers.append(life.end(137).requeue)
    assert answers == [True, True, False]
    with pytest.raises(UsageError, match="submit it anew"):
        life.start()  # a node failed and Slurm did not ask


def test_preemption_does_not_count(life: Life) -> None:
    for number in range(12):
        life.start()
        if number % 2:
            life.exit(75, "signal", True)
        assert life.end(75 if number % 2 else 143, preempted=True).requeue


def test_a_limit_too_short_to_start_in_is_named(life: Life) -> None:
    for _ in range(2):
        life.start()
        life.exit(75, "time_limit", True)
        assert life.end(75).requeue
    life.start()
    life.exit(75, "time_limit", True)
    decision = life.end(75)
    assert not decision.requeue and "time limit too short" in decision.why


def test_starts_that_slurm_repeats_by_itself_end_too(life: Life) -> None:
    for _ in range(3):  # a node fails each time: nobody is left to decide
        life.start()
        life.restart += 1
    with pytest.raises(UsageError, match="3 starts of job 77 ended without a new checkpoint"):
        life.start()
    life.checkpoint()
    life.start()


def test_a_cut_line_in_the_history_is_passed_over(life: Life) -> None:
    life.start()
    with (life.run / "requeue.jsonl").open("a") as file:
        file.write('{"job": "77", "eve\n')
    life.exit(75, "signal", True)
    assert life.end(75).requeue


def test_resume_never_is_for_the_first_start_only(life: Life) -> None:
    words = [str(life.recipe), f"out={life.run}", "--resume", "never"]
    assert begin(words, life.task)[1] == []
    life.restart = 1
    assert begin(words, life.task)[1] == [], "the first start died before it took the folder"
    life.checkpoint()
    (life.run / "environment.json").write_text(json.dumps({"starts": [{"job": JOB}]}))
    assert begin(words, life.task)[1] == ["--resume", "auto"]
    assert begin(words[:2], life.task)[1] == []


def test_an_array_task_has_its_own_folder(life: Life) -> None:
    task = Task(JOB, 0, "4")
    run, words = begin([str(life.recipe), f"out={life.run}"], task)
    assert run == life.run / "seed-4"
    assert words == ["seed=4", f"out={run}"]
    with pytest.raises(UsageError, match="leave seed="):
        begin([str(life.recipe), "seed=1"], task)


def test_mistakes_are_named_before_anything_starts(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError):
        begin([str(life.recipe), "optimizer.lr=fast"], life.task)
    with pytest.raises(UsageError, match="options of sbatch stand before the script"):
        begin([str(life.recipe), "nodes"], life.task)
    assert main(["begin", str(life.recipe), "optimizer.lr=fast"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert not life.run.exists()


def test_the_command_answers_by_its_exit_code(
    life: Life, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert main(["begin", str(life.recipe), f"out={life.run}"]) == 0
    assert capsys.readouterr().out == f"{life.run}\n"
    assert main(["decide", str(life.run), "143", "--signalled"]) == 0
    assert capsys.readouterr().out.startswith("requeue: ")
    assert main(["decide", str(life.run), "4"]) == 1
    assert capsys.readouterr().out.startswith("no requeue: ")
