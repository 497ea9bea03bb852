"""Decoding: the same pixels as PIL where PIL is right, and every damage refused under its own name."""

from __future__ import annotations

import io
import pickle
import random
import struct
import warnings
import zlib
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from vitdist.data.pixels.images import DamagedImage, Kind, Pixels, Scratch, decode, decode_scaled, read_header

RANDOM = np.random.default_rng(0)
SMOOTH: Pixels = cv2.resize(
    RANDOM.integers(0, 256, (12, 16, 3), dtype=np.uint8), (163, 121), interpolation=cv2.INTER_CUBIC
)


def encoded(picture: Image.Image | Pixels, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def by_pil(data: bytes) -> Pixels:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x010F] = "maker"
    block[0x0112] = orientation
    return block


def damage(data: bytes, **options: Any) -> str:
    with pytest.raises(DamagedImage) as caught:
        decode(data, **options)
    return caught.value.kind


JPEG = encoded(SMOOTH, "JPEG", quality=90)
PNG = encoded(SMOOTH, "PNG")
WEBP = encoded(SMOOTH, "WEBP", lossless=True)
WELL_FORMED = {
    "jpeg": JPEG,
    "jpeg 4:4:4": encoded(SMOOTH, "JPEG", subsampling=0),
    "jpeg progressive": encoded(SMOOTH, "JPEG", progressive=True),
    "jpeg grey": encoded(SMOOTH[..., 0], "JPEG"),
    "jpeg cmyk": encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
    "png": PNG,
    "png grey": encoded(SMOOTH[..., 0], "PNG"),
    "png palette": encoded(Image.fromarray(SMOOTH).convert("P"), "PNG"),
    "png bilevel": encoded(Image.fromarray(SMOOTH).convert("1"), "PNG"),
    "png alpha": encoded(Image.fromarray(SMOOTH).convert("RGBA"), "PNG"),
    "png grey alpha": encoded(Image.fromarray(SMOOTH).convert("LA"), "PNG"),
    "webp": encoded(SMOOTH, "WEBP"),
    "webp lossless": WEBP,
}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_pixels_are_those_of_pil(name: str) -> None:
    pixels = decode(WELL_FORMED[name])
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.shape == (121, 163, 3)
    assert np.array_equal(pixels, by_pil(WELL_FORMED[name]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(format: str, orientation: int) -> None:
    data = encoded(SMOOTH, format, exif=exif(orientation))
    pixels, header = decode(data), read_header(data)
    assert np.array_equal(pixels, by_pil(data)) and pixels.flags.c_contiguous
    assert (header.height, header.width, header.orientation) == (*pixels.shape[:2], orientation)


def test_exif_of_either_byte_order_and_damaged() -> None:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    block = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry
    for payload, shape in (
        (block, (163, 121, 3)),
        (block[:-6], (121, 163, 3)),
        (b"Exif\0\0II*\0\xff\xff", (121, 163, 3)),
    ):
        segment = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
        assert decode(JPEG[:2] + segment + JPEG[2:]).shape == shape


def png(bit_depth: int, colour: int, rows: np.ndarray) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = rows.shape[:2]
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_16_bits_keep_their_high_byte() -> None:
    grey = RANDOM.integers(0, 65536, (9, 11)).astype(">u2")
    colours = RANDOM.integers(0, 65536, (9, 11, 3)).astype(">u2")
    assert np.array_equal(decode(png(16, 0, grey)), np.repeat((grey >> 8)[..., None], 3, axis=2))
    assert np.array_equal(decode(png(16, 2, colours)), colours >> 8)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["jpeg", "jpeg cmyk", "rotated"])
def test_dct_scaling_is_a_small_picture_of_the_whole(kind: str, factor: int) -> None:
    smooth = Image.fromarray(cv2.resize(SMOOTH[:5, ::40], (160, 128), interpolation=cv2.INTER_CUBIC))
    smooth = smooth.convert("CMYK") if kind == "jpeg cmyk" else smooth
    data = encoded(smooth, "JPEG", quality=90, exif=exif(6 if kind == "rotated" else 1))
    header, whole = read_header(data), decode(data)
    small = decode_scaled(data, header, factor)
    assert small.shape == (-(-header.height // factor), -(-header.width // factor), 3)
    area = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - area).mean() < 3


def test_min_side_chooses_the_factor() -> None:
    data = encoded(cv2.resize(SMOOTH, (1600, 1000)), "JPEG")
    heights = {side: decode(data, min_side=side).shape[0] for side in (125, 126, 250, 251, 500, 501, 2000)}
    assert heights == {125: 125, 126: 250, 250: 250, 251: 500, 500: 500, 501: 1000, 2000: 1000}
    assert decode(PNG, min_side=10).shape == (121, 163, 3)


@pytest.mark.parametrize("name", WELL_FORMED)
def test_cut_files_are_refused(name: str) -> None:
    data = WELL_FORMED[name]
    assert damage(data[: int(0.6 * len(data))]) == "truncated"
    for length in range(20, len(data) - 2, max(1, len(data) // 40)):
        # A progressive scan's first bytes, or a palette without its pixels, are known broken before they are known cut.
        assert damage(data[:length]) in ("truncated", "cannot decode")


def test_what_is_no_allowed_picture() -> None:
    assert damage(b"") == "empty"
    assert damage(b"<!DOCTYPE html><html><body>404</body></html>") == "not an image"
    assert damage(bytes(5000)) == "not an image"
    assert damage(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "format not allowed"
    for format in ("GIF", "BMP", "TIFF", "ICO"):
        assert damage(encoded(SMOOTH, format)) == "format not allowed"


def test_ghostscript_is_never_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    reached: list[str] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: reached.append("gs"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (eps, b"\x89PNG\r\n\x1a\n" + eps, b"\xff\xd8\xff" + eps):
        damage(data)
    assert not reached


def test_pixels_are_capped_on_the_header() -> None:
    # 13,000 x 13,000 bilevel pixels of nothing: 20 KB of file, 507 MB of RGB.
    bomb = encoded(Image.new("1", (13_000, 13_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(bomb) < 50_000 and damage(bomb) == "too many pixels"
    wide = bytearray(JPEG)
    frame = wide.index(b"\xff\xc0")
    wide[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    assert damage(bytes(wide)) == "too many pixels"
    assert damage(JPEG, max_pixels=121 * 163 - 1) == "too many pixels"
    assert decode(JPEG, max_pixels=121 * 163).shape == (121, 163, 3)


@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg progressive", "jpeg cmyk", "png alpha", "png palette", "webp lossless", "exif"]
)
def test_flipped_bytes_end_in_pixels_or_damage(name: str) -> None:
    data = encoded(SMOOTH, "JPEG", exif=exif(6)) if name == "exif" else WELL_FORMED[name]
    chance, kinds = random.Random(0), set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            broken = bytearray(data)
            for _ in range(3):
                broken[chance.randrange(chance.choice((len(data), 200)))] ^= 1 << chance.randrange(8)
            try:
                assert decode(bytes(broken)).dtype == np.uint8
            except DamagedImage as error:
                kinds.add(error.kind)
    assert "cannot decode" in kinds and kinds <= set(get_args(Kind))


def test_no_flipped_bit_of_a_png_gets_through() -> None:
    data = WELL_FORMED["png alpha"]  # of these PIL itself lets 4 % through
    for position in range(0, len(data), 37):
        broken = bytearray(data)
        broken[position] ^= 1 << (position % 8)
        damage(bytes(broken))


def test_garbage_in_a_jpeg_scan_is_refused() -> None:
    middle = len(JPEG) * 2 // 3
    broken = JPEG[:middle] + b"\xff\xd9" + JPEG[middle:]  # an end marker too early: libjpeg would fill with grey
    assert damage(broken) in ("truncated", "cannot decode")
    zeroed = JPEG[:middle] + bytes(300) + JPEG[middle + 300 :]
    assert damage(zeroed) in ("truncated", "cannot decode")
    assert decode(JPEG + bytes(100)).shape == (121, 163, 3)  # what follows the end is nobody's


def test_damage_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedImage("truncated", "60 of 100 bytes")))
    assert (error.kind, error.detail, str(error)) == ("truncated", "60 of 100 bytes", "truncated: 60 of 100 bytes")


def test_no_row_of_an_even_width_begins_where_it_would_be_written_past_the_caches() -> None:
    scratch = Scratch()
    for size in (1000, 500, 1001, 600_000, 5_000_000):
        room = scratch.room(size)
        assert room is not None and len(room) >= size and room.ctypes.data % 32 == 1
