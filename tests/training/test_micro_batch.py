"""`micro_batch_size: auto`: the fastest that fits wins, the search leaves no trace, and what was found is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import launching, run_state
from tests.conftest import Recipes
from tests.faults.running import exit_of
from vitdist.checkpoint.store import Store
from vitdist.metrics_log import read_metrics
from vitdist.recipe.batch import micro_batch_sizes
from vitdist.training.micro_batch import fastest
from vitdist.training.state import TrainState


@pytest.mark.parametrize(
    ("seconds", "found", "tried"),
    [
        ({2: 8.0, 4: 5.0, 8: 4.0, 16: 3.0}, 16, 4),
        (
            {2: 8.0, 4: 5.0, 8: 5.5, 16: 5.2, 32: 1.0},
            4,
            4,
        ),  # speed decides, not size; two that are no faster are enough
        ({2: 8.0, 4: 5.0, 8: 4.96}, 4, 3),  # memory is not given for less than 2 %
        ({2: 8.0, 4: 5.0, 8: None, 16: 1.0}, 4, 3),
        ({2: None}, None, 1),
    ],
)
def test_speed_decides(seconds: dict[int, float | None], found: int | None, tried: int) -> None:
    asked = []

    def measure(size: int) -> float | None:
        asked.append(size)
        return seconds[size]

    assert fastest(list(seconds), measure) == found and len(asked) == tried


def test_sizes_divide_a_ranks_share() -> None:
    assert micro_batch_sizes(48, 2, mixing=False) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert micro_batch_sizes(48, 2, mixing=True) == [2, 4, 6, 8, 12, 24]


def run(
    world: int, recipe: Path, folder: Path, out: str, *more: str, fault: str = "", codes: Sequence[int] | None = None
) -> str:
    """Train with a cache of this test's own; its output."""
    env = {"XDG_CACHE_HOME": str(folder / "cache"), **({"VITDIST_FAULT": fault} if fault else {})}
    found, output = launching.run(world, ["train", str(recipe), f"out={out}", *more], folder, env=env)
    assert found == list(codes or [0] * world), output
    return output


def state(folder: Path) -> dict[str, Any]:
    last = Store(folder).pointed("last")
    assert last is not None
    found: dict[str, Any] = json.loads((last / "state.json").read_text())["train"]
    return found


AUTO = "train.micro_batch_size=auto"


@pytest.mark.parametrize("world", [1, 2])
def test_the_search_leaves_no_trace(world: int, tiny_recipe: Recipes, tmp_path: Path) -> None:
    """Bit for bit the run with that number: weights, moments, average, generators (drop path draws from them)."""
    recipe = tiny_recipe(ema={"decay": 0.9}, model__drop_path=0.2, loss={"l2": 1e-4})
    output = run(world, recipe, tmp_path, "auto", AUTO, fault="oom:phase=probe-24;oom:phase=probe-12")
    size = state(tmp_path / "auto")["micro_batch_size"]
    assert size in (2, 4, 6, 8) and f"micro-batch {size} of 2, " in output and "the fastest that fits" in output
    run(world, recipe, tmp_path, "fixed", f"train.micro_batch_size={size}")
    assert run_state.lines(tmp_path / "auto") == run_state.lines(tmp_path / "fixed")
    assert run_state.tensors(tmp_path / "auto") == run_state.tensors(tmp_path / "fixed")
    generators = [
        json.loads((_last(tmp_path / out) / "state.json").read_text())["generators"] for out in ("auto", "fixed")
    ]
    assert generators[0] == generators[1]


def _last(folder: Path) -> Path:
    last = Store(folder).pointed("last")
    assert last is not None
    return last


def test_running_statistics_are_put_back(tiny_recipe: Recipes, tmp_path: Path) -> None:
    """A backbone with batch norm, and SGD, whose momentum is made at the first step."""
    recipe = tiny_recipe(
        model={"backbone": "test_resnet.r160_in1k", "weights": "none", "head": "linear", "drop_path": 0.0},
        optimizer={"name": "sgd", "lr": 1e-2, "layer_decay": 1.0},
        augment={"crop_scale": [0.6, 1.0]}, train__max_duration="3steps", data__image_size=64, ema={"decay": 0.5},
    )  # fmt: skip
    run(1, recipe, tmp_path, "auto", AUTO)
    size = state(tmp_path / "auto")["micro_batch_size"]
    run(1, recipe, tmp_path, "fixed", f"train.micro_batch_size={size}")
    assert run_state.lines(tmp_path / "auto") == run_state.lines(tmp_path / "fixed")
    assert run_state.tensors(tmp_path / "auto") == run_state.tensors(tmp_path / "fixed")
    assert any("running_mean" in name for name in run_state.tensors(tmp_path / "auto"))


def test_what_does_not_fit_on_one_rank_fits_on_none(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__max_duration="2steps")
    output = run(2, recipe, tmp_path, "run", AUTO, fault="oom:rank=1,phase=probe-4")
    assert state(tmp_path / "run")["micro_batch_size"] == 2
    assert "micro-batch 4: does not fit" in output and "micro-batch 6:" not in output
    output = run(
        2, recipe, tmp_path, "none", AUTO, "optimizer.name=sgd", fault="oom:rank=1,phase=probe-2", codes=[7, 7]
    )
    assert output.count("not even a micro-batch of 2 fits") == 1


def test_found_once_and_kept(tiny_recipe: Recipes, tmp_path: Path) -> None:
    """In the cache for the next run, whatever else stands there; and in the checkpoint for the same one."""
    recipe = tiny_recipe(train__max_duration="4steps")
    searched = "(the fastest that fits)"
    assert searched in run(1, recipe, tmp_path, "first", AUTO, fault="oom:phase=probe-4")
    file = tmp_path / "cache" / "vitdist" / "micro_batch_size.json"
    entries = json.loads(file.read_text())
    assert [entry["size"] for entry in entries] == [2] and entries[0]["for"]["model.depth"] == 2
    assert os.listdir(file.parent) == [file.name], "no draft is left"
    output = run(1, recipe, tmp_path, "second", AUTO, fault="raise:phase=probe")
    assert (
        searched not in output
        and f"micro-batch 2 of 2, 4, 6, 8, 12, 24 (found before on this device: {file})" in output
    )
    file.write_text('[{"for": 3}, 7, {"size": [], "for": {}}')
    assert searched in run(1, recipe, tmp_path, "third", AUTO, fault="oom:phase=probe-6"), "damaged: as good as none"
    assert json.loads(file.read_text())[0]["size"] in (2, 4)
    assert searched in run(1, recipe, tmp_path, "other", AUTO, "train.precision=bf16"), "another precision"
    file.unlink()
    output = run(1, recipe, tmp_path, "first", AUTO, "train.max_duration=6steps", fault="raise:phase=probe")
    assert "micro-batch 2 of" in output and "(kept with the checkpoint)" in output and not file.exists()


def test_a_cache_that_cannot_be_written_costs_nothing(tiny_recipe: Recipes, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    run(1, tiny_recipe(train__max_duration="2steps"), tmp_path, "run", AUTO)


def test_a_state_of_an_earlier_version_is_read() -> None:
    old = TrainState(step=3).to_json()
    del old["micro_batch_size"]
    assert TrainState.from_json(old).micro_batch_size is None


def used(folder: Path) -> list[tuple[int, int, str]]:
    records = [
        json.loads(line) for file in (folder / "samples").glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    return sorted((record["step"], record["slot"], record["key"]) for record in records)


SLOW = [pytest.param(2, "forward", marks=pytest.mark.slow), pytest.param(3, "backward", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("world", "phase"), [(1, "forward"), (2, "backward"), *SLOW])
def test_a_later_lack_of_memory_halves_it_on_all_ranks(
    world: int, phase: str, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    """On one rank in mid-run: that step is done again with half, nothing twice or left out, and the run says so."""
    recipe = tiny_recipe(
        train={"max_duration": "12steps", "global_batch_size": 24 * world},
        ema={"decay": 0.9}, tracking={"log_samples": True}, checkpoint={"every": "3steps", "keep_last": 100},
    )  # fmt: skip
    run(world, recipe, tmp_path, "warm", AUTO, "train.max_duration=2steps")
    file = tmp_path / "cache" / "vitdist" / "micro_batch_size.json"
    file.write_text(file.read_text().replace(f'"size": {json.loads(file.read_text())[0]["size"]}', '"size": 12'))
    output = run(world, recipe, tmp_path, "cut", AUTO, fault=f"oom:rank={world - 1},step=5,phase={phase}")
    assert f"step 5: rank {world - 1} had no memory for a micro-batch of 12; going on with 6" in output.replace(
        "\n", " "
    )
    run(world, recipe, tmp_path, "whole", "train.micro_batch_size=12")
    lines, reference = (
        [line for line in read_metrics(tmp_path / out / "metrics.jsonl") if "lr" in line] for out in ("cut", "whole")
    )
    assert [(line["step"], line.get("inexact", False)) for line in lines] == [(step, step > 4) for step in range(1, 13)]
    assert [line["train/loss"] for line in lines] == pytest.approx([line["train/loss"] for line in reference], abs=1e-4)
    assert [line["train/loss"] for line in lines[:4]] == [line["train/loss"] for line in reference[:4]]
    assert used(tmp_path / "cut") == used(tmp_path / "whole")
    last = state(tmp_path / "cut")
    assert (last["micro_batch_size"], last["inexact"], last["num_nonfinite"]) == (6, True, 0)
    assert json.loads(file.read_text())[0]["size"] == 6, "the next run begins with what was learned here"


def test_no_smaller_one_is_the_end(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint={"every": "1steps"}, train__max_nonfinite_steps=0)
    fault = "oom:phase=probe-4;oom:rank=1,step=5,phase=backward"
    output = run(2, recipe, tmp_path, "run", AUTO, fault=fault, codes=[7, 7])
    assert output.count("rank 1: out of memory at step 5 with the smallest micro-batch, 2") == 1
    assert exit_of(tmp_path / "run")["code"] == 7 and state(tmp_path / "run")["step"] == 4


def test_a_number_of_the_recipe_is_not_changed(tiny_recipe: Recipes, tmp_path: Path) -> None:
    fault = "oom:step=5,phase=forward"
    output = run(1, tiny_recipe(), tmp_path, "run", "train.micro_batch_size=12", fault=fault, codes=[7])
    assert "use a smaller train.micro_batch_size" in output
