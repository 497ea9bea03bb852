"""metrics.jsonl: exact floats, whole lines after a crash, one continuous story after a resume."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vitdist.errors import ResourceError
from vitdist.metrics_log import MetricsLog, read_metrics

WRITER = """
import sys
from pathlib import Path
from vitdist.metrics_log import MetricsLog
log = MetricsLog(Path(sys.argv[1]))
for step in range(1, 10**9):
    log.write({"step": step, "train/loss": 1 / step, "note": "x" * (step % 500)})
"""


def _write(path: Path, last: int) -> MetricsLog:
    log = MetricsLog(path)
    for step in range(1, last + 1):
        log.write({"step": step, "train/loss": math.pi / step})
    return log


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = [float(x) for x in np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-100, 100)]
    singles = np.random.default_rng(1).normal(size=200).astype(np.float32)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, value in enumerate(values):
        log.write({"step": step, "x": value, "y": singles[step]})
    lines = read_metrics(log.path)
    assert [line["x"].hex() for line in lines] == [value.hex() for value in values]
    assert [np.float32(line["y"]) for line in lines] == list(singles)


def test_values_that_are_not_finite_are_null_and_marked(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "train/loss": float("nan"), "lr": 0.1})
    log.write({"step": 2, "train/loss": np.float32("inf")})
    assert "NaN" not in log.path.read_text()
    assert read_metrics(log.path) == [
        {"step": 1, "train/loss": None, "lr": 0.1, "nonfinite": True},
        {"step": 2, "train/loss": None, "nonfinite": True},
    ]


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        log.write({"step": step})
        assert len(read_metrics(log.path)) == step


def test_cut_last_line_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 3).close()
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log = MetricsLog(path)
    log.write({"step": 3})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert data[:-5].endswith((tmp_path / "metrics.discarded.jsonl").read_bytes().rstrip(b"\n"))


def test_a_whole_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 2).close()
    path.write_bytes(path.read_bytes()[:-1])
    MetricsLog(path).write({"step": 3})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert not (tmp_path / "metrics.discarded.jsonl").exists()


def test_resume_moves_later_lines_and_goes_on(tmp_path: Path) -> None:
    log = _write(tmp_path / "metrics.jsonl", 9)
    log.write({"step": 9, "val/loss": 1.0})
    assert log.truncate_to(6) == 4
    for step in range(7, 10):
        log.write({"step": step, "again": True})
    assert [line["step"] for line in read_metrics(log.path)] == list(range(1, 10))
    aside = read_metrics(tmp_path / "metrics.discarded.jsonl")
    assert [line["step"] for line in aside] == [7, 8, 9, 9] and "again" not in aside[0]
    assert log.truncate_to(9) == 0


def test_kill_never_leaves_a_line_twice_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(3):
        before = len(read_metrics(path))
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        while len(read_metrics(path)) < before + 200:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        MetricsLog(path).truncate_to(100)
        assert [line["step"] for line in read_metrics(path)][-100:] == list(range(1, 101))
        path.rename(tmp_path / "old.jsonl")


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    log = _write(tmp_path / "metrics.jsonl", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))
    try:
        with pytest.raises(ResourceError, match="cannot write .*metrics.jsonl"):
            log.write({"step": 2, "train/loss": 0.123456789})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log = MetricsLog(log.path)
    log.write({"step": 2})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]
