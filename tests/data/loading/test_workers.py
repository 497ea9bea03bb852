"""Loader workers that hang at their start are replaced; the batches are the same."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vitdist.data.loading import workers
from vitdist.data.loading.workers import StartedLoader
from vitdist.errors import LostError


def frozen(started: Path, times: int, number: int) -> Callable[[int], None]:
    """A start of worker `number` that hangs, deaf to everything, the first `times` times."""

    def start(own: int) -> None:
        if own == number and (count := len(started.read_bytes())) < times:
            started.write_bytes(b"1" * (count + 1))
            time.sleep(600)

    return start


def num_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_worker_that_hangs_at_its_start_is_replaced(
    tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PATIENCE", (1.0, 5.0))
    caplog.set_level(logging.WARNING)
    started = tmp_path / "started"
    started.write_bytes(b"1")
    loader = StartedLoader(
        range(40), num_workers=num_workers, multiprocessing_context="fork", batch_size=None,
        worker_start=frozen(started, 1, num_workers - 1),
    )  # fmt: skip
    assert list(loader) == list(range(40)) and not caplog.text
    descriptors = num_descriptors()
    started.write_bytes(b"")
    begun = time.monotonic()
    assert list(loader) == list(range(40))
    assert 1 < time.monotonic() - begun < 20 and caplog.text.count("started anew") == 1
    assert multiprocessing.active_children() == []
    assert num_descriptors() <= descriptors


def test_workers_that_never_start_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", (0.5,))
    started = tmp_path / "started"
    started.touch()
    loader = StartedLoader(
        range(4), num_workers=1, multiprocessing_context="fork", batch_size=None, worker_start=frozen(started, 9, 0)
    )
    with pytest.raises(LostError, match=r"data\.num_workers=0"):
        iter(loader)
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_at_its_start_is_torchs_to_tell() -> None:
    loader = StartedLoader(
        range(4), num_workers=1, multiprocessing_context="fork", batch_size=None, worker_start=lambda _: os._exit(3)
    )
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loader)
