"""P1 at scale: any rank plans any step of 100 million samples from nothing, without torch and in little memory."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_a_hundred_million_samples_on_1024_ranks() -> None:
    command = [sys.executable, "-m", "vitdist", "bench", "plan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    title, _, *lines = done.stdout.splitlines()
    assert title.startswith("100,000,000 samples in 100,000 shards, 1,024 ranks") and len(lines) == 9
    for line in lines:
        _, _, first, _, following, _, _, _, memory, _ = line.split()
        assert float(first) < 1 and int(memory) < 300
        assert float(following) < 5, "on a machine of its own it is below 1 ms: vitdist bench plan"


def test_what_does_not_fit_is_a_line() -> None:
    command = [sys.executable, "-m", "vitdist", "bench", "plan", "--samples", "1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "do not fill" in done.stderr
