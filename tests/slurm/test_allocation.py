"""What the script makes of an allocation, seen from its ranks on real nodes; no training, so each takes seconds."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Recipes
from tests.slurm.conftest import Submit, Submitted

PROBE = {"VITDIST_WRAP": str(Path(__file__).with_name("probe.sh")), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def probe(submit: Submit, tiny_recipe: Recipes) -> Any:
    """Submit a job whose ranks only report: (reports in the order of ranks, job)."""

    def go(
        *options: str, code: int = 0, env: dict[str, str] | None = None, overrides: tuple[str, ...] = ()
    ) -> tuple[list[dict[str, Any]], Submitted]:
        settings = {**PROBE, "PROBE_CODE": str(code), **(env or {})}
        job = submit(tiny_recipe(), *overrides, options=options, env=settings)
        job.end(60)
        return reports(job.output), job

    return go


def reports(output: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda report: report["rank"])


@pytest.mark.parametrize(
    ("options", "world", "per_node", "gpus", "cpus"),
    [
        (("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=4"), 4, 2, "0,1", "4"),
        (("--nodes=2", "--gres=gpu:2", "--ntasks-per-node=1", "--cpus-per-task=6"), 4, 2, "0,1", "3"),
        (("--nodes=2", "--gpus=4", "--cpus-per-gpu=2"), 4, 2, "0,1", "2"),
        (("--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=2"), 6, 2, None, "2"),
        (("--nodes=2", "--ntasks=2"), 2, 1, None, "1"),
        (("--ntasks=3",), 3, 3, None, "1"),
        (("--cpus-per-task=5",), 1, 1, None, "5"),
        (("--nodes=2", "--ntasks-per-node=1", "--export=NONE"), 2, 1, None, "1"),
    ],
)  # fmt: skip
def test_ranks_follow_from_the_allocation(
    options: tuple[str, ...], world: int, per_node: int, gpus: str | None, cpus: str, probe: Any, tmp_path: Path
) -> None:
    if "--export=NONE" in options:  # a site's file then holds what the environment would
        site = tmp_path / "slurm" / "site.sh"
        site.parent.mkdir()
        site.write_text("".join(f"export {name}='{value}'\n" for name, value in PROBE.items()))
        site.write_text(site.read_text() + f"export VITDIST_PYTHON={ROOT / '.venv/bin/python'}\n")
    found, job = probe(*options)
    assert [r["rank"] for r in found] == list(range(world)), job.output
    assert {r["world"] for r in found} == {world}
    if world > 1:
        assert [r["local_rank"] for r in found] == [rank % per_node for rank in range(world)]
        assert {r["local_world"] for r in found} == {per_node}
        assert len({r["master"] for r in found}) == 1
        assert found[0]["master"].split(":")[0] == found[0]["host"]
    assert {r["gpus"] for r in found} == {gpus}
    assert {r["cpus"] for r in found} == {cpus}


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        (("--nodes=1", "--ntasks=2", "--gpus-per-task=1"), "use --gpus-per-node=N"),
        (("--nodes=1", "--gpus=2", "--ntasks-per-gpu=1"), "use --gpus-per-node=N"),
        (("--nodes=1", "--gpus-per-node=2", "--gpu-bind=single:1"), "use --gpus-per-node=N"),
        (("--nodes=2", "--gpus=3"), "use --gpus-per-node=N"),
        (("--nodes=2", "--ntasks=4"), "use --ntasks-per-node=N"),
        (("--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=1", "--cpus-per-task=1"), "add --cpus-per-gpu=8"),
    ],
)
def test_a_trap_is_named_with_its_mend(options: tuple[str, ...], mend: str, probe: Any) -> None:
    found, job = probe(*options)
    assert found == []
    said = [line for line in job.output.splitlines() if line.startswith("train.sbatch:")]
    assert len(said) == 1 and mend in said[0], job.output
    assert job.cluster.show(job.id)["ExitCode"] == "2:0"


def test_a_mistake_in_the_recipe_ends_the_job_before_its_step(probe: Any) -> None:
    found, job = probe("--nodes=2", overrides=("optimizer.lr=fast",))
    assert found == [] and job.num_starts == 0
    assert "optimizer.lr" in job.output
    assert job.cluster.show(job.id)["ExitCode"] == "2:0"


def test_what_the_submitting_shell_left_behind_is_not_believed(probe: Any) -> None:
    left = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    found, job = probe("--nodes=2", env={**left, "SLURM_CPU_BIND": "mask_cpu:0x1"})
    assert [r["world"] for r in found] == [2, 2], job.output
    assert not found[0]["master"].startswith("127.")


def test_the_end_of_the_allocation_reaches_the_ranks(probe: Any) -> None:
    found, job = probe("--time=10")
    assert float(found[0]["end"]) == pytest.approx(time.time() + 600, abs=60), job.output


def test_a_site_file_is_sourced(probe: Any, tmp_path: Path) -> None:
    site = tmp_path / "mine.sh"
    site.write_text("export LAB_SITE=$UNSET_BEFORE.there\n")
    found, _ = probe(env={"VITDIST_SITE": str(site)})
    assert found[0]["site"] == ".there"


def test_a_site_file_that_is_asked_for_must_be_there(probe: Any) -> None:
    found, job = probe(env={"VITDIST_SITE": "/nowhere/site.sh"})
    assert found == [] and "which cannot be read" in job.output


def test_tasks_of_an_array_have_their_own_seed_and_folder(submit: Submit, tiny_recipe: Recipes, tmp_path: Path) -> None:
    log = tmp_path / "task-%a.txt"
    job = submit(tiny_recipe(), options=("--array=3,5", f"--output={log}"), env=PROBE)
    job.cluster.until(lambda: job.id not in job.cluster.queue(), 60, "the array's end")
    words = {r["words"][-2]: r["words"][-1] for r in reports(job.output)}
    assert words == {"seed=3": "out=job/seed-3", "seed=5": "out=job/seed-5"}, job.output
    assert (tmp_path / "job" / "seed-3" / "requeue.jsonl").exists()


def test_lost_ranks_are_tried_again_but_not_for_ever(probe: Any) -> None:
    found, job = probe("--nodes=1", code=6)
    assert [event["reason"] for event in job.history if event["event"] == "end"] == ["lost"] * 3
    assert len(found) == 3
    assert "3 starts without a new checkpoint" in job.output
    assert job.cluster.show(job.id)["ExitCode"] == "6:0"


def test_an_error_is_not_tried_again(probe: Any) -> None:
    found, job = probe("--nodes=1", code=4)
    assert len(found) == 1 and "no requeue: exit code 4" in job.output
    assert job.cluster.show(job.id)["ExitCode"] == "4:0"


def test_where_requeue_is_forbidden_the_line_to_resubmit_is_printed(probe: Any) -> None:
    found, job = probe("--nodes=2", "--no-requeue", "--time=30", code=75)
    assert len(found) == 2, job.output
    match = re.search(r"cannot be queued again \(.*\); to go on: cd (\S+) && sbatch (.*)", job.output)
    assert match, job.output
    assert "--nodes=2" in match[2] and "--time=00:30:00" in match[2] and match[2].endswith("tiny.yaml out=job")
    again = job.cluster.sbatch("--test-only", *match[2].split(), cwd=Path(match[1]))
    assert again == ""
