"""Where a run stands: a bar in a terminal, a plain line every ten seconds in a log file."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
_SMOOTHING = 0.9  # of the speed the time left is told from


@dataclass
class Standing:
    """What is shown of a step."""

    step: int
    epoch: int
    loss: float | None
    lr: float
    images_per_second: float
    data_wait: float  # share of the step's time that was spent waiting for data, 0-1
    seconds_left: float | None

    def line(self, total: int) -> str:
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        return (
            f"step {self.step}/{total} · epoch {self.epoch} · loss {loss} · lr {self.lr:.3g} · "
            f"{self.images_per_second:.0f} img/s · data wait {100 * self.data_wait:.0f} % · "
            f"left {duration(self.seconds_left)}"
        )


class Progress:
    """Shown by rank 0 alone; `interactive` says whether stderr is a terminal unless told otherwise.

    Log lines written through logging.StreamHandler while the bar is up should go to the current sys.stderr.
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
        self._speed: float | None = None
        self._last = (start, time.monotonic())
        self._shown = float("-inf")
        self._bar: Bar | None = None
        if show and (sys.stderr.isatty() if interactive is None else interactive):
            self._bar = Bar(
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.description}"),
                console=console or Console(stderr=True),
                transient=False,
            )
            self._task: TaskID = self._bar.add_task("starting", total=total, completed=start)
            self._bar.start()

    def update(
        self, step: int, *, epoch: int, loss: float | None, lr: float, images_per_second: float, data_wait: float
    ) -> None:
        """Tell where the run is; `data_wait` is the share (0-1) of the time spent waiting for data."""
        if not self.show:
            return
        now = time.monotonic()
        self._measure(step, now)
        standing = Standing(step, epoch, loss, lr, images_per_second, data_wait, self._seconds_left(step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=standing.line(self.total))
        elif now - self._shown >= LINE_SECONDS or step == self.total:
            self._shown = now
            log.info("%s", standing.line(self.total))

    def close(self) -> None:
        """Take the bar down, so that later lines stand below it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _measure(self, step: int, now: float) -> None:
        last_step, last_time = self._last
        if step > last_step and now > last_time:
            seconds = (now - last_time) / (step - last_step)
            self._speed = seconds if self._speed is None else _SMOOTHING * self._speed + (1 - _SMOOTHING) * seconds
            self._last = (step, now)

    def _seconds_left(self, step: int) -> float | None:
        return None if self._speed is None else self._speed * max(0, self.total - step)


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
