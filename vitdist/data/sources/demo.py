"""The embedded demo set: 24 invented species of drawn birds, written in CUB-200-2011's own layout.

Six families differ in shape and in which part wears which colour; the four species of a family in one of two plumages,
which all families share, and in one fine mark: two wing bars or a cap, equally pale. So neither colours alone nor the
outline alone tell a species.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitdist import taxonomy
from vitdist.data.sources.bird import MARKS, PLUMAGES, Kind, picture
from vitdist.data.sources.canvas import SUPERSAMPLING, Dice
from vitdist.taxonomy import Taxonomy

LEVELS = ("order", "family", "species")
ORDERS = {
    "Perching_Birds": ("Finch", "Wren"),
    "Shore_Birds": ("Heron", "Plover"),
    "Water_Birds": ("Duck", "Grebe"),
}
SPLITS = ("test", "train")  # the position is the flag in train_test_split.txt
JPEG = {"quality": 92, "subsampling": 0, "optimize": False, "progressive": False}


@dataclass(frozen=True)
class Species:
    """One class: its number from 1, its place in the tree and what it looks like."""

    number: int
    order: str
    kind: Kind

    @property
    def plain_name(self) -> str:
        return f"{self.kind.mark}_{self.kind.plumage}_{self.kind.family}"

    @property
    def class_name(self) -> str:
        """As CUB names its folders."""
        return f"{self.number:03d}.{self.plain_name}"

    @property
    def path(self) -> tuple[str, str, str]:
        """Its names in LEVELS."""
        return self.order, self.kind.family, self.class_name


@dataclass(frozen=True)
class Drawing:
    """One line of each of CUB's lists."""

    species: Species
    split: str
    number: int  # within the species and split

    @property
    def path(self) -> str:
        """Below images/."""
        return f"{self.species.class_name}/{self.species.plain_name}_{self.split}_{self.number:04d}.jpg"


def demo_species() -> tuple[Species, ...]:
    """All species, ordered as they are numbered: a family's stand together."""
    families = [(order, family) for order, families in ORDERS.items() for family in families]
    kinds = [(order, Kind(family, *look)) for order, family in families for look in _looks()]
    return tuple(Species(number, order, kind) for number, (order, kind) in enumerate(kinds, 1))


def _looks() -> list[tuple[str, str]]:
    return [(plumage, mark) for plumage in PLUMAGES for mark in MARKS]


def demo_taxonomy() -> Taxonomy:
    """3 orders, 6 families, 24 species."""
    return taxonomy.build(LEVELS, [species.path for species in demo_species()])


def draw_demo(folder: Path, seed: int = 0, train_per_class: int = 100, test_per_class: int = 30) -> None:
    """Write the set into a new or empty folder: CUB's five lists, images/, and the class tree as taxonomy.csv.

    A picture depends on the seed, its species, split and number only: fewer of them are a part of more, with the same
    bytes (integers up to the pixels; the JPEG's bytes are Pillow's, whose version constraints.txt pins).
    """
    boxes = []
    drawings = list(_drawings(train_per_class, test_per_class))
    for species in demo_species():
        (folder / "images" / species.class_name).mkdir(parents=True)
    for drawing in drawings:
        species, split = drawing.species, SPLITS.index(drawing.split)
        pixels, box = picture(species.kind, Dice(seed, species.number, split, drawing.number))
        Image.fromarray(pixels).save(folder / "images" / drawing.path, "JPEG", **JPEG)
        boxes.append(" ".join(f"{side / SUPERSAMPLING:.2f}" for side in box))
    _write_list(folder / "images.txt", [drawing.path for drawing in drawings])
    _write_list(folder / "image_class_labels.txt", [drawing.species.number for drawing in drawings])
    _write_list(folder / "train_test_split.txt", [SPLITS.index(drawing.split) for drawing in drawings])
    _write_list(folder / "bounding_boxes.txt", boxes)
    _write_list(folder / "classes.txt", [species.class_name for species in demo_species()])
    _write_taxonomy(folder / "taxonomy.csv")


def _drawings(train_per_class: int, test_per_class: int) -> Iterator[Drawing]:
    for species in demo_species():
        for split, count in (("train", train_per_class), ("test", test_per_class)):
            yield from (Drawing(species, split, number) for number in range(1, count + 1))


def _write_list(path: Path, values: list[str] | list[int]) -> None:
    """One of CUB's lists: a number from 1 and a value a line."""
    lines = [f"{number} {value}\n" for number, value in enumerate(values, 1)]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _write_taxonomy(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LEVELS)
        writer.writerows(species.path for species in demo_species())
