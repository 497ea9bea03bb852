"""Views: equal to timm's and torchvision's where they should be, and pure functions of (bytes, seed)."""

from __future__ import annotations

import io
import math
import pickle
import random
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from vitdist.data.pixels.augmentations import (
    NUM_BOX_DRAWS,
    apply_auto,
    erased_box,
    jitter_colour,
    noise_levels,
    random_crop,
    rotate,
)
from vitdist.data.pixels.images import Pixels, decode, decode_scaled, read_header
from vitdist.data.pixels.transforms import (
    Augment,
    EvalTransform,
    Preprocessing,
    TrainTransform,
    evaluation_view,
    resize,
)
from vitdist.data.seeds import hash_words, uniform
from vitdist.errors import CheckpointError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FULL = Augment((0.2, 1.0), flip=0.5, rotation=15, color_jitter=(0.4, 0.4, 0.4, 0.1), auto="trivialaugment", erasing=0.5)


def preprocessing(size: int = 96, **changes: Any) -> Preprocessing:
    return Preprocessing(size, MEAN, STD, **changes)


def photograph(height: int = 240, width: int = 320, seed: int = 0) -> Pixels:
    """Smooth shapes with some texture."""
    chance = np.random.default_rng(seed)
    coarse = cv2.resize(
        chance.integers(0, 256, (8, 10, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(coarse + chance.normal(0, 12, coarse.shape), 0, 255).astype(np.uint8)


def view_of(transform: TrainTransform, data: bytes, seed: int) -> Pixels:
    return transform(data, transform.draw([seed])[0])


def jpeg(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


PHOTO = photograph()
DATA = jpeg(PHOTO)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(96, 96), (224, 280), (241, 319), (480, 640), (30, 500)])
def test_resize_is_pil_within_one_level(shape: tuple[int, int], interpolation: Any) -> None:
    by_pil = Image.fromarray(PHOTO).resize(shape[::-1], Image.Resampling[interpolation.upper()])
    ours = resize(PHOTO, *shape, interpolation)
    difference = np.abs(ours.astype(int) - np.asarray(by_pil))
    assert ours.flags.c_contiguous and difference.max() <= 1 and difference.mean() < 0.25
    crop = PHOTO[7:200, 11:250]  # a view with the whole picture's strides
    assert np.array_equal(resize(crop, *shape, interpolation), resize(crop.copy(), *shape, interpolation))


@pytest.mark.parametrize("size,crop_pct", [(96, 1.0), (96, 0.875), (112, 0.9), (98, 0.95)])
@pytest.mark.parametrize("shape", [(240, 320), (320, 240), (200, 200), (113, 401), (60, 80)])
def test_evaluation_view_is_timms(shape: tuple[int, int], size: int, crop_pct: float) -> None:
    data = jpeg(photograph(*shape))
    steps = create_transform(
        (3, size, size), interpolation="bicubic", crop_pct=crop_pct, mean=MEAN, std=STD, normalize=False
    )
    expected = steps(Image.open(io.BytesIO(data)).convert("RGB")).permute(1, 2, 0).numpy()
    difference = np.abs(EvalTransform(preprocessing(size, crop_pct=crop_pct))(data).astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.02


def test_evaluation_view_of_a_large_photograph_is_near_timms_though_decoded_small() -> None:
    data = jpeg(cv2.resize(photograph(seed=1), (2000, 1500), interpolation=cv2.INTER_CUBIC))
    expected = create_transform((3, 96, 96), interpolation="bicubic", crop_pct=1.0, normalize=False)(
        Image.open(io.BytesIO(data)).convert("RGB")
    )
    difference = np.abs(EvalTransform(preprocessing())(data).astype(int) - expected.permute(1, 2, 0).numpy())
    assert difference.mean() < 1.5


def test_strips_and_small_pictures() -> None:
    for shape in ((1, 5000), (5000, 1), (1, 1), (3, 7)):
        data = jpeg(np.full((*shape, 3), 90, np.uint8))
        for view in (
            EvalTransform(preprocessing())(data),
            view_of(TrainTransform(preprocessing(), Augment()), data, 1),
        ):
            assert view.shape == (96, 96, 3) and abs(view.mean() - 90) < 2


def test_a_view_is_a_pure_function_of_bytes_and_seed() -> None:
    transform, again = (TrainTransform(preprocessing(), FULL) for _ in range(2))
    seeds = [0, 1, 2**63, 2**64 - 1, 12345]
    first = [view_of(transform, DATA, seed) for seed in seeds]
    for view in first:
        assert view.dtype == np.uint8 and view.shape == (96, 96, 3) and view.flags.c_contiguous and view.flags.writeable
    second = [view_of(again, DATA, seed) for seed in reversed(seeds)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(not np.array_equal(first[0], other) for other in first[1:])
    sent = pickle.loads(pickle.dumps(transform))  # as to a worker that was spawned
    assert np.array_equal(view_of(sent, DATA, 7), view_of(transform, DATA, 7))


@pytest.mark.parametrize("auto", ["none", "trivialaugment", "randaugment"])
def test_global_generators_are_left_alone(auto: Any) -> None:
    transform = TrainTransform(preprocessing(), Augment(auto=auto, color_jitter=0.4, erasing=0.5))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    views = [view_of(transform, DATA, seed) for seed in range(4)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert all(np.array_equal(view_of(transform, DATA, seed), view) for seed, view in enumerate(views))


@pytest.mark.parametrize("auto", ["trivialaugment", "randaugment"])
def test_the_number_of_threads_changes_nothing(auto: Any) -> None:
    transform = TrainTransform(
        preprocessing(256), Augment((0.5, 1), rotation=20, color_jitter=0.4, auto=auto, erasing=0.5)
    )
    torch_threads, opencv_threads, views = torch.get_num_threads(), cv2.getNumThreads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads), cv2.setNumThreads(threads)
            views.append([view_of(transform, DATA, seed) for seed in range(20)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(torch_threads), cv2.setNumThreads(opencv_threads)
    assert all(np.array_equal(a, b) for a, b in zip(*views, strict=True))


def test_automatic_operations_run_on_one_thread() -> None:
    threads: list[int] = []

    def operation(planes: torch.Tensor) -> torch.Tensor:
        threads.append(torch.get_num_threads())  # a mean of floats over a large picture would depend on it
        return planes

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        apply_auto(operation, PHOTO, 1)
        threads.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 3]


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    transform = TrainTransform(preprocessing(crop_pct=0.9), Augment(crop_scale=(1, 1), flip=0))
    assert np.array_equal(view_of(transform, DATA, 5), evaluation_view(DATA, preprocessing(crop_pct=0.9)))


def test_switching_one_augmentation_leaves_the_others() -> None:
    plain = TrainTransform(preprocessing(), Augment((0.3, 1), flip=0.5))
    jittered = TrainTransform(
        preprocessing(), Augment((0.3, 1), flip=0.5, color_jitter=(0.0, 0.0, 0.0, 1e-6), erasing=0.3)
    )
    same = [
        np.abs(view_of(plain, DATA, seed).astype(int) - view_of(jittered, DATA, seed)).max() <= 1 for seed in range(60)
    ]
    assert 0.5 < np.mean(same) < 0.9  # those that are not have their rectangle erased


def test_flip_mirrors() -> None:
    transforms = (TrainTransform(preprocessing(), Augment((0.3, 1), flip=flip)) for flip in (0.0, 1.0))
    straight, mirrored = (view_of(transform, DATA, 3) for transform in transforms)
    assert np.array_equal(straight[:, ::-1], mirrored)
    maybe = TrainTransform(preprocessing(32), Augment((1, 1)))
    flips = [np.array_equal(view_of(maybe, DATA, seed)[:, ::-1], HALF) for seed in range(400)]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.08)


HALF = evaluation_view(DATA, preprocessing(32))


def test_crops_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    chance, scale, ratio = np.random.default_rng(0), (0.08, 1.0), (3 / 4, 4 / 3)
    reference = v2.RandomResizedCrop(10, scale=scale, ratio=ratio)
    image = torch.zeros(3, 240, 320)
    theirs = np.array(
        [
            [p[k] for k in ("top", "left", "height", "width")]
            for p in (reference.make_params([image]) for _ in range(4000))
        ]
    )
    boxes = [random_crop(240, 320, scale, ratio, chance.random(NUM_BOX_DRAWS).tolist()) for _ in range(4000)]
    ours = np.array([[box.top, box.left, box.height, box.width] for box in boxes])
    assert (ours >= 0).all() and (ours[:, 0] + ours[:, 2] <= 240).all() and (ours[:, 1] + ours[:, 3] <= 320).all()
    for values, others in zip(ours.T, theirs.T, strict=True):
        assert np.abs(np.quantile(values, np.linspace(0, 1, 9)) - np.quantile(others, np.linspace(0, 1, 9))).max() < 16
        assert values.mean() == pytest.approx(others.mean(), rel=0.05)


def test_a_crop_of_just_the_wanted_size_is_contiguous() -> None:
    same = PHOTO[5:101, 7:103]
    assert resize(same, 96, 96).flags.c_contiguous and np.array_equal(resize(same, 96, 96), same)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_view_of_a_picture_of_just_the_wanted_size_outlives_the_next_one(flip: float) -> None:
    first, second = jpeg(photograph(96, 96, 1)), jpeg(photograph(96, 96, 2))
    transform = TrainTransform(preprocessing(), Augment((1 - 1e-9, 1), (1, 1), flip=flip))
    view = view_of(transform, first, 0)
    seen = view.copy()
    view_of(transform, second, 0)
    assert np.array_equal(view, seen), "it lies where the next picture was decoded to"
    expected = decode_scaled(first, read_header(first), fast=True)
    assert np.array_equal(seen, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_mirrored_crop_gives_the_mirrored_view(interpolation: Any) -> None:
    chance = np.random.default_rng(4)
    for height, width in [(96, 96), *chance.integers(20, 300, (150, 2)).tolist()]:
        crop = chance.integers(0, 256, (height, width, 3), np.uint8)
        after = resize(crop, 96, 96, interpolation)[:, ::-1]
        assert np.array_equal(resize(cv2.flip(crop, 1), 96, 96, interpolation), after), (height, width)


def test_a_view_goes_where_it_is_wanted_and_nowhere_else() -> None:
    images = np.full((3, 96, 96, 3), 7, np.uint8)
    for augment in (FULL, Augment(), Augment((1, 1))):
        transform = TrainTransform(preprocessing(), augment)
        for seed in range(30):
            assert transform(DATA, transform.draw([seed])[0], images[1]) is not None
            assert np.array_equal(images[1], view_of(transform, DATA, seed))
    assert (images[[0, 2]] == 7).all()


def test_draws_are_fixed_whatever_is_drawn_beside_them() -> None:
    # A change here is a change of every run's augmentation.
    draws = TrainTransform.draw([0, 1, 2**64 - 1])
    assert [one.numbers[0] for one in draws] == [0.6524484863740322, 0.36818951565166946, 0.3662420901697574]
    assert [TrainTransform.draw([one.seed])[0] for one in draws] == draws
    for one in draws:
        assert len(one.crop) == len(one.erased_box) == NUM_BOX_DRAWS and len(one.rest) == 7
        assert one.crop + one.erased_box + one.rest == one.numbers
        words = hash_words(one.seed, np.arange(len(one.numbers) + 2, dtype=np.uint64))
        assert uniform(words)[:-2].tolist() == one.numbers
        assert one.noise(13).tobytes() == b"".join(int(word).to_bytes(8, "little") for word in words[-2:])[:13]


def test_draws_are_uniform_and_independent() -> None:
    """Of seeds that follow one another, which is harder than those of a plan."""
    numbers = np.array([one.numbers for one in TrainTransform.draw(range(20_000))])
    assert numbers.min() >= 0 and numbers.max() < 1
    for place in numbers.T:
        assert np.abs(np.histogram(place, 20, (0, 1))[0] - 1000).max() < 150
    together = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
    after = [np.corrcoef(place[1:], place[:-1])[0, 1] for place in numbers.T]
    assert np.abs(together).max() < 0.035 and np.abs(after).max() < 0.035


def test_a_crop_that_never_fits_is_the_largest_central_one() -> None:
    box = random_crop(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), [0.5] * NUM_BOX_DRAWS)
    assert (box.height, box.width, box.top) == (10, 13, 0) and abs(box.left - 493) <= 1


def test_a_crop_of_a_large_photograph_is_decoded_small_and_looks_the_same() -> None:
    large = jpeg(cv2.resize(photograph(seed=2), (1600, 1200), interpolation=cv2.INTER_CUBIC))
    transform = TrainTransform(preprocessing(), Augment((0.3, 1), flip=0))
    chance = np.random.default_rng(5)
    draws = chance.random(NUM_BOX_DRAWS).tolist()
    box = random_crop(1200, 1600, (0.3, 1), (3 / 4, 4 / 3), draws)
    expected = resize(box.cut(decode(large)), 96, 96)
    found = np.empty_like(expected)
    transform._view(large, draws, False, found)
    assert np.abs(found.astype(int) - expected).mean() < 2.5


@pytest.mark.parametrize(
    "which,operation",
    enumerate([v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation]),
)
@pytest.mark.parametrize("draw", [0.0, 0.3, 0.9])
def test_colour_is_torchvisions(which: int, operation: Any, draw: float) -> None:
    strength, draws = [0.0] * 4, [0.5] * 4
    strength[which], draws[which] = 0.4, draw
    expected = operation(torch.from_numpy(PHOTO).permute(2, 0, 1), 0.6 + 0.8 * draw).permute(1, 2, 0).numpy()
    assert np.abs(jitter_colour(PHOTO, strength, draws).astype(int) - expected).max() <= 2


def test_colours_compose_in_order() -> None:
    muted = (96 + PHOTO // 4).astype(np.uint8)  # nothing clips in between
    planes = torch.from_numpy(muted).permute(2, 0, 1) / 255
    steps = (functional.adjust_brightness, 1.2), (functional.adjust_contrast, 0.7), (functional.adjust_saturation, 1.3)
    for operation, factor in steps:
        planes = operation(planes, factor)
    ours = jitter_colour(muted, (0.4, 0.6, 0.6, 0), (0.75, 0.25, 0.75, 0.5))
    assert np.abs(ours - 255 * planes.permute(1, 2, 0).numpy()).max() < 1


def test_hue_turns_colours_and_keeps_grey_and_luma() -> None:
    grey = np.repeat(np.arange(0, 256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert np.abs(jitter_colour(grey, (0, 0, 0, 0.5), (0.5, 0.5, 0.5, 0.9)).astype(int) - grey).max() <= 1
    muted = (96 + PHOTO // 4).astype(np.uint8)
    turned = jitter_colour(muted, (0, 0, 0, 1 / 3), (0.5, 0.5, 0.5, 1.0))
    theirs = functional.adjust_hue(torch.from_numpy(muted).permute(2, 0, 1), 1 / 3).permute(1, 2, 0).numpy()
    opposite = functional.adjust_hue(torch.from_numpy(muted).permute(2, 0, 1), -1 / 3).permute(1, 2, 0).numpy()
    near, *far = (np.abs(turned.astype(int) - other).mean() for other in (theirs, opposite, muted))
    assert near < 12 < 18 < min(far)
    weights = np.array([0.299, 0.587, 0.114])
    assert np.abs(turned @ weights - muted @ weights).max() < 2


def test_a_single_jitter_strength_leaves_the_hue() -> None:
    assert Augment(color_jitter=0.4).jitter == (0.4, 0.4, 0.4, 0.0)
    assert Augment(color_jitter=(0.1, 0.2, 0.3, 0.4)).jitter == (0.1, 0.2, 0.3, 0.4)


def test_rotation() -> None:
    square = np.ascontiguousarray(PHOTO[:200, :200])
    assert np.array_equal(rotate(square, 0), square)
    assert np.abs(rotate(square, 90).astype(int) - np.rot90(square)).mean() < 1
    inner = slice(60, 140)
    expected = np.asarray(Image.fromarray(square).rotate(10, Image.Resampling.BILINEAR))[inner, inner]
    assert np.abs(rotate(square, 10)[inner, inner].astype(int) - expected).mean() < 1
    assert rotate(square, 45)[0, 0].any()  # reflected, not black


def test_erasing() -> None:
    seeds = range(300)
    erasing, plain = (TrainTransform(preprocessing(64), Augment((0.5, 1), flip=0, erasing=p)) for p in (0.25, 0.0))
    changed = [(view_of(erasing, DATA, seed) != view_of(plain, DATA, seed)).any(axis=2) for seed in seeds]
    shares = np.array([mask.mean() for mask in changed])
    assert np.mean(shares > 0) == pytest.approx(0.25, abs=0.07)
    assert shares[shares > 0].min() > 0.015 and shares.max() < 0.35
    for mask in (mask for mask in changed if mask.any()):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95  # one rectangle
    assert erased_box(1, [0.5] * NUM_BOX_DRAWS) is None


def test_noise_has_the_datas_mean_and_deviation() -> None:
    levels = noise_levels((0.5, 0.4, 0.45), (0.1, 0.15, 0.12))[0] / 255
    assert levels.mean(axis=0) == pytest.approx([0.5, 0.4, 0.45], abs=0.003)
    assert levels.std(axis=0) == pytest.approx([0.1, 0.15, 0.12], abs=0.003)


@pytest.mark.parametrize("auto", ["trivialaugment", "randaugment"])
def test_automatic_augmentation_is_torchvisions(auto: Any) -> None:
    kinds: dict[str, Any] = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment}
    operation = kinds[auto](interpolation=v2.InterpolationMode.BILINEAR, fill=[124, 116, 104])
    base = view_of(TrainTransform(preprocessing(), Augment(flip=0)), DATA, 11)
    torch.manual_seed(11)
    expected = operation(torch.from_numpy(base).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.array_equal(view_of(TrainTransform(preprocessing(), Augment(flip=0, auto=auto)), DATA, 11), expected)


def test_preprocessing_goes_through_json() -> None:
    made = preprocessing(448, interpolation="bilinear", crop_pct=0.95)
    assert Preprocessing.from_json(made.to_json()) == made


STRANGE: list[dict[str, Any]] = [
    {"image_size": 10**9},
    {"mean": [0, 0]},
    {"mean": None},
    {"std": [0, 1, 1]},
    {"std": [math.nan] * 3},
    {"interpolation": "nearest"},
    {"interpolation": []},
    {"crop_pct": 0},
]


@pytest.mark.parametrize("change", STRANGE)
def test_preprocessing_from_a_strange_file_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="preprocessing"):
        Preprocessing.from_json({**preprocessing().to_json(), **change})
    for value in (None, [], {}, 3):
        with pytest.raises(CheckpointError):
            Preprocessing.from_json(value)
