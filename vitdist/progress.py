"""Where a run stands: a bar in a terminal, a plain line every ten seconds in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
_SMOOTHING = 0.9  # of the step time and the data wait that are shown


class Progress:
    """Shown by rank 0 alone; `interactive` says whether stderr is a terminal, which is found out unless told.

    Log lines written while the bar is up should go to the current sys.stderr, which the bar then keeps below them.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        show: bool = True,
        interactive: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self.total, self.show = total, show
        self._step_seconds: float | None = None
        self._wait_seconds = 0.0
        self._last = (start, time.monotonic())
        self._shown = float("-inf")
        self._bar: Bar | None = None
        if show and (sys.stderr.isatty() if interactive is None else interactive):
            columns = (
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=console or Console(stderr=True))
            self._task: TaskID = self._bar.add_task("starting", total=total, completed=start)
            self._bar.start()

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl: of a training step, or of an evaluation."""
        if not self.show:
            return
        if "lr" not in line:
            self._evaluated(line)
            return
        now, step = time.monotonic(), int(line["step"])
        self._measure(step, now, float(line.get("data_wait") or 0.0))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._words(line))
        elif now - self._shown >= LINE_SECONDS or step == self.total:
            self._shown = now
            log.info("%s", self._words(line))

    def close(self) -> None:
        """Take the bar down, so that later lines stand below it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _evaluated(self, line: Mapping[str, Any]) -> None:
        shares = [f"{key.removeprefix('val/accuracy/')} {100 * value:.2f} %" for key, value in _accuracies(line)]
        log.info(
            "step %s · val loss %s · %s · of %s", line["step"], _loss(line, "val/loss"), ", ".join(shares), _count(line)
        )
        self._last = (int(line["step"]), time.monotonic())  # an evaluation's time is no step's

    def _measure(self, step: int, now: float, wait: float) -> None:
        last_step, last_time = self._last
        if step > last_step and now > last_time:
            seconds = (now - last_time) / (step - last_step)
            keep = 0.0 if self._step_seconds is None else _SMOOTHING
            self._step_seconds = keep * (self._step_seconds or 0.0) + (1 - keep) * seconds
            self._wait_seconds = keep * self._wait_seconds + (1 - keep) * wait
            self._last = (step, now)

    def _words(self, line: Mapping[str, Any]) -> str:
        step, seconds = int(line["step"]), self._step_seconds
        wait = min(1.0, self._wait_seconds / seconds) if seconds else 0.0
        left = None if seconds is None else seconds * max(0, self.total - step)
        return (
            f"step {step}/{self.total} · epoch {line.get('epoch', '?')} · loss {_loss(line, 'train/loss')} · "
            f"lr {line['lr']:.3g} · {line.get('images_per_second') or 0:.0f} img/s · "
            f"data wait {100 * wait:.0f} % · left {duration(left)}"
        )


def _accuracies(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in line.items() if key.startswith("val/accuracy/") and value is not None]


def _loss(line: Mapping[str, Any], key: str) -> str:
    value = line.get(key)
    return "-" if value is None else f"{value:.4f}"


def _count(line: Mapping[str, Any]) -> str:
    count, expected = line.get("val/count"), line.get("val/expected")
    return f"{count}" if expected in (None, count) else f"{count}, {expected} expected"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 48 s, 12 min 30 s, 3 h 05 min, 2 d 4 h."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
