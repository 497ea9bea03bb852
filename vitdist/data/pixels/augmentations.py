"""The single operations of augmentation on [H, W, 3] pixels; whoever calls draws the numbers (uniform in [0, 1))."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import cv2
import numpy as np
import torch
from torchvision.transforms import v2

from vitdist.data.pixels.images import Pixels

Auto = Literal["none", "trivialaugment", "randaugment"]

_TRIES = 10  # as torchvision's RandomResizedCrop and timm's RandomErasing
NUM_BOX_DRAWS = 2 * _TRIES + 2
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
# ITU-R 601 luma, and the YIQ axes in which a turn of the chroma plane is a turn of the hue.
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, pixels: Pixels, factor: int = 1) -> Pixels:
        """The rectangle's part of a picture that was decoded at 1/factor of its size; a view."""
        top, left = self.top // factor, self.left // factor
        return pixels[top : top + -(-self.height // factor), left : left + -(-self.width // factor)]


def random_crop(height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[float]) -> Box:
    """RandomResizedCrop's rectangle from NUM_BOX_DRAWS draws: ten tries of area and shape, else the largest central."""
    for box_height, box_width in _shapes(height * width, scale, ratio, draws):
        if 0 < box_height <= height and 0 < box_width <= width:
            return _placed(height, width, box_height, box_width, draws)
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def erased_box(size: int, draws: Sequence[float]) -> Box | None:
    """The rectangle to erase from NUM_BOX_DRAWS draws, or None where ten tries found none that fits."""
    for height, width in _shapes(size * size, _ERASED_AREA, _ERASED_RATIO, draws):
        if 0 < height < size and 0 < width < size:
            return _placed(size, size, height, width, draws)
    return None


def noise_levels(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """[1, 256, 3]: what turns a random byte into a level of normal noise with the data's mean and deviation (0-1).

    A table of quantiles: a generator's bytes are far cheaper than its normal numbers.
    """
    normal = np.array([NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)])[:, None]
    levels = np.clip(np.rint(255 * (np.asarray(mean) + normal * np.asarray(std))), 0, 255)
    return np.asarray(levels[None], dtype=np.uint8)


def _shapes(
    area: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[float]
) -> Iterator[tuple[int, int]]:
    """(height, width) of one try after the other: area uniform in `scale`, width / height log-uniform in `ratio`."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 2 * _TRIES, 2):
        target = area * (scale[0] + (scale[1] - scale[0]) * draws[i])
        aspect = math.exp(low + (high - low) * draws[i + 1])
        yield round(math.sqrt(target / aspect)), round(math.sqrt(target * aspect))


def _placed(height: int, width: int, box_height: int, box_width: int, draws: Sequence[float]) -> Box:
    top, left = draws[2 * _TRIES : 2 * _TRIES + 2]
    return Box(int(top * (height - box_height + 1)), int(left * (width - box_width + 1)), box_height, box_width)


def rotate(pixels: Pixels, degrees: float) -> Pixels:
    """Turn about the centre, counter-clockwise, bilinear; what comes in at the corners is the picture reflected."""
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    turned = cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(turned, dtype=np.uint8)


def jitter_colour(pixels: Pixels, strength: Sequence[float], draws: Sequence[float]) -> Pixels:
    """Brightness, contrast, saturation, hue (strengths [4], draws [4]) as ONE affine map of colours, rounded once.

    The first three are torchvision's blends, in that order; the hue turns YIQ's chroma plane instead of going by HSV.
    """
    lowest = [max(0.0, 1 - value) for value in strength[:3]]
    brightness, contrast, saturation = (
        low + (1 + value - low) * draw for low, value, draw in zip(lowest, strength[:3], draws[:3], strict=True)
    )
    grey = float(_LUMA @ np.array(cv2.mean(pixels)[:3]))
    matrix = saturation * np.eye(3) + (1 - saturation) * _LUMA  # rows sum to 1: grey stays grey
    matrix = brightness * contrast * (_hue_turn(2 * math.pi * strength[3] * (2 * draws[3] - 1)) @ matrix)
    offset = np.full((3, 1), (1 - contrast) * brightness * grey)
    affine = np.concatenate([matrix, offset], axis=1).astype(np.float32)
    return np.asarray(cv2.transform(pixels, affine), dtype=np.uint8)


def _hue_turn(angle: float) -> np.ndarray:
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.asarray(_RGB @ np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]]) @ _YIQ)


def auto_operation(name: Auto, mean: Sequence[float]) -> v2.Transform | None:
    """torchvision's operation of that name; what comes in at the borders has the data's mean colour (0-1)."""
    if name == "none":
        return None
    kinds: dict[str, type[v2.Transform]] = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment}
    return kinds[name](interpolation=v2.InterpolationMode.BILINEAR, fill=[round(255 * value) for value in mean])


def apply_auto(operation: v2.Transform, pixels: Pixels, seed: int) -> Pixels:
    """One application of auto_operation's result, with the randomness of `seed`."""
    with _torch_seeded(seed):
        changed: torch.Tensor = operation(torch.from_numpy(pixels).permute(2, 0, 1))
    result: Pixels = changed.permute(1, 2, 0).contiguous().numpy()
    return result


@contextlib.contextmanager
def _torch_seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator at `seed` and one thread (two would sum a picture in another order); then all as before."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
