"""DeepSpeed's ZeRO 1, 2 and 3 on real ranks: DDP's numbers, checkpoints in DDP's form, and each rank its part (N4)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import launching, run_state
from tests.conftest import Recipes
from vitdist.checkpoint.store import Store
from vitdist.metrics_log import read_metrics

STAGES = ("zero1", "zero2", "zero3")
SLOW = pytest.mark.slow
# what is divided otherwise: 1 and 2 differ in when gradients travel only
SPARSE = ["zero1", pytest.param("zero2", marks=SLOW), "zero3"]


def train(world: int, recipe: Path, folder: Path, out: str, *more: str, fault: str = "", code: int = 0) -> str:
    env = {"VITDIST_FAULT": fault} if fault else {}
    codes, output = launching.run(world, ["train", str(recipe), f"out={out}", *more], folder, env=env)
    assert codes == [code] * world, output
    return output


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "lr" in line]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in steps(run)]


def everything(recipes: Recipes, **changes: Any) -> Path:
    """Whatever could go another way than under DDP: accumulation, clipping, penalties, average, groups, attention."""
    return recipes(
        **{
            "loss": {"l1": 1e-5, "l2": 1e-3, "class_weights": "sqrt"},
            "optimizer": {"lr": 1e-3, "clip_grad_norm": 0.5, "layer_decay": 0.9, "head_lr_scale": 2.0},
            "ema": {"decay": 0.9},
            "data__num_workers": 0,
            **changes,
        }
    )


@pytest.fixture
def hundred(tiny_recipe: Recipes) -> Path:
    return everything(
        tiny_recipe,
        train={"max_duration": "100steps", "global_batch_size": 8, "micro_batch_size": 2},
        evaluation={"every": "25steps"},
        checkpoint={"every": "50steps"},
        lr_scheduler={"name": "plateau", "monitor": "val/loss", "patience": 0, "threshold": 0.5, "warmup": "2steps"},
    )


HOLDINGS = re.compile(
    r"holds (\d+) of (\d+) parameters \(([\d.]+) MiB\), gradients of ([\d.]+) MiB, optimizer state of ([\d.]+) MiB "
    r"and ([\d.]+) MiB of weights to update; under ddp: ([\d.]+) MiB, ([\d.]+) MiB, ([\d.]+) MiB"
)


def shares(log: Path) -> list[float]:
    """What a rank said it holds over the whole: parameters counted, their bytes, gradients, moments, second weights."""
    found = HOLDINGS.search(log.read_text())
    assert found is not None, log.read_text()
    print(found[0])
    mine, whole, weights, gradients, moments, second, *ddp = map(float, found.groups())
    return [mine / whole, weights / ddp[0], gradients / ddp[1], moments / ddp[2], second / ddp[0]]


def test_100_steps_agree_with_ddp(hundred: Path, tmp_path: Path) -> None:
    train(2, hundred, tmp_path, "ddp")
    reference = steps(tmp_path / "ddp")
    assert any(line["grad_norm"] > 0.5 for line in reference), "clipping must bite"
    assert len({line["lr"] for line in reference}) >= 3, "the plateau must cut"
    for stage in STAGES:
        train(2, hundred, tmp_path, stage, f"parallel.strategy={stage}")
        found = steps(tmp_path / stage)
        worst = max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(found, reference, strict=True))
        print(f"{stage}: largest difference of a loss to ddp over 100 steps {worst:.1e}")
        assert worst < 1e-3
        assert [line["lr"] for line in found] == [line["lr"] for line in reference]
        norms = [line["grad_norm"] for line in reference]
        assert [line["grad_norm"] for line in found] == pytest.approx(norms, rel=1e-3)
        # gradients are counted once they are reduced; at every stage a rank updates its part of the weights only
        expected = [0.5] * 5 if stage == "zero3" else [1.0, 1.0, 0.5, 0.5, 0.5]
        for log in ("train.log", "logs/rank_00001.log"):
            assert shares(tmp_path / stage / log) == pytest.approx(expected, abs=0.03)


@pytest.fixture
def short(tiny_recipe: Recipes) -> Path:
    return everything(
        tiny_recipe,
        train={"max_duration": "8steps", "global_batch_size": 8, "micro_batch_size": 2},
        evaluation={"every": "3steps"},
        checkpoint={"every": "2steps", "keep_last": 100},
        model__drop_path=0.1,
    )


@pytest.mark.parametrize("stage", SPARSE)
def test_stopped_and_resumed_at_2_is_identical(stage: str, short: Path, tmp_path: Path) -> None:
    wish = f"parallel.strategy={stage}"
    train(2, short, tmp_path, "whole", wish)
    train(2, short, tmp_path, "cut", wish, fault="term:rank=1,step=5,phase=forward", code=75)
    output = train(2, short, tmp_path, "cut", wish)
    assert "resumed from step" in output
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_state.lines(cut) == run_state.lines(whole)
    assert run_state.tensors(cut) == run_state.tensors(whole)
    assert not [path for path in whole.rglob("*") if path.suffix in (".pt", ".pth", ".pkl", ".bin")]


@pytest.mark.parametrize(
    ("stage", "world"), [("zero1", 1), ("zero3", 1), *(pytest.param(s, 3, marks=SLOW) for s in STAGES)]
)
def test_a_checkpoint_is_ddps_and_goes_on_with_other_ranks(
    stage: str, world: int, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    recipe = everything(
        tiny_recipe,
        train={"max_duration": "8steps", "global_batch_size": 12},
        evaluation={"every": "8steps"},
        checkpoint={"every": "1steps", "keep_last": 100},
    )
    wish = f"parallel.strategy={stage}"
    train(2, recipe, tmp_path, "ddp")
    train(2, recipe, tmp_path, "zero", wish, fault="term:step=4,phase=step", code=75)
    for name in ("model.safetensors", "training.safetensors"):
        left, right = (load_file(Store(tmp_path / run).path_of(4) / name) for run in ("ddp", "zero"))
        assert left.keys() == right.keys()
        assert all(torch.allclose(left[key], right[key], atol=1e-5) for key in left), name
    output = train(world, recipe, tmp_path, "zero", wish)
    assert f"a checkpoint of 2 ranks goes on with {world}" in output
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-5)


@pytest.mark.parametrize("stage", [pytest.param("zero1", marks=SLOW), pytest.param("zero2", marks=SLOW), "zero3"])
def test_model_safetensors_is_what_was_evaluated(stage: str, short: Path, tmp_path: Path) -> None:
    """The average, collected from all ranks, whose 27, 27 and 26 samples of val make 3, 3 and 2 batches."""
    changes = ["evaluation.batch_size=13", "train.global_batch_size=12"]
    train(3, short, tmp_path, "run", f"parallel.strategy={stage}", *changes)
    run = tmp_path / "run"
    tested = json.loads((run / "evaluation" / "test.json").read_text())
    assert tested["count"] == tested["expected"] == 200
    codes, output = launching.run(1, ["evaluate", str(run), "--out", "alone"], tmp_path)
    assert codes == [0], output
    alone = json.loads((tmp_path / "alone" / "test.json").read_text())
    assert alone["step"] == tested["step"] and alone["weights"] == tested["weights"] == "ema"
    assert {n: v["correct"] for n, v in alone["levels"].items()} == {
        n: v["correct"] for n, v in tested["levels"].items()
    }


@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        ("zero1", "none"),
        pytest.param("zero2", "cpu", marks=SLOW),
        ("zero3", "none"),
        pytest.param("zero3", "cpu", marks=SLOW),
    ],
)
def test_steps_that_are_not_finite_are_skipped_and_end_at_the_limit(
    stage: str, offload: str, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    recipe = everything(
        tiny_recipe,
        train={"max_duration": "9steps", "global_batch_size": 24, "max_nonfinite_steps": 1},
        checkpoint={"every": "1steps", "keep_last": 100},
        evaluation={"every": "9steps"},
    )
    wish = (f"parallel.strategy={stage}", f"parallel.offload={offload}")
    faults = ";".join(f"nan:rank=1,step={step},phase=loss" for step in (3, 6, 7))
    output = train(2, recipe, tmp_path, "run", *wish, fault=faults, code=5)
    assert "step 3: the gradient is not finite (from rank 1); its update is skipped" in output
    before, after, later = (load_file(Store(tmp_path / "run").path_of(n) / "training.safetensors") for n in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before), "weights, moments, average: untouched"
    assert not all(torch.equal(after[name], later[name]) for name in after)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in later.values())
    newest, _ = Store(tmp_path / "run").newest()
    assert newest is not None
    reference, found = (
        load_file(folder / "model.safetensors") for folder in (Store(tmp_path / "run").path_of(5), newest)
    )
    assert all(torch.equal(reference[name], found[name]) for name in reference)


@pytest.mark.parametrize("stage", [pytest.param("zero1", marks=SLOW), "zero2", pytest.param("zero3", marks=SLOW)])
def test_offload_gives_the_same_numbers(stage: str, short: Path, tmp_path: Path) -> None:
    for offload in ("none", "cpu"):
        train(2, short, tmp_path, offload, f"parallel.strategy={stage}", f"parallel.offload={offload}")
    assert losses(tmp_path / "cpu") == pytest.approx(losses(tmp_path / "none"), abs=1e-5)


def falling(recipes: Recipes) -> Path:
    """A plateau that cuts at some evaluations and not at others, by a metric that no number of ranks changes."""
    return recipes(
        train={"max_duration": "16steps", "global_batch_size": 16},
        data__num_workers=0,
        evaluation={"every": "2steps"},
        optimizer={"lr": 2e-2},
        lr_scheduler={"name": "plateau", "monitor": "val/loss", "patience": 0, "threshold": 0.02, "warmup": "3steps"},
    )


def trace(run: Path) -> list[float]:
    return [line["lr"] for line in steps(run)]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero1", marks=SLOW), "zero3"])
def test_the_rate_falls_alike_on_other_ranks_and_across_a_resume(
    strategy: str, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    """P8: a scheduler that counts for each rank, or forgets, shows itself in the trace."""
    recipe = falling(tiny_recipe)
    train(1, recipe, tmp_path, "one")
    wish = f"parallel.strategy={strategy}"
    train(2, recipe, tmp_path, "moved", wish, fault="term:step=7,phase=step", code=75)
    train(1, recipe, tmp_path, "moved", wish)
    assert trace(tmp_path / "moved") == trace(tmp_path / "one")
    cuts = len(set(trace(tmp_path / "one")[3:]))
    assert 2 <= cuts < 7, f"{cuts} rates: it should cut at some evaluations, not at all"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_the_rate_falls_alike_on_1_2_and_8_ranks(strategy: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = falling(tiny_recipe)
    wish = f"parallel.strategy={strategy}"
    train(1, recipe, tmp_path, "one")
    for world in (1, 2, 8):
        train(world, recipe, tmp_path, f"of{world}", wish, fault="term:step=7,phase=step", code=75)
        train(world, recipe, tmp_path, f"of{world}", wish)
        assert trace(tmp_path / f"of{world}") == trace(tmp_path / "one")
        assert losses(tmp_path / f"of{world}") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.parametrize("stage", [pytest.param("zero2", marks=SLOW), "zero3"])
def test_bf16_differs_from_ddps_by_rounding_only(stage: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = everything(
        tiny_recipe, train={"max_duration": "20steps", "global_batch_size": 24, "precision": "bf16"},
        evaluation={"every": "20steps"}, checkpoint={"every": "20steps"},
    )  # fmt: skip
    train(2, recipe, tmp_path, "full", "train.precision=fp32")
    train(2, recipe, tmp_path, "ddp")
    train(2, recipe, tmp_path, stage, f"parallel.strategy={stage}")
    full, ddp, zero = (losses(tmp_path / run) for run in ("full", "ddp", stage))
    to_ddp, to_full = (max(abs(a - b) for a, b in zip(zero, other, strict=True)) for other in (ddp, full))
    print(f"bf16, {stage}: largest difference over 20 steps to ddp in bf16 {to_ddp:.1e}, to fp32 {to_full:.1e}")
    # sums in another order, rounded to bf16, grow; ZeRO-3 also adds a linear layer's bias after rounding its product
    assert to_ddp < 2e-3
    assert to_full > 1e-5, "it was bf16"


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero1", marks=SLOW), "zero3"])
def test_fp16_scales_its_loss(strategy: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = everything(
        tiny_recipe, train={"max_duration": "7steps", "global_batch_size": 8, "precision": "fp16"},
        evaluation={"every": "7steps"}, checkpoint={"every": "1steps", "keep_last": 100},
    )  # fmt: skip
    wish = f"parallel.strategy={strategy}"
    train(2, recipe, tmp_path, "full", wish, "train.precision=fp32")
    # one rank's part is not finite: the scale is halved, and the step is no sign of a broken run
    output = train(
        2, recipe, tmp_path, "half", wish, fault="nan:rank=1,step=4,phase=loss;term:step=6,phase=step", code=75
    )
    assert "not finite" not in output
    train(2, recipe, tmp_path, "half", wish)
    lines = steps(tmp_path / "half")
    scales = [line["loss_scale"] for line in lines]
    assert scales[3] == scales[2] / 2 and min(scales) == scales[-1] > 1, "kept across the resume"
    before, after = (load_file(Store(tmp_path / "half").path_of(n) / "model.safetensors") for n in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    good = [n for n, line in enumerate(lines) if line["train/loss"] == line["train/loss"]][:3]
    full = losses(tmp_path / "full")
    assert [lines[n]["train/loss"] for n in good] == pytest.approx([full[n] for n in good], abs=0.05)
    assert lines[0]["grad_norm"] == pytest.approx(steps(tmp_path / "full")[0]["grad_norm"], rel=0.02), "unscaled"


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_probed_head_is_in_every_ranks_average(strategy: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    """Rank 0 fits it; an average that started elsewhere from a random head would stay wrong there."""
    recipe = everything(
        tiny_recipe, train={"max_duration": "2steps", "global_batch_size": 8}, evaluation={"every": "2steps"},
        checkpoint={"every": "2steps"}, ema={"decay": 0.999, "warmup": False}, optimizer={"lr": 1e-6},
    )  # fmt: skip
    train(1, recipe, tmp_path, "first")
    wish = [f"model.weights={tmp_path / 'first'}", "model.head_init=probe", f"parallel.strategy={strategy}"]
    train(2, recipe, tmp_path, "run", *wish)
    codes, output = launching.run(1, ["evaluate", "run", "--out", "alone"], tmp_path)
    assert codes == [0], output
    folders = (tmp_path / "run" / "evaluation", tmp_path / "alone")
    found, alone = (json.loads((folder / "test.json").read_text())["levels"] for folder in folders)
    assert {n: v["correct"] for n, v in found.items()} == {n: v["correct"] for n, v in alone.items()}


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=SLOW)])
def test_running_statistics_are_rank_0s(stage: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        train={"max_duration": "5steps", "global_batch_size": 16}, evaluation={"every": "5steps"},
        checkpoint={"every": "5steps"}, data__num_workers=0,
        model={"backbone": "test_resnet.r160_in1k", "weights": "none", "head": "linear"},
    )  # fmt: skip
    train(2, recipe, tmp_path, "ddp")
    train(2, recipe, tmp_path, "zero", f"parallel.strategy={stage}")
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-4)
    left, right = (load_file(Store(tmp_path / run).path_of(5) / "model.safetensors") for run in ("ddp", "zero"))
    names = [name for name in left if "running" in name]
    assert names and all(torch.allclose(left[name], right[name], atol=1e-4) for name in names)
    codes, output = launching.run(1, ["evaluate", "ddp", "--out", "alone"], tmp_path)
    assert codes == [0], output
    folders = (tmp_path / "alone", tmp_path / "ddp" / "evaluation", tmp_path / "zero" / "evaluation")
    tested = [json.loads((folder / "test.json").read_text())["levels"]["order"]["correct"] for folder in folders]
    assert len(set(tested)) == 1, "evaluated with rank 0's on every rank"


def test_a_killed_rank_ends_the_others_under_zero(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(parallel={"strategy": "zero2", "timeout": "20s"})
    fault = {"VITDIST_FAULT": "kill:rank=1,step=4,phase=forward,attempt=1"}
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path, env=fault, timeout=60)
    assert codes == [6, -9], output
    assert "rank 1" in output


@pytest.mark.parametrize("head", [pytest.param("linear", marks=SLOW), "attention"])
def test_other_heads_and_frozen_parameters_under_zero3(head: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = everything(
        tiny_recipe, train={"max_duration": "4steps", "global_batch_size": 24, "grad_checkpointing": True},
        model__head=head, evaluation={"every": "4steps"}, checkpoint={"every": "4steps"},
    )  # fmt: skip
    train(2, recipe, tmp_path, "first")
    wish = [f"model.weights={tmp_path / 'first'}", "model.freeze=1", "train.max_duration=3steps"]
    train(2, recipe, tmp_path, "ddp", *wish)
    train(2, recipe, tmp_path, "zero3", "parallel.strategy=zero3", *wish)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-5)
    left, right = (load_file(Store(tmp_path / run).path_of(3) / "model.safetensors") for run in ("ddp", "zero3"))
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)
