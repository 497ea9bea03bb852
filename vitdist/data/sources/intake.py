"""Looks at a photograph before it is packed: is it one, of which format, how large; and makes it smaller on request."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from vitdist.errors import DataError

SUFFIX_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_PIXELS = 178_956_970 // 2
QUALITY = 90


@dataclass(frozen=True)
class Prepared:
    """An image as it goes into a shard; `scale` is what its coordinates were multiplied by."""

    data: bytes
    suffix: str
    width: int
    height: int
    scale: float = 1.0


class BadImage(DataError):
    """A file that is no usable photograph; the message names it."""


def prepare(data: bytes, where: str, short_side: int | None = None) -> Prepared:
    """Check an image by its header and, if it is larger than asked, shrink it; untouched bytes otherwise.

    Shrunk images are RGB JPEG of quality 90, upright and without metadata. BadImage when it is none or cannot be read.
    """
    suffix, width, height = _read_header(data, where)
    if short_side is None or min(width, height) <= short_side:
        return Prepared(data, suffix, width, height)
    return _shrink(data, where, short_side, short_side / min(width, height))


def _read_header(data: bytes, where: str) -> tuple[str, int, int]:
    """(suffix by content, width, height); formats are allow-listed, since PIL would hand an EPS to Ghostscript."""
    if not data:
        raise BadImage(f"{where} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(SUFFIX_OF))
    except Image.DecompressionBombError:
        raise BadImage(f"{where} has more than {MAX_PIXELS} pixels") from None
    except (OSError, ValueError, SyntaxError):
        raise BadImage(f"{where} is no JPEG, PNG or WebP image") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{where} has {image.width}x{image.height} pixels, more than {MAX_PIXELS} in all")
    return SUFFIX_OF[image.format or ""], image.width, image.height


def _shrink(data: bytes, where: str, short_side: int, scale: float) -> Prepared:
    from vitdist.data.pixels.images import DamagedImage, decode  # only here: packing without resizing decodes nothing

    try:
        # The decoder may halve a JPEG while reading it; twice the wanted size leaves the filter enough to average.
        pixels = Image.fromarray(decode(data, min_side=2 * short_side))
    except DamagedImage as error:
        raise BadImage(f"{where} cannot be decoded: {error}") from None
    ratio = short_side / min(pixels.size)
    size = (max(1, round(pixels.width * ratio)), max(1, round(pixels.height * ratio)))
    out = io.BytesIO()
    pixels.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=QUALITY)
    return Prepared(out.getvalue(), "jpg", *size, scale)
