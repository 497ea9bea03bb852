"""Decoded pictures -> uint8 [S, S, 3] for the model: the random view of training and the fixed view of evaluation.

Everything stays uint8 and HWC; normalising and mixing happen on the device (mixing.py). A random view is a pure
function of (bytes, seed): no global generator is read or moved, and neither threads nor workers change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch

from vitdist.data.pixels import augmentations as ops
from vitdist.data.pixels.augmentations import Auto, Box
from vitdist.data.pixels.images import MAX_PIXELS, Pixels, Scratch, decode_scaled, read_header
from vitdist.data.seeds import hash_words, uniform
from vitdist.errors import CheckpointError

Interpolation = Literal["bicubic", "bilinear"]
# those of torch.nn.functional.interpolate(antialias=True), which has no `out`
_KERNELS = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
_NUM_DRAWS = 2 * ops.NUM_BOX_DRAWS + 7
_PLACES = np.arange(_NUM_DRAWS, dtype=np.uint64)

# Evaluation leaves a factor of two or more to the antialiased resize, so that DCT scaling changes a pixel by 1-2 levels
# on average; training is content with enough pixels (2-3 levels, the same sharpness).
_EVAL_MARGIN = 2
# A strip longer than this is cut to its middle before it is resized: 1 x 10^7 pixels would become 224 x 2*10^9.
_MAX_ASPECT = 8


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its input, from its own data config; stored with each checkpoint and used everywhere."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object with lists in place of tuples."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: Any) -> Preprocessing:
        """The inverse of to_json; CheckpointError for anything that to_json could not have written."""
        try:
            made = cls(
                image_size=int(value["image_size"]),
                mean=_triple(value["mean"]),
                std=_triple(value["std"]),
                interpolation=value["interpolation"],
                crop_pct=float(value["crop_pct"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"preprocessing: cannot be read ({error!r}); take another checkpoint") from error
        if not made._usable():
            raise CheckpointError(f"preprocessing: values out of range in {made}; take another checkpoint")
        return made

    def _usable(self) -> bool:
        return (
            1 <= self.image_size <= 8192
            and all(-10 <= mean <= 10 for mean in self.mean)
            and all(1e-4 <= std <= 10 for std in self.std)
            and self.interpolation in ("bicubic", "bilinear")
            and 0.1 <= self.crop_pct <= 1
        )


def _triple(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


@dataclass(frozen=True)
class Augment:
    """The recipe's augmentation of single pictures, in the order in which it is applied.

    crop_scale: share of the picture's area a random crop takes; (1, 1): no random crop but the view of evaluation.
    crop_ratio: width / height of the crop, log-uniform, as in Inception and torchvision's RandomResizedCrop.
    flip: probability of mirroring. rotation: degrees, drawn from [-rotation, rotation], corners filled by reflection.
    color_jitter: one strength for brightness, contrast, saturation, or four with the hue last (share of the circle).
    auto: torchvision's TrivialAugmentWide (Mueller & Hutter 2021) or RandAugment (2 operations, magnitude 9).
    erasing: probability of one rectangle of noise with the data's mean and deviation (Zhong et al. 2017; timm's pixel).
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotation: float = 0.0
    color_jitter: float | tuple[float, float, float, float] = 0.0
    auto: Auto = "none"
    erasing: float = 0.0

    @property
    def jitter(self) -> tuple[float, float, float, float]:
        """Strengths of brightness, contrast, saturation and hue; a single number leaves the hue alone, as in timm."""
        value = self.color_jitter
        return (value, value, value, 0.0) if isinstance(value, (int, float)) else value


class Draws(NamedTuple):
    """The numbers of one view, each at its own place: an augmentation switched off leaves the others as they were."""

    seed: int
    numbers: list[float]

    @property
    def crop(self) -> list[float]:
        return self.numbers[: ops.NUM_BOX_DRAWS]

    @property
    def erased_box(self) -> list[float]:
        return self.numbers[ops.NUM_BOX_DRAWS : 2 * ops.NUM_BOX_DRAWS]

    @property
    def rest(self) -> list[float]:
        """Of flip, angle, whether to erase, and the four of colour."""
        return self.numbers[2 * ops.NUM_BOX_DRAWS :]

    def noise(self, count: int) -> Pixels:
        """Bytes from the places after the numbers."""
        words = hash_words(self.seed, np.arange(_NUM_DRAWS, _NUM_DRAWS + -(-count // 8), dtype=np.uint64))
        return words.astype("<u8").view(np.uint8)[:count]


class TrainTransform:
    """The training view: random resized crop, flip, rotation, colour, automatic augmentation, erasing; from a seed."""

    def __init__(self, preprocessing: Preprocessing, augment: Augment, *, max_pixels: int = MAX_PIXELS) -> None:
        self.preprocessing = preprocessing
        self.augment = augment
        self.max_pixels = max_pixels
        self._auto = ops.auto_operation(augment.auto, preprocessing.mean)
        self._noise = ops.noise_levels(preprocessing.mean, preprocessing.std)
        self._scratch = Scratch()
        self._jitter = augment.jitter if any(augment.jitter) else None

    @staticmethod
    def draw(seeds: Sequence[int]) -> list[Draws]:
        """The numbers of some views, a uint64 seed each; made together, since a call costs more than its numbers."""
        numbers = uniform(hash_words(np.array(seeds, np.uint64)[:, None], _PLACES))
        return list(map(Draws, seeds, numbers.tolist()))

    def __call__(self, data: bytes, draws: Draws, out: Pixels | None = None) -> Pixels:
        """uint8 [S, S, 3], contiguous: `out`, or new; raises DamagedImage."""
        augment, size = self.augment, self.preprocessing.image_size
        out = np.empty((size, size, 3), np.uint8) if out is None else out
        flip, angle, erase, *colour = draws.rest
        self._view(data, draws.crop, flip < augment.flip, out)
        pixels = out
        if augment.rotation:
            pixels = ops.rotate(pixels, (2 * angle - 1) * augment.rotation)
        if self._jitter is not None:
            pixels = ops.jitter_colour(pixels, self._jitter, colour)
        if self._auto is not None:
            pixels = ops.apply_auto(self._auto, pixels, draws.seed)
        if erase < augment.erasing:
            pixels = self._erase(pixels, draws)
        if pixels is not out:
            out[:] = pixels
        return out

    def _view(self, data: bytes, draws: Sequence[float], is_flipped: bool, out: Pixels) -> None:
        augment, size = self.augment, self.preprocessing.image_size
        if tuple(augment.crop_scale) == (1, 1):
            view = evaluation_view(data, self.preprocessing, self.max_pixels)
            out[:] = view[:, ::-1] if is_flipped else view
            return
        header = read_header(data, max_pixels=self.max_pixels)
        box = ops.random_crop(header.height, header.width, augment.crop_scale, augment.crop_ratio, draws)
        factor = header.factor(box.height, box.width, size)
        crop = box.cut(decode_scaled(data, header, factor, fast=True, scratch=self._scratch), factor)
        # a crop is copied before it is resized: mirrored then it costs less than afterwards, and gives the same bits
        crop = np.asarray(cv2.flip(crop, 1), dtype=np.uint8) if is_flipped else crop
        resize(crop, size, size, self.preprocessing.interpolation, out)

    def _erase(self, pixels: Pixels, draws: Draws) -> Pixels:
        box = ops.erased_box(self.preprocessing.image_size, draws.erased_box)
        if box is None:
            return pixels
        noise = draws.noise(box.height * box.width * 3)
        box.cut(pixels)[:] = cv2.LUT(noise.reshape(box.height, box.width, 3), self._noise)
        return pixels


class EvalTransform:
    """The evaluation view: short side to S / crop_pct with antialiasing, centre crop S; the same pixels as timm's."""

    def __init__(self, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> None:
        self.preprocessing = preprocessing
        self.max_pixels = max_pixels

    def __call__(self, data: bytes) -> Pixels:
        """uint8 [S, S, 3], contiguous; raises DamagedImage."""
        return evaluation_view(data, self.preprocessing, self.max_pixels)


def prepare_worker() -> None:
    """Call once in each loader worker: one thread a worker, since the workers themselves fill the cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def resize(
    pixels: Pixels, height: int, width: int, interpolation: Interpolation = "bicubic", out: Pixels | None = None
) -> Pixels:
    """[H, W, 3] resized with antialiasing, within one level of PIL, by torch's uint8 kernel; into `out`, if given.

    Measured on one core, crops of photographs to 224 px: 0.08 ms; OpenCV's INTER_AREA 0.10, and it moves pixels by one
    level on average when shrinking, by more when enlarging; PIL 0.6 ms.
    """
    out = np.empty((height, width, 3), np.uint8) if out is None else out
    if pixels.shape == out.shape:
        out[:] = pixels
        return out
    _KERNELS[interpolation](_planes(np.ascontiguousarray(pixels)), out.shape[:2], False, out=_planes(out))
    return out


def _planes(pixels: Pixels) -> torch.Tensor:
    """The same memory as [1, 3, H, W].

    [None] before permute: with the stride of a whole picture torch knows channels last, and reads and writes so. Else
    it would answer in planes, and turning those round costs as much again as the resize.
    """
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def evaluation_view(data: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Bytes to the fixed view of evaluation, uint8 [S, S, 3]; the arithmetic of torchvision's Resize and CenterCrop."""
    size = preprocessing.image_size
    short = math.floor(size / preprocessing.crop_pct)  # floor as in timm, whose published accuracies come from it
    header = read_header(data, max_pixels=max_pixels)
    factor = header.factor(header.height, header.width, _EVAL_MARGIN * short)
    pixels = _middle(decode_scaled(data, header, factor))
    height, width = pixels.shape[:2]
    height, width = (short, int(short * width / height)) if height < width else (int(short * height / width), short)
    pixels = resize(pixels, height, width, preprocessing.interpolation)
    box = Box(round((height - size) / 2.0), round((width - size) / 2.0), size, size)
    return np.ascontiguousarray(box.cut(pixels))


def _middle(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    kept_height, kept_width = min(height, _MAX_ASPECT * width), min(width, _MAX_ASPECT * height)
    return Box((height - kept_height) // 2, (width - kept_width) // 2, kept_height, kept_width).cut(pixels)
