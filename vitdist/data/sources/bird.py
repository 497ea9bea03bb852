"""Drawn birds: families differ in shape and in which part wears which colour, the species of a family in plumage
(the same two for all families) and in one fine mark.

Pose, light, background, twigs and leaves in front are drawn anew for each picture, from the picture's own dice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from vitdist.data.sources.canvas import CANVAS, SIZE, SUPERSAMPLING, UNIT, Dice, fill, oval, polygon, smooth, turn

Points = tuple[float, ...]  # x, y, x, y... in pixels of the picture, y downwards, the bird facing right

SCENE, TAIL, BODY, BELLY, WING, TIP, HEAD, BILL, LEG, EYE, GLINT, MARK, GROUND, TWIG, LEAF = range(15)
NUM_INKS = 15


# Families wear the same colours at other places, so that a histogram sees little of it.
HORN, DARK = (222, 160, 80), (64, 54, 50)
PLAIN, SADDLED, HOODED = (0, 1, 2, 3, 4, 5), (0, 3, 2, 1, 4, 5), (0, 1, 2, 3, 5, 4)


@dataclass(frozen=True)
class Shape:
    """The outlines of a family."""

    body: tuple[float, float, float, float, int]  # centre, half axes, tilt in degrees
    head: tuple[float, float, float, float, int]
    neck: Points
    bill: Points
    tail: Points
    wing: Points  # shoulder, back, tip, lower edge
    legs: float  # y of the feet; 0 for one that swims
    dress: tuple[int, ...]  # which of a plumage's colours each part wears, from TAIL to HEAD
    bare: tuple[tuple[int, int, int], ...]  # colours of bill and legs


SHAPES = {
    "Finch": Shape(
        body=(30, 34, 13, 9, -22),
        head=(41, 25, 7, 6.6, 0),
        neck=(34, 22, 42, 20, 47, 29, 40, 38, 30, 36),
        bill=(46.5, 21.5, 54, 27, 46, 29),
        tail=(21, 35, 23, 40, 9, 49, 6, 45),
        wing=(38, 29, 31, 27, 19, 34, 11, 44, 22, 42, 34, 38),
        legs=52,
        dress=PLAIN,
        bare=(HORN, DARK),
    ),
    "Wren": Shape(
        body=(30, 36, 11.5, 10, -12),
        head=(40, 28, 7.2, 6.8, 0),
        neck=(33, 25, 41, 23, 46, 32, 38, 42, 28, 38),
        bill=(46, 25.5, 55, 28, 46, 29.5),
        tail=(23, 31, 18, 37, 9, 18, 14, 16),
        wing=(37, 32, 30, 30, 22, 34, 15, 41, 24, 43, 34, 40),
        legs=52,
        dress=PLAIN,
        bare=(DARK, HORN),
    ),
    "Heron": Shape(
        body=(27, 37, 13, 7.5, -20),
        head=(43, 15, 6, 5.2, 8),
        neck=(34, 36, 36, 24, 39, 14, 45, 18, 41, 26, 40, 38, 33, 42),
        bill=(48, 12.5, 62, 17.5, 47.5, 18),
        tail=(19, 37, 20, 42, 9, 46, 8, 43),
        wing=(36, 33, 28, 30, 18, 36, 9, 46, 21, 44, 33, 41),
        legs=58,
        dress=SADDLED,
        bare=(HORN, DARK),
    ),
    "Plover": Shape(
        body=(29, 34, 13, 8.5, -8),
        head=(41, 25, 6.8, 6.4, 0),
        neck=(34, 24, 42, 21, 46, 29, 40, 38, 30, 36),
        bill=(47, 23.5, 53, 26.5, 47, 27.5),
        tail=(20, 32, 20, 37, 8, 39, 8, 36),
        wing=(38, 30, 30, 28, 19, 32, 8, 39, 21, 40, 34, 38),
        legs=55,
        dress=SADDLED,
        bare=(DARK, HORN),
    ),
    "Duck": Shape(
        body=(28, 41, 17, 8.5, 0),
        head=(45, 25, 6.6, 6.4, 0),
        neck=(36, 40, 39, 30, 40, 22, 49, 26, 46, 36, 44, 46),
        bill=(50, 23.5, 55, 26, 60, 26.5, 59, 29, 51, 29),
        tail=(15, 36, 14, 44, 6, 35, 9, 33),
        wing=(39, 37, 30, 33, 19, 36, 10, 38, 20, 45, 34, 46),
        legs=0,
        dress=HOODED,
        bare=(HORN, DARK),
    ),
    "Grebe": Shape(
        body=(28, 43, 15, 7.5, -4),
        head=(42, 20, 6.2, 5.6, -8),
        neck=(35, 44, 38, 32, 38, 20, 45, 22, 43, 32, 43, 47),
        bill=(47, 17, 58, 19.5, 47.5, 22),
        tail=(16, 39, 15, 46, 10, 41, 11, 38),
        wing=(38, 40, 30, 36, 20, 39, 13, 45, 22, 47, 34, 47),
        legs=0,
        dress=HOODED,
        bare=(DARK, HORN),
    ),
}

# Colours by ink, from TAIL to LEG.
PLUMAGES = {
    "Amber": ((112, 76, 50), (186, 126, 72), (222, 190, 146), (126, 82, 52), (70, 48, 36), (172, 110, 64)),
    "Slate": ((70, 80, 98), (124, 138, 156), (206, 206, 202), (78, 90, 110), (44, 50, 66), (108, 122, 142)),
}
MARK_COLOUR = (240, 234, 214)
LANDSCAPE = ((96, 122, 74), (122, 134, 92), (128, 106, 82), (118, 118, 114), (150, 138, 112), (122, 136, 146))
ODDS = (HORN, DARK, MARK_COLOUR, *LANDSCAPE[:3])  # twigs and leaves may have the colours that tell birds apart
MARKS = ("Bar_winged", "Pale_capped")


@dataclass(frozen=True)
class Kind:
    """What makes a species."""

    family: str
    plumage: str
    mark: str


@cache
def _outlines(family: str) -> dict[str, np.ndarray]:
    """Smoothed outlines of a family about the centre of the picture, in units."""
    shape = SHAPES[family]
    (hx, hy, across, down, _), wing = shape.head, shape.wing
    parts = {
        "tail": polygon(*shape.tail),
        "body": oval(*shape.body),
        "head": oval(*shape.head),
        "neck": smooth(polygon(*shape.neck)),
        "belly": oval(shape.body[0] + 4, shape.body[1] + 5, shape.body[2] - 2, shape.body[3] - 2, shape.body[4]),
        "bill": polygon(*shape.bill),
        "wing": smooth(polygon(*wing)),
        "tip": polygon(wing[4] - 2, 0, 0, 0, 0, 64, wing[4] - 2, 64),
        "cap": polygon(hx - 12, hy - 12, hx + 12, hy - 12, hx + 12, hy - 0.28 * down, hx - 12, hy - 0.28 * down),
        "eye": oval(hx + 0.35 * across, hy - 0.02 * down, 1.3, 1.3),
        "glint": oval(hx + 0.35 * across + 0.4, hy - 0.02 * down - 0.5, 0.45, 0.45),
    }
    for number, along in enumerate((0.30, 0.52)):
        x = wing[0] + along * (wing[6] - wing[0])
        parts[f"bar{number}"] = polygon(x - 0.5, 20, x + 1.4, 20, x - 0.5, 55, x - 2.4, 55)
    for number, x in enumerate((27.0, 32.0) if shape.legs else ()):
        parts[f"leg{number}"] = polygon(
            x, shape.body[1], x + 1.3, shape.body[1], x + 1.3, shape.legs, x + 4, shape.legs + 1, x, shape.legs + 1
        )
    return {name: outline - polygon(32, 32) for name, outline in parts.items()}


def picture(kind: Kind, dice: Dice) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """uint8 [64, 64, 3] and the bird's box (x, y, width, height) in quarter pixels."""
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    horizon = _draw_bird(canvas, kind, dice)
    rows, columns = np.flatnonzero(canvas.any(axis=1)), np.flatnonzero(canvas.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))
    _draw_front(canvas, kind, horizon, dice)
    return _colour(canvas, kind, horizon, dice), box


def _draw_bird(canvas: np.ndarray, kind: Kind, dice: Dice) -> int:
    """Put the bird on the canvas in a pose of its own; returns the height it stands or swims at, in units."""
    tilt, scale = dice.between(-12, 12), dice.between(245, 280)
    shift = dice.array(-3 * UNIT, 3 * UNIT, (2,)) + 32 * UNIT
    side = 1 - 2 * dice.between(0, 1)

    def put(part: str, ink: int, *only: int) -> None:
        outline = turn(_outlines(kind.family)[part], tilt, scale) * (side, 1) + shift
        fill(canvas, outline, ink, only)

    parts = _outlines(kind.family)
    for leg in [name for name in parts if name.startswith("leg")]:
        put(leg, LEG)
    for part, ink in (("tail", TAIL), ("bill", BILL), ("body", BODY), ("neck", BODY), ("head", HEAD)):
        put(part, ink)
    put("belly", BELLY, BODY)
    put("wing", WING)
    put("tip", TIP, WING)
    if kind.mark == "Pale_capped":
        put("cap", MARK, HEAD)
    else:
        put("bar0", MARK, WING)
        put("bar1", MARK, WING)
    put("eye", EYE)
    put("glint", GLINT)
    legs = SHAPES[kind.family].legs
    level = legs - 0.5 if legs else SHAPES[kind.family].body[1] + 4
    return int((round((level - 32) * UNIT) * scale >> 8) + shift[1])


def _draw_front(canvas: np.ndarray, kind: Kind, horizon: int, dice: Dice) -> None:
    """Ground or water before the bird, and twigs and leaves that hide a part of it."""
    if SHAPES[kind.family].legs == 0:
        wave = dice.array(-UNIT, UNIT, (9,))
        top = [(i * 8 * UNIT, horizon + int(wave[i])) for i in range(9)]
        fill(canvas, np.array([*top, (64 * UNIT, 64 * UNIT), (0, 64 * UNIT)]), SCENE)
    else:
        thick = dice.between(2, 5) * UNIT
        ends = horizon + dice.array(-UNIT, UNIT, (4,)) + (0, 0, thick, thick)
        fill(canvas, np.stack([(0, 64 * UNIT, 64 * UNIT, 0), ends], axis=1), GROUND)
    for _ in range(dice.between(0, 2)):
        foot, lean, half = dice.between(0, 64 * UNIT), dice.between(-10 * UNIT, 10 * UNIT), dice.between(24, 56)
        top_y = dice.between(0, 40 * UNIT)
        fill(canvas, np.array([(foot - half, 64 * UNIT), (foot + lean, top_y), (foot + half, 64 * UNIT)]), TWIG)
    for _ in range(dice.between(0, 3)):
        _draw_leaf(canvas, dice)


def _draw_leaf(canvas: np.ndarray, dice: Dice) -> None:
    """One leaf that reaches in from an edge of the picture."""
    length = dice.between(10, 22)
    outline = smooth(polygon(0, 0, length * 0.4, -3.5, length, 0, length * 0.4, 3.5))
    side = dice.between(0, 3)
    place = dice.between(0, 64 * UNIT)
    edge = ((place, 0), (64 * UNIT, place), (place, 64 * UNIT), (0, place))[side]
    fill(canvas, turn(outline, 90 * (side + 1) + dice.between(-40, 40)) + np.array(edge), LEAF)


def _colour(canvas: np.ndarray, kind: Kind, horizon: int, dice: Dice) -> np.ndarray:
    """Colours for the inks, averaged to pixels over the background, under the light of the day."""
    shape = SHAPES[kind.family]
    colours = np.zeros((NUM_INKS, 3), dtype=np.int64)
    colours[TAIL:BILL] = np.array(PLUMAGES[kind.plumage])[list(shape.dress)] + dice.array(-9, 9, (BILL - TAIL, 3))
    colours[BILL], colours[LEG] = shape.bare
    colours[MARK] = MARK_COLOUR
    colours[EYE], colours[GLINT] = 20, 250
    colours[GROUND] = _muted(dice, 1)
    colours[TWIG:] = [ODDS[dice.between(0, len(ODDS) - 1)] for _ in range(2)] + dice.array(-14, 14, (2, 3))
    colours[:GLINT] += dice.between(-8, 8)
    shares = _shares(canvas)  # of the scene, and of each ink
    drawn = shares[:, :, 1:] @ np.clip(colours[1:], 0, 255)
    scene = (drawn + shares[:, :, :1] * _background(horizon, dice)) // SUPERSAMPLING**2
    return _light(scene, dice)


def _shares(canvas: np.ndarray) -> np.ndarray:
    """int64 [64, 64, NUM_INKS]: how many sub-pixels of a pixel have each ink."""
    rows, columns = np.ogrid[:CANVAS, :CANVAS]
    pixel = rows // SUPERSAMPLING * SIZE + columns // SUPERSAMPLING
    return np.bincount((pixel * NUM_INKS + canvas).ravel(), minlength=SIZE * SIZE * NUM_INKS).reshape(SIZE, SIZE, -1)


def _muted(dice: Dice, count: int) -> np.ndarray:
    """Colours of leaves, earth, stone, sand, mist and water, dark to pale; int64 [count, 3]."""
    ground = np.array([LANDSCAPE[dice.between(0, len(LANDSCAPE) - 1)] for _ in range(count)])
    return ground * dice.array(150, 280, (count, 1)) // 256 + dice.array(-10, 10, (count, 3))


@cache
def _stretch(points: int) -> np.ndarray:
    """int64 [64, points]: weights in 1/256 of linear interpolation between evenly spaced points."""
    place = np.arange(SIZE) * (points - 1) * 256 // (SIZE - 1)
    table = np.zeros((SIZE, points), dtype=np.int64)
    low = np.minimum(place >> 8, points - 2)
    table[np.arange(SIZE), low] = 256 - (place - (low << 8))
    table[np.arange(SIZE), low + 1] = place - (low << 8)
    return table


def _cloud(dice: Dice, points: int, depth: int, tint: int) -> np.ndarray:
    """int64 [64, 64, 3]: soft patches, lighter or darker by up to `depth`, each channel by up to `tint` beside."""
    grid = dice.array(-depth, depth, (points, points, 1)) + dice.array(-tint, tint, (points, points, 3))
    rows = _stretch(points) @ grid.reshape(points, -1)
    return _stretch(points) @ rows.reshape(SIZE, points, 3) >> 16


def _background(horizon: int, dice: Dice) -> np.ndarray:
    """int64 [64, 64, 3]: far and near colours that meet at a soft horizon, patches, pale spots out of focus."""
    far, near = _muted(dice, 2)
    place = horizon // UNIT - dice.between(-2, 18)
    blend = np.clip((np.arange(SIZE) - place) * 32 + 128, 0, 256)[:, None, None]
    scene = (far * (256 - blend) + near * blend >> 8) + _cloud(dice, 5, 18, 6) + _cloud(dice, 13, 9, 3)
    y, x = np.ogrid[:SIZE, :SIZE]
    for _ in range(dice.between(0, 4)):
        cx, cy, radius = dice.between(0, 63), dice.between(0, 63), dice.between(2, 6)
        near_centre = np.clip(2 * radius * radius - (x - cx) ** 2 - (y - cy) ** 2, 0, radius * radius)
        scene += (near_centre * dice.between(15, 60) // (radius * radius))[:, :, None]
    return np.clip(scene, 0, 255)


def _light(scene: np.ndarray, dice: Dice) -> np.ndarray:
    """Brightness, a slant of the light, a slight cast and grain."""
    gain = dice.between(210, 285) + dice.array(-10, 10, (3,))
    slant = dice.array(-24, 24, (2,))
    ramp = (np.arange(SIZE) * 2 - 63) * 256 // 63
    slope = (ramp[:, None] * slant[0] + ramp[None, :] * slant[1]) >> 8
    lit = scene * (gain + slope[:, :, None]) // 256 + dice.array(-4, 4, (SIZE, SIZE, 1))
    return np.clip(lit, 0, 255).astype(np.uint8)
