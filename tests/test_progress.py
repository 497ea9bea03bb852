"""What a terminal and what a log file see of a run."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from vitdist.progress import Progress, duration


def _step(shown: Progress, step: int, loss: float | None = 1.25) -> None:
    line = {"step": step, "epoch": 2, "train/loss": loss, "lr": 3e-4, "images_per_second": 411.7, "data_wait": 0.02}
    shown.update(line)


def test_log_line_says_all_and_comes_every_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("vitdist.progress.time.monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO)
    shown = Progress(100, start=40, interactive=False)
    for step in range(41, 101):
        clock[0] += 0.5
        _step(shown, step)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" · ")[0] for line in lines] == ["step 41/100", "step 61/100", "step 81/100", "step 100/100"]
    assert lines[1] == "step 61/100 · epoch 2 · loss 1.2500 · lr 0.0003 · 412 img/s · data wait 4 % · left 20 s"


def test_terminal_shows_a_bar_with_the_same_words() -> None:
    screen = io.StringIO()
    shown = Progress(10, interactive=True, console=Console(file=screen, force_terminal=True, width=160))
    _step(shown, 1)
    _step(shown, 10, loss=None)
    shown.close()
    text = screen.getvalue()
    assert "100 %" in text and "step 10/10" in text and "412 img/s" in text and "loss -" in text


def test_evaluation_has_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shown = Progress(10, interactive=False)
    shown.update(
        {"step": 5, "val/loss": 0.75, "val/accuracy/genus": 0.9, "val/accuracy/species": 2 / 3, "val/count": 99}
    )
    (record,) = caplog.records
    assert record.getMessage() == "step 5 · val loss 0.7500 · genus 90.00 %, species 66.67 % · of 99"


def test_time_of_an_evaluation_is_not_in_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("vitdist.progress.time.monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO)
    shown = Progress(100, interactive=False)
    for step in range(1, 31):
        clock[0] += 1
        _step(shown, step)
        if step == 20:
            clock[0] += 600
            shown.update({"step": 20, "val/loss": 1.0})
    assert caplog.records[-1].getMessage().endswith("left 1 min 19 s")


def test_other_ranks_show_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO)
    shown = Progress(2, show=False, interactive=True)
    _step(shown, 2)
    shown.close()
    assert not caplog.records and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "?"), (0.4, "0 s"), (59.7, "1 min 00 s"), (750, "12 min 30 s"), (11100, "3 h 05 min"), (187200, "2 d 4 h")],
)
def test_duration_in_words(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words
