"""What is wrong with a recipe, and where: one line a problem."""

from __future__ import annotations

from dataclasses import dataclass

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Place:
    """Where something stands: a line of a file, or the command line."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One mistake, as the user reads it."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def ordered(problems: list[Problem]) -> list[str]:
    """The lines to print: file by file in the order read, by line, the command line last, none twice."""
    files = list(dict.fromkeys(problem.place.file for problem in problems))
    files.sort(key=lambda file: file == COMMAND_LINE)
    ranked = sorted(problems, key=lambda problem: (files.index(problem.place.file), problem.place.line))
    return list(dict.fromkeys(str(problem) for problem in ranked))


def short(text: str, limit: int = 60) -> str:
    """Foreign text fit for one line: cut, and without characters that move the cursor."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
