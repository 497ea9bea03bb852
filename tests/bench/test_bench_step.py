"""`vitdist bench step`: the contestants do the same work, and the command prints what it measured."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data.tiny import tiny_packed
from vitdist.bench import step as bench


@pytest.fixture(scope="module")
def wishes(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    data = tmp_path_factory.mktemp("bench") / "set"
    tiny_packed(data, num_classes=6, train_per_class=8, test_per_class=1)
    return (f"data.path={data}", "data.image_size=32", "train.global_batch_size=8", "train.micro_batch_size=4")


def test_vitdist_and_the_bare_loop_take_the_same_steps(
    wishes: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitdist.recipe.load import load_recipe

    constant = ("lr_scheduler.name=constant", "lr_scheduler.warmup=0steps", f"out={tmp_path / 'run'}")
    dropless = ("model.drop_path=0", "model.head_dropout=0")
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", [*wishes, *bench.PLAIN, *constant, *dropless])
    job = bench._job(recipe)
    batches = bench._resident(job)
    bare, own = bench.bare_step(job, batches), bench.vitdist_step(job, batches)
    expected = [bare().item() for _ in range(5)]
    found = [own().item() for _ in range(6)][1:]  # a report is read one step late
    job.journal.close(0)
    assert found == pytest.approx(expected, abs=1e-5) and len(set(expected)) == 5


def test_the_command_prints_what_it_measured(wishes: Sequence[str]) -> None:
    command = [sys.executable, "-m", "vitdist", "bench", "step", "vit_scratch", "--steps", "1", "--rounds", "2"]
    timm = ("model.backbone=vit_tiny_patch16_224", "model.drop_path=0.1", "model.head=linear", "data.image_size=64")
    shape = [f"model.{key}=null" for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")]
    done = subprocess.run(
        [*command, "--variants", "fp32,bf16", *wishes, *timm, *shape], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [head.split(":")[0] for head in heads] == ["fp32", "bf16"]
    rows = re.findall(r"^  (\S.*?)\s+([\d.]+) img/s\s+([\d.]+) % of bare\s+([\d.]+) % of the", done.stdout, re.M)
    assert [row[0] for row in rows] == ["bare loop", "vitdist", "the step of timm's script"] * 2
    assert all(float(value) > 0 for row in rows for value in row[1:])
