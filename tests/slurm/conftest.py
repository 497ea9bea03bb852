"""The cluster that all Slurm tests share, and how they submit to it what users submit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import launching
from tests.conftest import ROOT, Recipes
from tests.slurm.cluster import Cluster, missing
from vitdist.checkpoint.store import Store
from vitdist.requeue import HISTORY

SCRIPT = ROOT / "slurm" / "train.sbatch"
PIN = Path(__file__).with_name("pin.sh")
STEPS = 160


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a cluster belongs to `make test-slow`, but for one: Slurm's waits are long on busy cores."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) and item.get_closest_marker("every_time") is None:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes; skipped where Slurm's programs or root are missing."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Cluster(4) as running:
        yield running


@pytest.fixture
def long_recipe(tiny_recipe: Recipes) -> Recipes:
    """Long enough to be preempted: 160 steps, a checkpoint every 20."""

    def write(name: str = "tiny", **changes: object) -> Path:
        settings: dict[str, object] = {
            "train__max_duration": f"{STEPS}steps",
            "evaluation__every": "80steps",
            "checkpoint__every": "20steps",
            "tracking__log_samples": True,
        }
        return tiny_recipe(name, **{**settings, **changes})

    return write


@dataclass
class Submitted:
    """A job of the shipped script."""

    cluster: Cluster
    id: str
    run: Path
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def history(self) -> list[dict[str, object]]:
        """The lines of requeue.jsonl."""
        file = self.run / HISTORY
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def num_starts(self) -> int:
        return sum(event["event"] == "start" for event in self.history)

    def newest(self) -> int:
        """The step of the newest checkpoint, 0 when there is none."""
        published = Store(self.run).published()
        return published[-1][0] if published else 0

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until a checkpoint of this step or a later one is there."""

        def there() -> bool:
            assert "Traceback" not in self.output, self.output
            return self.newest() >= step

        self._until(there, seconds, f"a checkpoint of step {step}")

    def wait_for_start(self, number: int, seconds: float = 120) -> None:
        """Until the job was started so many times; after a requeue it waits for 6 s in the lab, 2 minutes elsewhere."""
        self._until(lambda: self.num_starts >= number, seconds, f"start {number}")

    def wait_for_end_of_start(self, number: int, seconds: float = 60) -> None:
        """Until a start has come to its end, as the script noted it."""

        def ended() -> bool:
            return sum(event["event"] == "end" for event in self.history) >= number

        self._until(ended, seconds, f"the end of start {number}")

    def end(self, seconds: float = 240) -> str:
        """Wait for the end for good; the job's last state."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED"}
        self._until(lambda: self.cluster.state(self.id) in over, seconds, "the end")
        return self.cluster.state(self.id)

    def preempt(self) -> str:
        """An urgent job takes all nodes for a moment."""
        return self.cluster.sbatch(
            f"-N{self.cluster.num_nodes}", "--exclusive", "-p", "urgent", "-o", "/dev/null", "--wrap", "sleep 1",
            cwd=self.cluster.folder,
        )  # fmt: skip

    def _until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        try:
            self.cluster.until(true, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- the job's own output\n{self.output}") from None


Submit = Callable[..., Submitted]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Submit]:
    """Submit the shipped script: submit(recipe, "key=value"..., options=[sbatch's], env={...})."""
    submitted: list[Submitted] = []

    def go(
        recipe: Path,
        *overrides: str,
        options: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        out: str = "job",
    ) -> Submitted:
        log = tmp_path / f"{out}.txt"
        settings = {
            "ACCELERATE_USE_CPU": "true",
            "VITDIST_PYTHON": sys.executable,
            "VITDIST_WRAP": str(PIN),
            **(env or {}),
        }
        words = [*options, "-o", str(log), str(SCRIPT), str(recipe), f"out={out}", *overrides]
        job = Submitted(cluster, cluster.sbatch(*words, cwd=tmp_path, env=settings), tmp_path / out, log)
        submitted.append(job)
        return job

    yield go
    for job in submitted:
        cluster.try_call("scancel", job.id)
    ours = {job.id for job in submitted}
    cluster.until(lambda: not ours & set(cluster.queue()), 60, "the test's jobs to leave the nodes")


@pytest.fixture
def reference(tmp_path: Path) -> Callable[[Path, int], Path]:
    """The same training, never interrupted, without Slurm."""

    def train(recipe: Path, world: int) -> Path:
        codes, output = launching.run(world, ["train", str(recipe), "out=reference"], tmp_path, timeout=240)
        assert codes == [0] * world, output
        return tmp_path / "reference"

    return train


def resumed_steps(output: str) -> list[int]:
    """From which steps a job's starts went on, by its output."""
    return [int(step) for step in re.findall(r"resumed from step (\d+)", output)]
