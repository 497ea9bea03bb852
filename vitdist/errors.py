"""The error family: each kind of failure carries the exit code of the contract and renders as one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class VitdistError(Exception):
    """A failure the user can act on; `exit_code` is what the process ends with."""

    exit_code = 1
    spoken_elsewhere = False  # another rank prints it
    log: Path | None = None  # where a bug's traceback stands


class UsageError(VitdistError):
    """A command line, environment or run folder that cannot be used as asked."""

    exit_code = 2


class RecipeError(VitdistError):
    """Mistakes in a recipe, all of them at once: one line a problem."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(VitdistError):
    """A checkpoint that is missing, damaged or of another class tree."""

    exit_code = 3


class DataError(VitdistError):
    """Data that is missing, damaged or not what its index says."""

    exit_code = 4


class NonFiniteError(VitdistError):
    """Losses or gradients that stayed NaN or infinite."""

    exit_code = 5


class LostError(VitdistError):
    """A peer, the network or a device went away."""

    exit_code = 6


class OwnLoss(LostError):
    """Something of this rank alone went away: a loader worker, or the lock on the run's folder. No peer is to blame."""


class ResourceError(VitdistError):
    """Disk, memory or a device that is not there."""

    exit_code = 7


class Stopped(VitdistError):
    """The run was asked to stop and can be resumed."""

    exit_code = 75


def lines(error: BaseException) -> list[str]:
    """What the user reads: one line a problem, without a traceback and without line breaks inside."""
    problems = error.problems if isinstance(error, RecipeError) else [str(error) or type(error).__name__]
    return [" ".join(problem.split()) for problem in problems]
