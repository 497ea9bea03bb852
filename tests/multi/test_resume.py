"""A run that is killed and resumed equals one that was not (P6, R1, R3, R11)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import launching, run_state
from tests.conftest import Recipes


@pytest.mark.parametrize("world", [1, 2, 3])
def test_killed_after_step_7_and_resumed_is_identical(world: int, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(ema={"decay": 0.9}, tracking={"log_samples": True})
    codes, output = launching.run(world, ["train", str(recipe), "out=whole"], tmp_path)
    assert codes == [0] * world, output
    fault = {"VITDIST_FAULT": f"kill:rank={world - 1},step=8,phase=backward,attempt=1"}
    codes, output = launching.run(world, ["train", str(recipe), "out=cut"], tmp_path, env=fault)
    assert codes[world - 1] == -9, output
    assert all(code in (-9, 6) for code in codes), output
    assert not (tmp_path / "cut" / "evaluation").exists()
    codes, output = launching.run(world, ["train", str(recipe), "out=cut"], tmp_path, env=fault)
    assert codes == [0] * world, output
    assert "resumed from step 6" in output
    assert run_state.losses(tmp_path / "cut") == run_state.losses(tmp_path / "whole")
    assert run_state.lines(tmp_path / "cut") == run_state.lines(tmp_path / "whole")
    assert run_state.tensors(tmp_path / "cut") == run_state.tensors(tmp_path / "whole")
    for rank in range(world):
        name = f"samples/rank_{rank:05d}.jsonl"
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
