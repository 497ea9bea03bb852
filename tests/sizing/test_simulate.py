"""`vitdist plan --simulate W`: the promises hold for real plans, and each kind of broken one is caught."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.conftest import Recipes
from vitdist.cli import main
from vitdist.data.plan import Slots, TrainPlan
from vitdist.data.views import everything
from vitdist.recipe import BatchSplit, load_recipe
from vitdist.schedules import Plateau, Schedule
from vitdist.sizing import simulate
from vitdist.sizing.source import source_of

WORLD, SIZE = 4, 24


@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_the_recipes_own_plan_holds(world: int, tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_recipe()), "--simulate", str(world)]) == 0
    text = capsys.readouterr().out
    assert text.count("holds") == 7 and "BROKEN" not in text


def test_sixty_four_ranks_in_seconds(tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    drawn = ["--simulate", "64", "--samples", "40000", "--shards", "40", "train.global_batch_size=1024"]
    for sampling in ("uniform", "sqrt"):
        assert main(["plan", str(tiny_recipe()), *drawn, f"data.sampling={sampling}"]) == 0
        assert "BROKEN" not in capsys.readouterr().out
    assert time.monotonic() - started < 40


class Broken(TrainPlan):
    """A plan whose answers are spoiled: by `spoil`, and only from the `after`-th plan that is made on."""

    spoil: Callable[[Slots], Slots]

    def slots(self, position: int, start: int, stop: int) -> Slots:
        return self.spoil(super().slots(position, start, stop))


def makers(spoil: Callable[[Slots], Slots], tiny_recipe: Recipes, *, first: int = 0) -> simulate.MakePlan:
    """Plans of the tiny set; those from the `first` on are broken."""
    recipe = load_recipe(tiny_recipe())
    source, made = source_of(recipe, None, None), 0

    def make() -> TrainPlan:
        nonlocal made
        plan = source.plan(recipe)
        made += 1
        if made > first:
            plan.__class__ = Broken
            plan.spoil = spoil  # type: ignore[attr-defined]
        return plan

    return make


def changed(slots: Slots, **values: object) -> Slots:
    return Slots(**{**slots.__dict__, **values})  # type: ignore[arg-type]


def one_repeated(slots: Slots) -> Slots:
    rows = slots.rows.copy()
    if slots.position == 3 and slots.start == 0:
        rows[1] = rows[0]
    return changed(slots, rows=rows)


def shifted(slots: Slots) -> Slots:
    return changed(slots, rows=slots.rows[::-1])


def other_seed(slots: Slots) -> Slots:
    return changed(slots, seeds=slots.seeds + np.uint64(slots.start == 6))


def one_short(slots: Slots) -> Slots:
    drop = slots.start == 18 and slots.position == 2
    return changed(slots, rows=slots.rows[drop:], seeds=slots.seeds[drop:])


@pytest.mark.parametrize(
    ("spoil", "first", "promise"),
    [
        (one_repeated, 0, "each sample at most once an epoch"),
        (shifted, 1, "the order of one rank"),
        (other_seed, 1, "the order of one rank"),
        (one_short, 1, "equal batches on all ranks"),
    ],
)
def test_a_broken_plan_is_caught(
    spoil: Callable[[Slots], Slots], first: int, promise: str, tiny_recipe: Recipes
) -> None:
    batch = BatchSplit(SIZE // WORLD, 1)
    findings = simulate.train_order(makers(spoil, tiny_recipe, first=first), WORLD, batch, each_once=True)
    assert promise in {found.promise for found in findings if found.fault}


def test_a_loader_that_disagrees_is_caught(tiny_recipe: Recipes) -> None:
    assert simulate.loader_order(makers(shifted, tiny_recipe, first=99), WORLD, BatchSplit(3, 2)).fault is None
    assert simulate.loader_order(makers(shifted, tiny_recipe, first=2), WORLD, BatchSplit(3, 2)).fault


def test_cut_pairs_are_caught() -> None:
    assert simulate.mixing_pairs(24, 4, BatchSplit(6, 1)).fault is None
    assert simulate.mixing_pairs(24, 8, BatchSplit(3, 1)).fault
    assert simulate.mixing_pairs(24, 4, BatchSplit(3, 2)).fault


def test_an_evaluation_of_another_view_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    view = everything(np.array([0, 50, 97]))
    assert simulate.evaluation_order(view, 5, 7).fault is None
    monkeypatch.setattr(
        simulate, "evaluation_span", lambda n, rank, world: (rank * (n // world), (rank + 1) * (n // world))
    )
    assert simulate.evaluation_order(view, 5, 7).fault


def test_ranks_that_disagree_on_the_rate_are_caught() -> None:
    def plateau(rank: int) -> Schedule:
        return Plateau(1.0, patience=1, threshold=0.02)

    assert simulate.schedules(plateau, 4, 200, 10).fault is None

    def forgetful(rank: int) -> Schedule:
        schedule = plateau(rank)
        schedule.load_state_dict = lambda state: None  # type: ignore[method-assign]
        return schedule

    assert "rank 1" in str(simulate.schedules(forgetful, 4, 200, 10).fault)
    assert "rank 2" in str(simulate.schedules(lambda rank: Schedule(2.0 if rank == 2 else 1.0), 4, 200, 10).fault)
