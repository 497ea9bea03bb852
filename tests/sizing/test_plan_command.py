"""`vitdist plan`: the arithmetic of training itself, what fits, what is missing, and one line for bad numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import launching
from tests.conftest import Recipes
from vitdist.cli import main
from vitdist.data.index import DatasetIndex
from vitdist.metrics_log import read_metrics
from vitdist.sizing.text import amount


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def test_it_says_what_training_does(tiny_recipe: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(train={"max_duration": "2ep", "global_batch_size": 24, "micro_batch_size": 6})
    text = planned(capsys, recipe, "--nodes", 1, "--gpus-per-node", 2)
    codes, output = launching.run(2, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [0, 0], output
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert (
        "24 = 2 ranks x micro-batch 6 x accumulation 2" in text and "2 ranks x micro-batch 6 x accumulation 2" in output
    )
    assert "13 steps from 320 training samples, 8 samples left out of each" in text
    assert f"2ep = {len(lines)} steps" in text and "on 80 samples" in text
    rates = {int(step): float(rate) for step, rate in re.findall(r"step (\d+) ([\d.e-]+)", text)}
    assert len(rates) >= 4
    for step, rate in rates.items():
        assert rate == float(f"{lines[step - 1]['lr']:.3g}")
    sizes = json.loads((tmp_path / "run" / "environment.json").read_text())["parameters"]
    assert f"{sizes / 1e6:,.3f} million parameters" in text


def test_a_nodes_share_of_the_bytes(
    tiny: DatasetIndex, tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    """With refit and a batch that leaves nothing out, one node reads every photograph once."""
    recipe = tiny_recipe(evaluation={"protocol": "refit"}, train__global_batch_size=40)
    split = tiny.split("train")
    shards, photographs = sum(shard.bytes for shard in split.shards), int(split.samples["length"].sum())
    count = len(split.shards)
    text = planned(capsys, recipe)
    said = f"the node touches {count} of {count} shards ({amount(shards)}) an epoch and uses {amount(photographs)} of"
    assert said in text
    two = planned(capsys, recipe, "--nodes", 2)
    found = re.search(r"the node with most touches .* uses ([\d.]+ \w+) of", two)
    assert found is not None and found[1] != amount(photographs)


def test_what_fits_and_what_would(tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a ViT-L/16 on 64 GPUs of 12 GB: the micro-batch that is said to fit does, and twice as much does not."""
    model = {"backbone": "vit", "weights": "none", "depth": 12, "embed_dim": 1024, "num_heads": 16}
    recipe = tiny_recipe(model=model, data__image_size=224, train__global_batch_size=4096, augment={"mixup": 0.2})
    machine = ("--nodes", 8, "--gpus-per-node", 8, "--gpu-memory", "12GB", "--samples", 100_000)
    text = planned(capsys, recipe, *machine)
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines() if re.match(r"(ddp|zero\d)", line)}
    assert "no; micro-batch" in rows["ddp"] and "ddp does not fit" in text
    found = re.search(r"train.micro_batch_size=(\d+)", text)
    assert found is not None
    size = int(found[1])
    assert size % 2 == 0 and 64 % size == 0
    again = planned(capsys, recipe, *machine, f"train.micro_batch_size={size}")
    assert "does not fit" not in again and "too small for ZeRO" not in again
    assert "ddp does not fit" in planned(capsys, recipe, *machine, f"train.micro_batch_size={2 * size}")
    found = re.search(r"train.grad_checkpointing=true train.micro_batch_size=(\d+)", text)
    assert found is not None and int(found[1]) > size
    assert "does not fit" not in planned(capsys, recipe, *machine, *found[0].split())


def test_a_small_model_is_told_so(tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, tiny_recipe(), "--gpus-per-node", 2, "--gpu-memory", "80GB")
    assert text.count("too small for ZeRO to pay") == 1


def test_without_data_the_rest_is_planned(tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, tiny_recipe(), "data.path=/nowhere")
    assert "/nowhere holds no packed set" in text and "CUB's tree" in text
    assert "24 = 1 rank x micro-batch 24" in text and "checkpoint" in text and "\nddp " in text
    assert "\nepoch" not in text and "\nlr" not in text
    drawn = planned(capsys, tiny_recipe(), "data.path=/nowhere", "--samples", 5994, "--shards", 24)
    assert "249 steps from 5,994 training samples" in drawn


def test_auto_is_what_fits_at_most(tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, tiny_recipe(), "train.micro_batch_size=auto", "--gpu-memory", "80GB")
    assert "micro-batch 24 x accumulation 1 (auto: the largest that fits" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], "--nodes 0: give a number from 1"),
        (["--gpus-per-node", "-3"], "--gpus-per-node -3"),
        (["--gpu-memory", "80"], "--gpu-memory '80' is no size"),
        (["--disk-rate", "fast"], "--disk-rate 'fast' is no size"),
        (["--simulate", "0"], "--simulate 0"),
        (["--shards", "4"], "give --samples too"),
        (["--samples", "10", "--shards", "11"], "in at most as many shards"),
        (["--gpus-per-node", "5"], "does not divide over 5 ranks"),
        (["--simulate", "10"], "or 6 or 12 ranks"),
        (["--simulate", "5", "augment.mixup=0", "augment.cutmix=0"], "nearest that do: 20 or 25; or 4 or 6 ranks"),
        (["--samples", "20", "--simulate", "2"], "fewer than one global batch"),
    ],
)
def test_bad_numbers_are_a_line(
    arguments: list[str], words: str, tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["plan", str(tiny_recipe()), *arguments])
    said = capsys.readouterr()
    assert code in (2, 4) and said.out == ""
    assert said.err.count("\n") == 1 and words in said.err
