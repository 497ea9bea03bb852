"""What a terminal and what a log file see of a run."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from vitdist import progress
from vitdist.progress import Progress, duration


def _step(shown: Progress, step: int, loss: float | None = 1.25) -> None:
    shown.update(step, epoch=2, loss=loss, lr=3e-4, images_per_second=411.7, data_wait=0.034)


def test_log_line_says_all_and_comes_every_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO)
    shown = Progress(100, start=40, interactive=False)
    for step in range(41, 101):
        clock[0] += 0.5
        _step(shown, step)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" · ")[0] for line in lines] == ["step 41/100", "step 61/100", "step 81/100", "step 100/100"]
    assert lines[1] == "step 61/100 · epoch 2 · loss 1.2500 · lr 0.0003 · 412 img/s · data wait 3 % · left 20 s"


def test_terminal_shows_a_bar_with_the_same_words() -> None:
    screen = io.StringIO()
    shown = Progress(10, interactive=True, console=Console(file=screen, force_terminal=True, width=160))
    _step(shown, 1)
    _step(shown, 10, loss=None)
    shown.close()
    text = screen.getvalue()
    assert "100 %" in text and "step 10/10" in text and "412 img/s" in text and "loss -" in text


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
