"""Where log lines go: rank 0's to the terminal and train.log, every other rank's to a file of its own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever sys.stderr is now: a progress bar puts its own there while it is up."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start(run_dir: Path | None, rank: int) -> Path | None:
    """Set up the `vitdist` logger for this process; returns the file it writes."""
    logger = logging.getLogger("vitdist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    if rank == 0:
        terminal = _Terminal()
        terminal.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(terminal)
    if run_dir is None:
        return None
    path = run_dir / "train.log" if rank == 0 else run_dir / "logs" / f"rank_{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter(_FORMAT))
    logger.addHandler(file)
    return path


def only_to_file(logger: logging.Logger, message: str, error: BaseException) -> None:
    """A traceback for whoever looks for it; the terminal shows one line instead."""
    record = logger.makeRecord(
        logger.name, logging.ERROR, __file__, 0, message, (), (type(error), error, error.__traceback__)
    )
    for handler in logging.getLogger("vitdist").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
