"""One decides, all agree: work done on rank 0 whose result, or failure, is the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitdist.errors import VitdistError
from vitdist.runtime.engine import Engine
from vitdist.runtime.failures import classify


class FailedElsewhere(VitdistError):
    """Another rank failed and said so: this one ends with the same code and prints nothing."""

    spoken_elsewhere = True

    def __init__(self, code: int, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exit_code = code
        self.rank = rank


def on_main(engine: Engine, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 only; its JSON value is returned on every rank. Collective.

    When it fails, every rank raises: rank 0 the error itself, the others FailedElsewhere with its exit code.
    """
    failure: BaseException | None = None
    said: dict[str, Any] = {}
    if engine.is_main:
        try:
            said = {"value": work()}
        except Exception as error:  # whatever it is, the others must hear of it before it goes on
            failure = error
            said = {"code": classify(error).exit_code, "message": str(error)}
    said = engine.from_main(said)
    if failure is not None:
        raise failure
    if "code" in said:
        raise FailedElsewhere(said["code"], 0, said["message"])
    return said["value"]


def everywhere(engine: Engine, work: Callable[[], Any]) -> Any:
    """Run `work` on every rank; when it fails on any, all raise, and the lowest failing rank speaks. Collective."""
    failure: BaseException | None = None
    value: Any = None
    try:
        value = work()
    except Exception as error:  # as above
        failure = error
    code = classify(failure).exit_code if failure is not None else 0
    outcomes = engine.gather_json([code, str(failure) if failure is not None else ""])
    failed = [(rank, code, text) for rank, (code, text) in enumerate(outcomes) if code]
    if not failed:
        return value
    rank, code, text = failed[0]
    if failure is not None and rank == engine.rank:
        raise failure
    raise FailedElsewhere(code, rank, text)
