"""Durations of a recipe: `90ep`, `5000steps`, `30min`, `1.5h`; number and unit stay as they were written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

SECONDS = {"s": 1, "min": 60, "h": 3600}
EXAMPLES = {"ep": "30ep", "steps": "5000steps", "s": "90s", "min": "30min", "h": "2h"}
ALIASES = {"ep": ("e", "epoch", "epochs"), "steps": ("step", "it", "iter", "iters"), "s": ("sec", "secs", "seconds"),
           "min": ("m", "mins", "minute", "minutes"), "h": ("hr", "hrs", "hour", "hours")}  # fmt: skip

_FORM = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ep|steps|s|min|h)", re.ASCII)
_LOOSE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)[ _]*([a-z]*)", re.ASCII)


@dataclass(frozen=True)
class Duration:
    """A number of epochs, steps, seconds, minutes or hours."""

    value: float
    unit: str

    @staticmethod
    def parse(text: str) -> Duration:
        """Read `90ep`; ValueError when it is none."""
        match = _FORM.fullmatch(text)
        if match is None or (match[2] == "steps" and "." in match[1]):
            raise ValueError("is no duration")
        return Duration(float(match[1]) if "." in match[1] else int(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}" if isinstance(self.value, float) else f"{self.value}{self.unit}"

    @property
    def is_time(self) -> bool:
        """Whether it is measured by the clock."""
        return self.unit in SECONDS

    @property
    def seconds(self) -> float:
        """Its length by the clock; only for `is_time`."""
        assert self.is_time, f"{self} is not measured by the clock"
        return self.value * SECONDS[self.unit]

    def steps(self, steps_per_epoch: int) -> int:
        """Its length in global batches, a part of one rounded up; not for `is_time`."""
        assert not self.is_time, f"{self} is measured by the clock"
        exact = self.value * (steps_per_epoch if self.unit == "ep" else 1)
        return -int(-exact // 1)


def meant(text: str, units: tuple[str, ...]) -> str | None:
    """The duration somebody probably meant by `90 epochs`, among those of the given units."""
    match = _LOOSE.fullmatch(text.strip().lower())
    if match is None:
        return None
    for unit in units:
        if match[2] == unit or match[2] in ALIASES[unit]:
            return match[1] + unit if unit != "steps" or "." not in match[1] else None
    return None


@dataclass(frozen=True)
class DurationOf:
    """Annotation of a recipe key: a Duration in one of some units, zero only where it means something."""

    units: tuple[str, ...]
    zero: bool = False

    @property
    def allowed(self) -> str:
        return "a duration like " + " or ".join(EXAMPLES[unit] for unit in self.units)

    def check(self, value: Any) -> Duration:
        """Validate a written or ready Duration; the message of the ValueError says what is wrong with it."""
        if isinstance(value, str):
            value = Duration.parse(value)
        if not isinstance(value, Duration):
            raise ValueError("has no unit" if type(value) in (int, float) else "is no duration")
        if value.unit not in self.units:
            raise ValueError("is not in a unit that fits here")
        if not value.value and not self.zero:
            raise ValueError("is no time at all")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.check, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        fractional = [unit for unit in self.units if unit != "steps"]
        forms = [rf"[0-9]+(\.[0-9]+)?({'|'.join(fractional)})"] if fractional else []
        forms += ["[0-9]+steps"] if "steps" in self.units else []
        return {"type": "string", "pattern": f"^({'|'.join(forms)})$", "examples": [EXAMPLES[u] for u in self.units]}
