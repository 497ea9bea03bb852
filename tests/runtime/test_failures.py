"""From an exception to the exit code and the line of the contract."""

from __future__ import annotations

import errno

import pytest

from vitdist.errors import LostError, ResourceError, VitdistError
from vitdist.runtime.failures import classify


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242",
        "Application timeout caused pair closure",  # a collective beside the one that timed out
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_what_a_lost_peer_makes_collectives_say(text: str) -> None:
    assert isinstance(classify(RuntimeError(text)), LostError)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_takes_nothing(number: int) -> None:
    failure = classify(OSError(number, "what the system says", "run/metrics.jsonl"))
    assert isinstance(failure, ResourceError) and "run/metrics.jsonl" in str(failure)


def test_anything_else_is_a_bug() -> None:
    assert type(classify(RuntimeError("shapes differ"))) is VitdistError
