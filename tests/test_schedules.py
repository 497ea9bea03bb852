from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from vitdist.errors import CheckpointError, UsageError
from vitdist.schedules import Plateau, Schedule, build_schedule


def test_warm_up_is_linear_and_ends_at_the_rule() -> None:
    schedule = build_schedule("constant", 0.2, warmup=4)
    assert [schedule.factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.lr(1) == pytest.approx(0.1)
    assert build_schedule("constant", 0.2).factor(0) == 1.0


def test_a_cosine_falls_from_the_base_rate_to_the_lowest() -> None:
    schedule = build_schedule("cosine", 1.0, warmup=10, total_steps=110, min_lr=0.1)
    factors = [schedule.factor(step) for step in range(111)]
    assert factors[9] == factors[10] == 1.0 and factors[110] == pytest.approx(0.1)
    assert factors[60] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.factor(500) == pytest.approx(0.1)


def test_warm_up_scales_the_plateau_too() -> None:
    schedule = build_schedule("plateau", 1.0, warmup=10, factor=0.5, patience=0)
    schedule.observe(1.0)
    assert schedule.factor(4) == 0.5 and schedule.observe(1.0)
    assert schedule.factor(4) == 0.25 and schedule.factor(9) == schedule.factor(100) == 0.5


def metrics(rng: random.Random, length: int) -> list[float]:
    """A walk with plateaus, small improvements near the threshold, jumps, signs, NaN and infinities."""
    value, walk = rng.choice([1.0, -1.0, 50.0, 0.0]), []
    for _ in range(length):
        value += rng.choice([0.0, 0.0, -1e-4, -1e-2, -0.1, 0.05, 1e-3, 0.3])
        walk.append(rng.choice([math.nan, math.inf, -math.inf]) if rng.random() < 0.02 else value)
    return walk


def rule(rng: random.Random) -> dict[str, float | int | str]:
    return {
        "mode": rng.choice(["min", "max"]),
        "factor": rng.choice([0.1, 0.5, 0.9]),
        "patience": rng.choice([0, 1, 3, 7]),
        "threshold": rng.choice([0.0, 1e-4, 1e-2, 0.2]),
        "threshold_mode": rng.choice(["rel", "abs"]),
        "cooldown": rng.choice([0, 1, 4]),
        "min_lr": rng.choice([0.0, 1e-4, 0.05]),
    }


@pytest.mark.parametrize("seed", range(60))
def test_plateau_is_torch_s_own_trace(seed: int) -> None:
    """Bit for bit, with the state written as JSON and read into a new object somewhere in the middle."""
    rng = random.Random(seed)
    options = rule(rng)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = ReduceLROnPlateau(optimizer, **options)  # type: ignore[arg-type]
    schedule = Plateau(0.3, **options)  # type: ignore[arg-type]
    restart = rng.randrange(80)
    for index, metric in enumerate(metrics(rng, 80)):
        if index == restart:
            state = json.loads(json.dumps(schedule.state_dict(), allow_nan=False))
            schedule = Plateau(0.3, **options)  # type: ignore[arg-type]
            schedule.load_state_dict(state)
        before = optimizer.param_groups[0]["lr"]
        reference.step(metric)
        after = optimizer.param_groups[0]["lr"]
        assert schedule.observe(metric) == (after != before)
        assert schedule.current_lr == after
        assert schedule.factor(0) == after / 0.3


def test_the_traces_do_cut_the_rate() -> None:
    """The comparison above would pass on rates that never move; most of these do."""
    moved = 0
    for seed in range(60):
        rng = random.Random(seed)
        schedule = Plateau(0.3, **rule(rng))  # type: ignore[arg-type]
        moved += any([schedule.observe(metric) for metric in metrics(rng, 80)])
    assert moved > 40


def test_patience_counts_evaluations_and_a_threshold_is_relative() -> None:
    schedule = build_schedule("plateau", 1.0, mode="max", factor=0.1, patience=2, threshold=0.01)
    cuts = [schedule.observe(metric) for metric in (0.50, 0.502, 0.504, 0.5045, 0.52, 0.52)]
    assert cuts == [False, False, False, True, False, False]


def test_a_steady_improvement_is_never_cut_however_often_it_is_asked() -> None:
    schedule = build_schedule("plateau", 1.0, patience=0)
    assert not any(schedule.observe(1.0 / index) for index in range(1, 50))


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(CheckpointError, match="plateau"):
        build_schedule("plateau", 1.0).load_state_dict({"lr": 1.0})


def test_rules_without_state_take_any_metric() -> None:
    for name in ("constant", "cosine"):
        schedule: Schedule = build_schedule(name, 1.0, total_steps=10)
        assert not schedule.observe(5.0) and schedule.state_dict() == {}
        schedule.load_state_dict({})


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UsageError, match="max_duration"):
        build_schedule("cosine", 1.0)
    with pytest.raises(UsageError, match="plateau, cosine, constant"):
        build_schedule("cosin", 1.0)
