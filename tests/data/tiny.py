"""Draws a CUB-like set of many small, distinguishable classes in a moment, for tests that need real shards."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vitdist.data.index import DatasetIndex
from vitdist.data.packing.pack import Packing, pack
from vitdist.data.sources.cub import read_cub
from vitdist.data.storage.tar import Member, scan
from vitdist.taxonomy import Taxonomy, read_csv

LEVELS = ("order", "family", "species")
SPECIES_PER_FAMILY = 5
FAMILIES_PER_ORDER = 5


def tiny_names(num_classes: int) -> list[tuple[str, str, str]]:
    """(order, family, species) of each class; species are named as CUB's folders are."""
    rows = []
    for number in range(num_classes):
        family, order = number // SPECIES_PER_FAMILY, number // (SPECIES_PER_FAMILY * FAMILIES_PER_ORDER)
        rows.append((f"Order{order:02d}", f"Family{family:03d}", f"{number + 1:03d}.Tiny_{number + 1:03d}"))
    return rows


def tiny_taxonomy(path: Path) -> Taxonomy:
    """The tree of a folder that `tiny_cub` drew, from its taxonomy.csv."""
    return read_csv(path / "taxonomy.csv", LEVELS, leaf="species")


def tiny_cub(
    path: str | Path,
    num_classes: int = 200,
    train_per_class: int = 4,
    test_per_class: int = 2,
    size: int = 32,
    seed: int = 0,
) -> Path:
    """Draw a folder in CUB's layout, with a taxonomy.csv of three levels; returns the folder.

    The order is the hue, the family the direction of stripes, the species their width; position, light and noise vary.
    """
    path = Path(path)
    rng = np.random.Generator(np.random.PCG64(seed))
    names = tiny_names(num_classes)
    images: list[str] = []
    labels: list[str] = []
    flags: list[str] = []
    boxes: list[str] = []
    for number, (_, _, species) in enumerate(names):
        (path / "images" / species).mkdir(parents=True, exist_ok=True)
        for picture in range(train_per_class + test_per_class):
            identity = len(images) + 1
            name = f"{species}/Tiny_{number + 1:03d}_{picture:04d}.jpg"
            (path / "images" / name).write_bytes(draw(number, num_classes, size, rng))
            images.append(f"{identity} {name}")
            labels.append(f"{identity} {number + 1}")
            flags.append(f"{identity} {int(picture < train_per_class)}")
            boxes.append(f"{identity} 2.0 2.0 {size - 4}.0 {size - 4}.0")
    classes = [f"{number + 1} {species}" for number, (_, _, species) in enumerate(names)]
    _write_lists(path, images=images, image_class_labels=labels, train_test_split=flags)
    _write_lists(path, bounding_boxes=boxes, classes=classes)
    with open(path / "taxonomy.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([LEVELS, *names])
    return path


def tiny_packed(
    path: str | Path, *, source: Path | None = None, shard_bytes: int = 128 << 20, **drawing: int
) -> DatasetIndex:
    """The tiny set through the real packer; drawn beside `path` by `tiny_cub` where no source is given."""
    path = Path(path)
    source = source or tiny_cub(path.with_name(f"{path.name}_source"), **drawing)
    tree, samples = read_cub(source, taxonomy=tiny_taxonomy(source))
    return pack(samples, tree, path, Packing(name="tiny", shard_bytes=shard_bytes))


def draw(number: int, num_classes: int, size: int, rng: np.random.Generator) -> bytes:
    """One JPEG of a class."""
    species, family = number % SPECIES_PER_FAMILY, number // SPECIES_PER_FAMILY % FAMILIES_PER_ORDER
    order = number // (SPECIES_PER_FAMILY * FAMILIES_PER_ORDER)
    num_orders = -(-num_classes // (SPECIES_PER_FAMILY * FAMILIES_PER_ORDER))
    angle = np.pi * family / FAMILIES_PER_ORDER + rng.normal(0, 0.06)
    y, x = np.mgrid[0:size, 0:size] / size
    wave = np.sin(2 * np.pi * (1.5 + 1.3 * species) * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6.28))
    hue = 2 * np.pi * (order / num_orders + np.array([0, 1 / 3, 2 / 3]))
    color = 128 + 90 * np.cos(hue)
    pixels = color * (0.75 + 0.35 * wave[..., None]) * rng.uniform(0.8, 1.1) + rng.normal(0, 6, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def _write_lists(path: Path, **lists: list[str]) -> None:
    for name, lines in lists.items():
        (path / f"{name}.txt").write_text("\n".join(lines) + "\n")


def scan_shard(path: Path) -> Iterator[Member]:
    """Members of a tar file in order."""
    with open(path, "rb") as file:
        yield from scan(file, str(path), os.fstat(file.fileno()).st_size)
