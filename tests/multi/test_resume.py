"""A run that is stopped or killed and resumed equals one that was not (P6, R3, R4, R7, R10, R11, M4)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import launching, run_state
from tests.checkpoint.damage import DAMAGES
from tests.conftest import Recipes
from vitdist.checkpoint.manifest import MANIFEST, seal
from vitdist.checkpoint.store import Store
from vitdist.metrics_log import read_metrics


def train(world: int, recipe: Path, folder: Path, out: str, *more: str, fault: str = "") -> str:
    env = {"VITDIST_FAULT": fault} if fault else {}
    codes, output = launching.run(world, ["train", str(recipe), f"out={out}", *more], folder, env=env)
    assert codes == [0] * world, output
    return output


def stop(world: int, recipe: Path, folder: Path, out: str) -> int:
    """Stop a run in its middle; the step it can be resumed from."""
    fault = {"VITDIST_FAULT": "term:step=5,phase=step"}
    codes, output = launching.run(world, ["train", str(recipe), f"out={out}"], folder, env=fault)
    assert codes == [75] * world, output
    last = Store(folder / out).pointed("last")
    assert last is not None
    return int(last.name.removeprefix("step_"))


def assert_same(cut: Path, whole: Path) -> None:
    assert run_state.losses(cut) == run_state.losses(whole)
    assert run_state.lines(cut) == run_state.lines(whole)
    assert run_state.tensors(cut) == run_state.tensors(whole)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_killed_after_step_7_and_resumed_is_identical(world: int, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(ema={"decay": 0.9}, tracking={"log_samples": True})
    train(world, recipe, tmp_path, "whole")
    fault = {"VITDIST_FAULT": f"kill:rank={world - 1},step=8,phase=backward,attempt=1"}
    codes, output = launching.run(world, ["train", str(recipe), "out=cut"], tmp_path, env=fault)
    assert codes[world - 1] == -9, output
    assert all(code in (-9, 6) for code in codes), output
    assert not (tmp_path / "cut" / "evaluation").exists()
    output = train(world, recipe, tmp_path, "cut")
    assert "resumed from step" in output
    assert_same(tmp_path / "cut", tmp_path / "whole")
    for rank in range(world):
        name = f"samples/rank_{rank:05d}.jsonl"
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def resume_at_every_step(world: int, recipe: Path, folder: Path, steps: Sequence[int]) -> None:
    """One run that keeps a checkpoint a step; each is gone on from in a folder of its own."""
    train(world, recipe, folder, "whole", "checkpoint.every=1steps", "checkpoint.keep_last=100")
    for step in steps:
        out = folder / f"from{step}"
        shutil.copytree(folder / "whole", out, symlinks=True)
        for number, path in Store(out).published():
            if number > step:
                shutil.rmtree(path)
        shutil.rmtree(out / "evaluation")
        output = train(world, recipe, folder, out.name, "checkpoint.every=1steps", "checkpoint.keep_last=100")
        assert f"resumed from step {step} " in output
        assert_same(out, folder / "whole")
        shutil.rmtree(out)


# an epoch is 4 steps, an evaluation comes every 3: first, ends of epochs, before and at evaluations, next to last, last
@pytest.mark.parametrize(("world", "steps"), [(1, range(1, 13)), (2, (1, 3, 4, 6, 7, 11, 12))])
def test_resumed_at_every_step(world: int, steps: Sequence[int], long_recipe: Path, tmp_path: Path) -> None:
    resume_at_every_step(world, long_recipe, tmp_path, steps)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_resumed_at_every_step_of_more_ranks(world: int, long_recipe: Path, tmp_path: Path) -> None:
    resume_at_every_step(world, long_recipe, tmp_path, range(1, 13))


@pytest.fixture
def long_recipe(tiny_recipe: Recipes) -> Path:
    """Three epochs of 4 steps, a plateau with all its memory, an average, evaluations every 3 steps."""
    return tiny_recipe(
        train={"max_duration": "12steps", "global_batch_size": 72},
        data__num_workers=0,
        model__drop_path=0.1,
        ema={"decay": 0.9},
        evaluation={"every": "3steps"},
        lr_scheduler={"name": "plateau", "monitor": "val/loss", "patience": 1, "threshold": 0.5, "warmup": "2steps"},
    )


def test_what_is_written_slowly_is_of_its_own_step(long_recipe: Path, tmp_path: Path) -> None:
    """Saves share their memory: the next one must not be copied into it before the last is on disk."""
    more = ("checkpoint.every=1steps", "checkpoint.keep_last=100")
    train(1, long_recipe, tmp_path, "quick", *more)
    train(1, long_recipe, tmp_path, "slow", *more, fault="slow:phase=between-files")
    for step, folder in Store(tmp_path / "quick").published():
        for name in ("model.safetensors", "training.safetensors"):
            quick, slow = (load_file(Store(tmp_path / run).path_of(step) / name) for run in ("quick", "slow"))
            assert all(torch.equal(quick[key], slow[key]) for key in quick), f"{name} of {folder.name}"


def test_stopped_twice_within_one_epoch(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(ema={"decay": 0.9}, model__drop_path=0.1)
    train(2, recipe, tmp_path, "whole")
    for step in (4, 7):
        fault = {"VITDIST_FAULT": f"term:rank=1,step={step},phase=forward"}
        codes, output = launching.run(2, ["train", str(recipe), "out=cut"], tmp_path, env=fault)
        assert codes == [75, 75], output
    train(2, recipe, tmp_path, "cut")
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("world", [3, 4])
def test_without_the_cure_for_ddps_buckets_a_resume_differs(world: int, tiny_recipe: Recipes, tmp_path: Path) -> None:
    """The negative control: DDP sums in another order in a process's first step, and these tests would see it."""
    recipe = tiny_recipe(checkpoint__keep_last=100)
    cold = ";cold:phase=warm-up"
    train(world, recipe, tmp_path, "whole", fault=cold)
    launching.run(
        world, ["train", str(recipe), "out=cut"], tmp_path, env={"VITDIST_FAULT": "kill:step=8,phase=step" + cold}
    )
    train(world, recipe, tmp_path, "cut", fault=cold)
    assert run_state.tensors(tmp_path / "cut") != run_state.tensors(tmp_path / "whole")


def test_ranks_that_see_other_files_go_on_from_rank_0s(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(ema={"decay": 0.9})
    train(2, recipe, tmp_path, "whole")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    stopped_at = stop(2, recipe, first, "run")
    shutil.copytree(tmp_path / "whole", second / "run", symlinks=True)  # rank 1 sees later steps only
    shutil.rmtree(Store(second / "run").path_of(stopped_at), ignore_errors=True)
    job = launching.start(2, ["train", str(recipe), "out=run"], first, folders={1: second})
    assert job.wait() == [0, 0], job.output
    assert f"resumed from step {stopped_at} " in job.output and stopped_at < 9
    assert_same(first / "run", tmp_path / "whole")


def test_damaged_the_one_before_is_taken_and_none_left_is_refused(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint={"every": "3steps", "keep_last": 100})
    train(1, recipe, tmp_path, "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    store = Store(tmp_path / "cut")
    DAMAGES["flipped training.safetensors"](store.path_of(12))
    DAMAGES["empty manifest"](store.path_of(9))
    output = train(2, recipe, tmp_path, "cut", "checkpoint.keep_last=100").replace("\n", " ")
    assert "step_00000012: training.safetensors has changed since it was written; passed over" in output
    assert "step_00000009" in output and "resumed from step 6" in output
    assert (store.folder / "aside_step_00000012.1").is_dir() and (store.folder / "aside_step_00000009.1").is_dir()
    for _, path in store.published():
        DAMAGES["cut model"](path)
    before = sorted(str(path) for path in store.folder.rglob("*"))
    codes, output = launching.run(2, ["train", str(recipe), "out=cut"], tmp_path)
    assert codes == [3, 3], output
    assert output.count("none verifies") == 1 and "--resume never" in output
    assert sorted(str(path) for path in store.folder.rglob("*")) == before, "nothing was deleted"


def test_an_earlier_checkpoint_may_be_gone_on_from(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint={"every": "3steps", "keep_last": 100}, ema={"decay": 0.9})
    train(1, recipe, tmp_path, "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
    output = train(1, recipe, tmp_path, "again", "--resume", "again/checkpoints/step_00000003")
    assert "resumed from step 3" in output
    assert_same(tmp_path / "again", tmp_path / "run")
    assert (tmp_path / "again" / "metrics.discarded.jsonl").exists(), "lines beyond are set aside, not lost"


@pytest.mark.parametrize("what", ["optimizer", "generators"])
def test_state_that_cannot_be_restored_is_an_error_or_a_flag(what: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    stopped_at = stop(2, recipe, tmp_path, "run")
    folder = Store(tmp_path / "run").path_of(stopped_at)
    if what == "optimizer":
        tensors = load_file(folder / "training.safetensors")
        name = next(name for name in tensors if name.endswith("exp_avg"))
        save_file({**tensors, name: torch.zeros(3, 3, 3)}, folder / "training.safetensors")
    else:
        text = (folder / "state.json").read_text()
        (folder / "state.json").write_text(text.replace('"plain"', '"strange"'))
    (folder / MANIFEST).unlink()
    seal(folder, stopped_at, {"weights": "raw"})
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [3, 3], output
    assert output.count("--allow-inexact-resume") == 1
    output = train(2, recipe, tmp_path, "run", "--allow-inexact-resume")
    assert "not restored exactly" in output
    flags = [
        (line["step"], line.get("inexact", False))
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "lr" in line
    ]
    assert flags == [(step, step > stopped_at) for step in range(1, 13)]


def test_debug_is_the_same_run(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(ema={"decay": 0.9}, model__drop_path=0.1)
    train(1, recipe, tmp_path, "plain")
    train(1, recipe, tmp_path, "debug", "--debug")
    assert_same(tmp_path / "debug", tmp_path / "plain")
