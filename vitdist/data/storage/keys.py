"""WebDataset's naming: what belongs to one sample, and what may stand in a key of ours."""

from __future__ import annotations

import re

_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name, or None where it belongs to no sample.

    As `webdataset` splits: the key ends at the first dot of the base name and keeps its folders; the suffix is in
    lower case.
    """
    if _META.match(name):
        return None
    match = _MEMBER.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else None


def plain(text: str, limit: int = 60) -> str:
    """`text` with everything but ASCII letters, digits, '-' and '_' replaced, so that it is safe in a key."""
    return _UNSAFE.sub("_", text).strip("_")[:limit]
