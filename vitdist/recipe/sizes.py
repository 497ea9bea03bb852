"""Sizes of a recipe: `50GB`, `1.5TiB`; they stay as they were written."""

from __future__ import annotations

import re

ALLOWED = "a size like 50GB or 500GiB, or null"
_BYTES = {f"{letter}{kind}": base**power
          for power, letter in enumerate("KMGT", 1) for kind, base in (("B", 1000), ("iB", 1024))}  # fmt: skip
_FORM = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([KMGT]i?B)", re.ASCII)


def num_bytes(text: str) -> int:
    """The bytes of a size; ValueError when it is none."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError("is no size with a unit")
    size = int(float(match[1]) * _BYTES[match[2]])
    if not size:
        raise ValueError("holds nothing")
    return size


def checked(text: str) -> str:
    """The text itself, if it is a size."""
    num_bytes(text)
    return text
