"""An installed wheel without the repository trains a shipped recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vitdist.data.index import DatasetIndex


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_trains_a_shipped_recipe(tiny: DatasetIndex, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run([str(c) for c in command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    where = run(python, "-c", "import vitdist; print(vitdist.__file__)")
    assert str(tmp_path / "fresh") in where
    assert "demo" in run(tmp_path / "fresh/bin/vitdist", "recipe", "list")
    run(tmp_path / "fresh/bin/vitdist", "recipe", "copy", "demo", "mine.yaml")
    run(
        python, "-m", "vitdist", "train", "mine.yaml", f"data.path={tiny.root}", "data.image_size=32", "out=run",
        "train.max_duration=2steps", "train.global_batch_size=8", "lr_scheduler.warmup=1steps",
    )  # fmt: skip
    assert (tmp_path / "run" / "report" / "index.html").exists()
