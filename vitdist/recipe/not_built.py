"""Values the schema knows and this version cannot do yet: taking a line out of this table is what opens a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vitdist.recipe.rules import Conflict
from vitdist.recipe.schema import Recipe

Test = Callable[[Any], bool]

NOT_BUILT: tuple[tuple[str, Test, str], ...] = (
    ("train.micro_batch_size", lambda value: value == "auto", "use a number, or null for the whole share of a rank"),
)


def not_built(recipe: Recipe) -> Iterator[Conflict]:
    """One line for each value that a later version will take."""
    values = recipe.flat()
    for key, asked, instead in NOT_BUILT:
        if asked(values[key]):
            yield Conflict((key,), f"not built yet: {str(values[key]).lower()}; {instead}")
