"""What a save costs the steps of ViT-B/16 with AdamW and an average; `pytest -s -m slow` with this file shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import launching
from tests.conftest import Recipes

SAID = re.compile(r"published: ([\d.]+) MB, the steps waited (\d+) ms for it, written in ([\d.]+) s")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_steps_wait_a_second_at_most_for_vit_b(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        data__image_size=224,
        model={"backbone": "vit_base_patch16_224.augreg_in21k", "weights": "none", "head": "hierarchical"},
        train={"max_duration": "100steps", "global_batch_size": 2},
        evaluation={"every": "100steps"},
        checkpoint={"every": "2steps", "keep_last": 1},
        ema={"decay": 0.999},
    )
    fault = {"VITDIST_FAULT": "term:step=7,phase=step"}  # an evaluation would take minutes
    codes, output = launching.run(1, ["train", str(recipe), "out=run"], tmp_path, env=fault, timeout=500)
    assert codes == [75], output
    saves = [tuple(map(float, match)) for match in SAID.findall(output)]
    assert len(saves) >= 4, output
    for size, stall, seconds in saves:
        print(f"checkpoint of {size:.0f} MB: the steps waited {stall:.0f} ms, written in {seconds:.1f} s")
        assert size > 1500
        assert stall <= 1000
