"""D1, D2 as a user meets them: damaged shards under `raise` and `skip`, on two ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests import launching
from tests.conftest import Recipes
from tests.data.storage.test_damage import IN_SHARD, inject
from tests.data.tiny import tiny_packed
from vitdist.checkpoint.store import find_checkpoint
from vitdist.data.index import SAMPLE_DTYPE, DatasetIndex
from vitdist.metrics_log import read_metrics

INJECTED = {"cut inside data": 0, "name in a header": 1, "changed scan bytes": 2, "missing": 3, "growing": 4}


@pytest.fixture
def own(tmp_path: Path) -> DatasetIndex:
    """120 training samples: with `refit` and batches of 24, five steps are exactly one epoch."""
    return tiny_packed(tmp_path / "own", num_classes=20, train_per_class=6, test_per_class=1)


def command(recipes: Recipes, own: DatasetIndex, out: str, *overrides: str) -> list[str]:
    recipe = recipes(
        evaluation={"protocol": "refit", "every": "5steps"},
        train={"max_duration": "5steps", "global_batch_size": 24},
    )
    return ["train", str(recipe), f"data.path={own.root}", f"out={out}", *overrides]


def counted(run: Path) -> dict[str, int]:
    return json.loads((find_checkpoint(run) / "state.json").read_text())["train"]["damaged"]


def test_skip_counts_what_was_injected_on_any_ranks(own: DatasetIndex, tiny_recipe: Recipes, tmp_path: Path) -> None:
    injected: Counter[tuple[str, str]] = Counter()
    for what, shard in INJECTED.items():
        injected += inject(own, IN_SHARD[what], shard)[0]
    expected = {f"{kind} in {shard}": count for (kind, shard), count in injected.items()}
    assert len(expected) == 4 and sum(expected.values()) > 6
    for world in (1, 2):
        arguments = command(tiny_recipe, own, f"world{world}", "data.on_bad_sample=skip")
        codes, output = launching.run(world, arguments, tmp_path)
        assert codes == [0] * world, output
        run = tmp_path / f"world{world}"
        assert counted(run) == expected
        logs = [run / "train.log", *(run / "logs").glob("*")]
        assert sum(log.read_text().count("damaged sample:") for log in logs) == sum(expected.values())
        *_, last = [line for line in read_metrics(run / "metrics.jsonl") if "lr" in line]
        assert last["damaged"] == sum(expected.values())
        assert "16 damaged samples were replaced" in (run / "report" / "index.html").read_text()
        account = ", ".join(f"{count} {kind}" for kind, count in sorted(expected.items()))
        assert (run / "train.log").read_text().strip().endswith(f"16 damaged samples were replaced: {account}")
    budget = f"data.max_bad_samples={sum(expected.values()) - 1}"
    codes, output = launching.run(2, command(tiny_recipe, own, "over", "data.on_bad_sample=skip", budget), tmp_path)
    assert codes == [4, 4], output
    assert f"{sum(expected.values())} damaged samples by step" in output
    # the same ones again in the second epoch are not more
    budget = [f"data.max_bad_samples={sum(expected.values())}", "train.max_duration=10steps"]
    codes, output = launching.run(2, command(tiny_recipe, own, "twice", "data.on_bad_sample=skip", *budget), tmp_path)
    assert codes == [0, 0], output
    assert sum(counted(tmp_path / "twice").values()) == 2 * sum(expected.values())


@pytest.mark.parametrize(("what", "kind"), [("name in a header", "header"), ("zeroed block of data", "checksum")])
def test_raise_stops_both_ranks_with_one_line(
    what: str, kind: str, own: DatasetIndex, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    injected, hit = inject(own, IN_SHARD[what])
    (row,), ((_, shard),) = hit, injected
    codes, output = launching.run(2, command(tiny_recipe, own, "run"), tmp_path)
    assert codes == [4, 4], output
    (line,) = [line for line in output.splitlines() if "vitdist:" in line]
    assert f"shard {shard}, sample {row} at byte" in line and f": {kind} (" in line and "on_bad_sample=skip" in line


@pytest.mark.parametrize("what", ["missing", "growing", "empty"])
def test_a_shard_of_another_size_is_refused_before_the_first_step(
    what: str, own: DatasetIndex, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    inject(own, IN_SHARD[what])
    codes, output = launching.run(2, command(tiny_recipe, own, "run"), tmp_path)
    assert codes == [4, 4] and output.count("vitdist:") == 1 and "train/000003.tar" in output


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_label_out_of_range_is_the_table_s_damage(
    policy: str, own: DatasetIndex, tiny_recipe: Recipes, tmp_path: Path
) -> None:
    table = own.root / own.split("train").table.path
    rows = np.fromfile(table, SAMPLE_DTYPE)
    rows["label"][5] = 10_000
    rows.tofile(table)
    codes, output = launching.run(2, command(tiny_recipe, own, "run", f"data.on_bad_sample={policy}"), tmp_path)
    assert codes == [4, 4] and output.count("vitdist:") == 1 and "a label outside its class tree" in output
