"""N1: the losses on file are met exactly by the same torch on the same kind of CPU, and within 1e-4 elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.record import environment, measure, on_file


@pytest.mark.parametrize("world", [1, 2])
def test_golden_losses(world: int, tmp_path: Path) -> None:
    found = measure(world, tmp_path)
    known = on_file()
    if environment() in known:
        assert found == known[environment()][f"world {world}"]
        return
    reference = next(iter(known.values()))[f"world {world}"]
    assert [float.fromhex(x) for x in found] == pytest.approx([float.fromhex(x) for x in reference], abs=1e-4)
