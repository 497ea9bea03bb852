"""K3: W&B offline, absent, with a wrong key or without a network changes nothing and stops nothing."""

from __future__ import annotations

import time
from pathlib import Path

from tests import launching, run_state
from tests.conftest import Recipes

NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}


def test_training_is_the_same_with_and_without_wandb(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    runs = {}
    for mode, env in [("disabled", {}), ("offline", {}), ("online", NOWHERE)]:
        started = time.monotonic()
        arguments = ["train", str(recipe), f"out={mode}", f"tracking.wandb={mode}"]
        codes, output = launching.run(1, arguments, tmp_path, env=env)
        assert codes == [0], output
        run = tmp_path / mode
        runs[mode] = run_state.tensors(run), run_state.lines(run)
        assert "0" * 40 not in "".join(file.read_text(errors="replace") for file in run.rglob("*.log"))
        if mode == "online":
            assert time.monotonic() - started < 90
    assert runs["offline"] == runs["disabled"]
    assert runs["online"] == runs["disabled"]
    assert len(runs["disabled"][1]) == 12 + 2
    assert list((tmp_path / "offline" / "wandb").rglob("*.wandb")), "the offline copy is not there"
