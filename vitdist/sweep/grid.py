"""From `key=v1,v2` on a command line to the runs it stands for."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vitdist.errors import UsageError

MAX_RUNS = 1000
_UNFIT = re.compile(r"[^A-Za-z0-9._+=-]+")
_LONGEST = 90


@dataclass(frozen=True)
class Setting:
    """One run: what replaces the recipe's values, the name of its folder, and that of its setting without the seed."""

    label: str
    group: str
    overrides: tuple[str, ...]


def settings_of(overrides: Sequence[str], seeds: Sequence[int]) -> list[Setting]:
    """Every combination of the listed values, each with every seed; a key with one value is set for all of them."""
    fixed = [text for text in overrides if len(values_of(text)) == 1]
    listed = [text for text in overrides if len(values_of(text)) > 1]
    for text in overrides:
        _refuse(text, bool(seeds))
    names = _short_names([text.partition("=")[0] for text in listed])
    choices = [[f"{text.partition('=')[0]}={value}" for value in values_of(text)] for text in listed]
    wanted: list[int | None] = [*seeds] or [None]
    found = [
        _setting(fixed, chosen, names, seed)
        for chosen in itertools.product(*choices)
        for seed in wanted
    ]  # fmt: skip
    if len(found) > MAX_RUNS:
        raise UsageError(f"{len(found):,} runs are more than {MAX_RUNS:,}; give shorter lists")
    labels = [setting.label for setting in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} comes twice in the lists; give each value once")
    return found


def _refuse(text: str, with_seeds: bool) -> None:
    key, equals, _ = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} sets no key; write key=v1,v2, such as optimizer.lr=1e-4,3e-4")
    if key in ("name", "out"):
        raise UsageError(f"{key} is given to each run by the sweep; --out DIR says where all of them go")
    if key == "seed" and with_seeds:
        raise UsageError("seed is listed and --seeds given; give one of them")


def values_of(text: str) -> list[str]:
    """The values of `key=v1,v2`; commas inside brackets, braces and quotes are the value's own."""
    written = text.partition("=")[2]
    values, depth, quote, start = [], 0, "", 0
    for index, letter in enumerate(written):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            values.append(written[start:index].strip())
            start = index + 1
    return [*values, written[start:].strip()]


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each dotted key where that is enough to tell them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _setting(fixed: Sequence[str], chosen: Sequence[str], names: dict[str, str], seed: int | None) -> Setting:
    pairs = [text.partition("=")[::2] for text in chosen]
    group = "_".join(f"{names[key]}={value}" for key, value in pairs) or "recipe"
    seeded = [] if seed is None else [f"seed={seed}"]
    label = "_".join([*([group] if pairs or not seeded else []), *seeded])
    return Setting(_file_name(label), group, (*fixed, *chosen, *seeded))


def _file_name(label: str) -> str:
    """The label as a folder's name; what cannot stand in one, or is too long, is told apart by a few digits."""
    name = _UNFIT.sub("-", label).strip("-.")
    if name == label and len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 7]}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"
