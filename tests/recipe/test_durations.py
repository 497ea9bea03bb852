"""Durations, batch arithmetic, and what may change when a run goes on."""

from __future__ import annotations

import pytest

from vitdist.errors import RecipeError
from vitdist.recipe import BatchSplit, Duration, differences, frozen_differences, parse_recipe, split_batch


@pytest.mark.parametrize("text", ["90ep", "5000steps", "30min", "1.5h", "0.5ep", "20s"])
def test_durations_keep_what_was_written(text: str) -> None:
    assert str(Duration.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "ep", "-1ep", "1e3steps", "1.5steps", "1 ep", "1EP", "1d", "١ep", "1ep\n", "9" * 13 + "ep"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        Duration.parse(text)


def test_lengths() -> None:
    assert Duration.parse("3ep").steps(125) == 375
    assert Duration.parse("0.5ep").steps(125) == 63
    assert Duration.parse("0.1ep").steps(10) == 1
    assert Duration.parse("7steps").steps(125) == 7
    assert Duration.parse("1.5h").seconds == 5400


def test_batches_that_divide() -> None:
    assert split_batch(48, 2, None) == BatchSplit(24, 1)
    assert split_batch(48, 3, 4) == BatchSplit(4, 4)
    assert split_batch(48, 2, 8, mixing=True) == BatchSplit(8, 3)
    for size in range(1, 65):
        for world in range(1, 5):
            if size % world == 0:
                split = split_batch(size, world, None)
                assert world * split.micro_batch_size * split.accumulation == size


@pytest.mark.parametrize(
    ("size", "world", "micro", "mixing", "line"),
    [
        (50, 3, None, False, "50 does not divide over 3 ranks; nearest that do: 48 or 51"),
        (2, 3, None, False, "2 does not divide over 3 ranks; nearest that do: 3"),
        (
            50,
            2,
            None,
            True,
            "50 does not divide over 2 ranks in pairs, as mixup and cutmix want; nearest that do: 48 or 52",
        ),
        (
            48,
            2,
            5,
            False,
            "48 is no multiple of 2 ranks x micro_batch_size 5 = 10; nearest: 40 or 50; or micro_batch_size 6",
        ),
        (50, 4, 8, False, "50 is no multiple of 4 ranks x micro_batch_size 8 = 32; nearest: 32 or 64"),
        (7, 1, 2, False, "7 is no multiple of 1 rank x micro_batch_size 2 = 2; nearest: 6 or 8; or micro_batch_size 1"),
    ],
)
def test_batches_that_do_not(size: int, world: int, micro: int | None, mixing: bool, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        split_batch(size, world, micro, mixing=mixing)
    assert caught.value.problems == [f"train.global_batch_size: {line}"]


def test_mixing_wants_even_micro_batches() -> None:
    with pytest.raises(RecipeError, match="train.micro_batch_size: 3 is odd"):
        split_batch(12, 2, 3, mixing=True)


def _frozen(*overrides: str, steps_per_epoch: int | None = None) -> list[str]:
    text = "data: {path: a}\ntrain: {max_duration: 10ep}\nloss: {level_weights: {species: 1}}\n"
    old, new = parse_recipe(text, "x.yaml"), parse_recipe(text, "x.yaml", overrides)
    assert set(differences(old, new)) >= set(frozen_differences(old, new, steps_per_epoch))
    return frozen_differences(old, new, steps_per_epoch)


def test_what_may_change_in_a_run() -> None:
    free = ["train.max_duration=11ep", "train.max_time=1h", "train.micro_batch_size=8", "data.num_workers=3",
            "data.path=b", "evaluation.batch_size=7", "checkpoint.every=5steps", "checkpoint.keep_last=9",
            "tracking.wandb=offline", "parallel.timeout=20s", "out=elsewhere"]  # fmt: skip
    assert _frozen(*free) == []
    assert _frozen("optimizer.lr=1", "seed=4", "train.max_time=1h") == ["seed", "optimizer.lr"]
    assert _frozen("loss.level_weights.species=2") == ["loss.level_weights"]


def test_a_run_may_grow_but_not_shrink() -> None:
    assert _frozen("train.max_duration=9ep") == ["train.max_duration"]
    assert _frozen("train.max_duration=10ep") == []
    assert _frozen("train.max_duration=5000steps") == ["train.max_duration"]
    assert _frozen("train.max_duration=5000steps", steps_per_epoch=100) == []
    assert _frozen("train.max_duration=999steps", steps_per_epoch=100) == ["train.max_duration"]
