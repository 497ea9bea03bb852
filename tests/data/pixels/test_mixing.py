"""Mixup and cutmix: the plan is a pure function per pair, and the device does what the plan says."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from vitdist.data.pixels.mixing import Mix, Mixing, ToModelInput, apply_mix, mix_plan

BOTH = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(count: int, size: int = 24) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def reference(planes: np.ndarray, kind: np.ndarray, lam: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Slot by slot, as the papers write it."""
    mixed = planes.copy()
    for slot in range(len(planes) - len(planes) % 2):
        partner = planes[slot ^ 1]
        if kind[slot] == Mix.MIXUP:
            mixed[slot] = lam[slot] * planes[slot] + (1 - lam[slot]) * partner
        elif kind[slot] == Mix.CUTMIX:
            top, left, bottom, right = box[slot]
            mixed[slot, :, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return mixed


def test_plan_is_a_pure_function() -> None:
    one, two = (mix_plan(3, 1, 7, 64, 224, BOTH) for _ in range(2))
    for name in ("kind", "lam", "box"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    others = [mix_plan(4, 1, 7, 64, 224, BOTH), mix_plan(3, 2, 7, 64, 224, BOTH), mix_plan(3, 1, 8, 64, 224, BOTH)]
    assert all(not np.array_equal(one.lam, other.lam) for other in others)


@pytest.mark.parametrize("mixing", [BOTH, Mixing(0.2, 0.0), Mixing(0.0, 1.0)])
def test_pairs_share_and_do_not_depend_on_the_batch(mixing: Mixing) -> None:
    plan, longer = mix_plan(0, 0, 5, 30, 96, mixing), mix_plan(0, 0, 5, 200, 96, mixing)
    for name in ("kind", "lam", "box"):
        values = getattr(plan, name)
        assert np.array_equal(values[0::2], values[1::2])
        assert np.array_equal(values, getattr(longer, name)[:30])


def test_slices_put_together_are_the_plan() -> None:
    plan = mix_plan(0, 0, 0, 24, 64, BOTH)
    for num_ranks in (1, 2, 3, 4, 6):
        share = 24 // num_ranks
        parts = [plan.slots(rank * share, (rank + 1) * share) for rank in range(num_ranks)]
        assert np.array_equal(np.concatenate([part.lam for part in parts]), plan.lam)
    with pytest.raises(AssertionError, match="cut a pair"):
        plan.slots(3, 6)


def test_off_and_a_last_slot_alone() -> None:
    off = mix_plan(0, 0, 0, 10, 64, Mixing())
    assert not Mixing().active and (off.lam == 1).all() and (off.kind == Mix.NONE).all() and not off.box.any()
    odd = mix_plan(0, 0, 0, 11, 64, Mixing(0.5, 0.0))
    assert odd.lam[-1] == 1 and odd.names()[-1] == "none" and odd.names()[0] == "mixup"


def test_distributions() -> None:
    plan = mix_plan(0, 0, 0, 40_000, 224, BOTH)
    kind, lam = plan.kind[::2], plan.lam[::2]
    assert (kind == Mix.MIXUP).mean() == pytest.approx(0.5, abs=0.015)
    mixup = lam[kind == Mix.MIXUP]
    assert mixup.mean() == pytest.approx(0.5, abs=0.02) and mixup.var() == pytest.approx(1 / (4 * 2.6), abs=0.005)
    top, left, bottom, right = plan.box[::2][kind == Mix.CUTMIX].T
    assert ((top >= 0) & (top <= bottom) & (bottom <= 224) & (left >= 0) & (left <= right) & (right <= 224)).all()
    assert np.allclose(lam[kind == Mix.CUTMIX], 1 - (bottom - top) * (right - left) / 224**2)
    assert (bottom - top).max() > 200 and (bottom - top).min() < 10


@pytest.mark.parametrize("count", [12, 13])
@pytest.mark.parametrize("mixing", [BOTH, Mixing(0.2, 0.0), Mixing(0.0, 1.0), Mixing()])
def test_device_does_what_the_plan_says(count: int, mixing: Mixing) -> None:
    images, plan, convert = pictures(count), mix_plan(1, 0, 0, count, 24, mixing), ToModelInput(MEAN, STD)
    plain = convert(images)
    expected = (images.numpy().transpose(0, 3, 1, 2) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert plain.dtype == torch.float32 and plain.is_contiguous() and plain.shape == (count, 3, 24, 24)
    assert np.abs(plain.numpy() - expected).max() < 2e-6
    mixed = convert(images, plan.tensors()).numpy()
    assert np.abs(mixed - reference(plain.numpy(), plan.kind, plan.lam, plan.box)).max() < 2e-6
    assert mixing.active == (not np.array_equal(mixed, plain.numpy()))


def test_cutmix_keeps_pixels_exactly_and_the_label_weight_is_their_share() -> None:
    plan = mix_plan(2, 0, 0, 200, 24, Mixing(0.0, 1.0))
    planes = torch.arange(200.0).view(-1, 1, 1, 1).expand(200, 3, 24, 24)
    mixed = apply_mix(planes, plan.tensors())
    own = mixed == planes
    assert ((mixed == (torch.arange(200) ^ 1).view(-1, 1, 1, 1)) | own).all()
    assert np.allclose(own.float().mean(dim=(1, 2, 3)).numpy(), plan.lam, atol=1e-6)


def test_micro_batches_give_the_same_pictures() -> None:
    images, plan, convert = pictures(24), mix_plan(1, 0, 0, 24, 24, BOTH), ToModelInput(MEAN, STD)
    whole = convert(images, plan.tensors())
    parts = [convert(images[i : i + 4], plan.slots(i, i + 4).tensors()) for i in range(0, 24, 4)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_without_waiting_for_the_host() -> None:
    images, plan, convert = pictures(24), mix_plan(1, 0, 0, 24, 24, BOTH), ToModelInput(MEAN, STD)
    expected = convert(images, plan.tensors())
    device = torch.device("cuda")
    convert, pinned, mix = convert.to(device), images.pin_memory(), plan.tensors().pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed = convert(pinned.to(device, non_blocking=True), mix.to(device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (mixed.cpu() - expected).abs().max() < 1e-5


def test_planning_is_fast() -> None:
    mix_plan(0, 0, 0, 4096, 224, BOTH)
    times = []
    for step in range(10):
        start = time.process_time()
        mix_plan(0, 0, step, 4096, 224, BOTH)
        times.append(time.process_time() - start)
    assert min(times) < 3e-3  # 0.7 ms here; a loop over pairs takes 30
