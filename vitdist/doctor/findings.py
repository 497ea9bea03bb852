"""One line a finding; one that needs a mend says it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was found; `mend` is what to do about it, empty where nothing needs doing."""

    topic: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{'MEND' if self.mend else 'ok':5s}{self.topic:10s} {self.text}"
        return " ".join(f"{line}: {self.mend}".split("\n")) if self.mend else line


def show(findings: Iterable[Finding]) -> int:
    """Print them as they come; how many need a mend."""
    num_bad = 0
    for finding in findings:
        print(finding, flush=True)
        num_bad += bool(finding.mend)
    return num_bad
