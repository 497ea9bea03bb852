"""The drawn birds: the same bytes everywhere, CUB's layout, and a task that neither colours nor outlines solve."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.data.tiny import tiny_packed
from vitdist.data.baseline import Baseline, histogram, histogram_baseline, main
from vitdist.data.sources.bird import MARKS, PLUMAGES, SHAPES, Kind, picture
from vitdist.data.sources.canvas import CANVAS, SINE, UNIT, Dice, fill, oval, polygon
from vitdist.data.sources.cub import read_cub
from vitdist.data.sources.demo import LEVELS, demo_species, demo_taxonomy, draw_demo
from vitdist.taxonomy import read_csv

KINDS = [species.kind for species in demo_species()]
ROOT = Path(__file__).resolve().parents[3]
DRAW = "import sys, pathlib, vitdist.data.sources.demo as d; d.draw_demo(pathlib.Path(sys.argv[1]), 5, 2, 1)"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "drawn"
    draw_demo(folder, seed=5, train_per_class=2, test_per_class=1)
    return folder


def test_a_seed_gives_the_same_bytes_in_another_process(drawn: Path, tmp_path: Path) -> None:
    environment = {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / "again")], env=environment, check=True, cwd=tmp_path)
    assert _files(tmp_path / "again") == _files(drawn)


def test_pixels_are_what_they_were_everywhere() -> None:
    """Integers only, so a changed sum means that somebody's packed demo set is no longer ours: say so in CHANGELOG."""
    pixels = b"".join(picture(kind, Dice(0, number))[0].tobytes() for number, kind in enumerate(KINDS))
    assert hashlib.sha256(pixels).hexdigest() == "bdf5e1207be8020e7c7df8a9cddd7aeb18529677981ba493e379084dfeb166b4"


def test_another_seed_gives_other_pictures(drawn: Path, tmp_path: Path) -> None:
    draw_demo(tmp_path / "other", seed=6, train_per_class=2, test_per_class=1)
    ours, theirs = _files(drawn), _files(tmp_path / "other")
    pictures = {name for name in ours if name.endswith(".jpg")}
    assert pictures == {name for name in theirs if name.endswith(".jpg")}
    assert not {ours[name] for name in pictures} & {theirs[name] for name in pictures}


def test_fewer_pictures_are_a_part_of_more(drawn: Path, tmp_path: Path) -> None:
    draw_demo(tmp_path / "less", seed=5, train_per_class=1, test_per_class=1)
    more = _files(drawn)
    for name, data in _files(tmp_path / "less").items():
        assert not name.endswith(".jpg") or more[name] == data, name


def test_no_picture_comes_twice(drawn: Path) -> None:
    pictures = [data for name, data in _files(drawn).items() if name.endswith(".jpg")]
    assert len(set(pictures)) == len(pictures) == 24 * 3


def test_layout_is_what_the_reader_of_cub_takes(drawn: Path) -> None:
    tree, samples = read_cub(drawn, taxonomy=demo_taxonomy())
    assert tree == demo_taxonomy() == read_csv(drawn / "taxonomy.csv", LEVELS, leaf="species")
    assert [sample.split for sample in samples] == ["train", "train", "test"] * 24
    for sample in samples:
        with Image.open(drawn / "images" / sample.where) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")
        assert sample.labels["species"] == sample.where.split("/")[0]


def test_tree_has_three_levels_and_24_species() -> None:
    tree = demo_taxonomy()
    assert tree.num_classes == (3, 6, 24)
    children = np.bincount(tree.paths[tree.offsets[2] :, 1])
    assert children.tolist() == [4] * 6
    assert tree.path_names(tree.node("species", "024.Pale_capped_Slate_Grebe")) == {
        "order": "Water_Birds", "family": "Grebe", "species": "024.Pale_capped_Slate_Grebe",
    }  # fmt: skip
    assert {kind.family for kind in KINDS} == set(SHAPES)


def test_boxes_lie_in_the_picture_and_hold_the_bird(drawn: Path) -> None:
    lines = (drawn / "bounding_boxes.txt").read_text().splitlines()
    assert len(lines) == 24 * 3
    for line in lines:
        x, y, width, height = map(float, line.split()[1:])
        assert 0 <= x < x + width <= 64 and 0 <= y < y + height <= 64
        assert width >= 25 and height >= 15
    # a bird alone: what differs between two plumages in the same scene is the bird, and lies in its box
    for family in SHAPES:
        (one, box), (two, _) = (picture(Kind(family, plumage, MARKS[0]), Dice(9, 9)) for plumage in PLUMAGES)
        rows, columns = np.nonzero(np.abs(one.astype(int) - two).max(axis=2) > 8)
        x, y, width, height = (side / 4 for side in box)
        assert x - 1 <= columns.min() and columns.max() <= x + width and y - 1 <= rows.min()
        assert rows.max() <= y + height


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("plumage", PLUMAGES)
def test_species_of_a_plumage_differ_in_few_pixels(family: str, plumage: str) -> None:
    shares = []
    for number in range(12):
        one, two = (picture(Kind(family, plumage, mark), Dice(1, number))[0].astype(int) for mark in MARKS)
        shares.append(np.mean(np.abs(one - two).max(axis=2) > 16))
    assert max(shares) < 0.05  # fine: 205 of 4096 pixels, both marks together
    assert np.mean(shares) > 0.008  # and there: 32 pixels
    assert min(shares) > 0.002  # never wholly hidden


def test_marks_and_plumage_say_nothing_of_the_family() -> None:
    """The same scene with another shape has about the same colours; with another plumage it has not."""
    distances = {"mark": [], "family": [], "plumage": []}
    base = Kind("Finch", "Amber", MARKS[0])
    others = {"mark": Kind("Finch", "Amber", MARKS[1]), "family": Kind("Plover", "Amber", MARKS[0]),
              "plumage": Kind("Finch", "Slate", MARKS[0])}  # fmt: skip
    for number in range(20):
        for what, other in others.items():
            (one, _), (two, _) = picture(base, Dice(2, number)), picture(other, Dice(2, number))
            distances[what].append(np.abs(_histogram(one) - _histogram(two)).sum())
    means = {what: float(np.mean(values)) for what, values in distances.items()}
    assert means["mark"] < means["plumage"] and means["family"] < means["plumage"], means


def _histogram(pixels: np.ndarray) -> np.ndarray:
    cells = (pixels // 32).reshape(-1, 3).astype(int) @ (64, 8, 1)
    return np.bincount(cells, minlength=512) / len(cells)


def test_colour_histograms_do_not_solve_it(tmp_path: Path) -> None:
    draw_demo(tmp_path / "demo", seed=1, train_per_class=40, test_per_class=15)
    result = histogram_baseline(tmp_path / "demo")
    assert (result.count, result.num_train, result.num_classes) == (360, 960, 24)
    assert 1 / 24 < result.accuracy < 0.4, result


def test_the_baseline_solves_what_colours_do_tell(tmp_path: Path) -> None:
    """The control: classes of the tiny set differ in hue, and it reads packed shards."""
    tiny = tiny_packed(tmp_path / "packed", num_classes=30, train_per_class=20, test_per_class=5)
    result = histogram_baseline(tiny.root)
    assert (result.count, result.num_train, result.level) == (150, 600, "species")
    assert result.accuracy > 0.3, result  # 30 classes: 3 % by chance; the order is the hue, the stripes mix two shades


def test_baseline_command_prints_counts_or_one_line(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(drawn)]) == 0
    assert "of 24 test images, 24 classes, 48 training images" in capsys.readouterr().out
    assert main([str(drawn / "images")]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no packed set" in error


def test_baseline_repeats_itself(drawn: Path) -> None:
    assert histogram_baseline(drawn) == histogram_baseline(drawn)
    assert f"{Baseline(3, 8, 20, 4, 'species')}".endswith(
        "37.5% species accuracy (3 of 8 test images, 4 classes, 20 training images)"
    )


def test_histogram_counts_colour_cells(drawn: Path) -> None:
    path = next(drawn.rglob("*.jpg"))
    counts = histogram(path.read_bytes())
    assert counts.shape == (512,) and math.isclose(counts.sum(), 1, rel_tol=1e-5) and np.count_nonzero(counts) > 5


@pytest.mark.parametrize("seed", range(8))
def test_fill_paints_the_sub_pixels_whose_centres_lie_inside(seed: int) -> None:
    dice = Dice(3, seed)
    outline = dice.array(-20 * UNIT, 84 * UNIT, (dice.between(3, 9), 2))  # beyond the edges too
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    fill(canvas, outline, 7)
    rows, columns = dice.array(0, CANVAS - 1, (2, 4000))
    inside = np.zeros(4000, dtype=bool)
    near_edge = np.zeros(4000, dtype=bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        x, y = columns * 16 + 8, rows * 16 + 8
        spans = (y0 <= y) != (y1 <= y)
        crossing = x0 + (y - y0) * (x1 - x0) / np.where(spans, y1 - y0, 1)
        inside ^= spans & (crossing <= x)
        near_edge |= spans & (np.abs(crossing - x) < 1)
    assert np.array_equal((canvas[rows, columns] == 7)[~near_edge], inside[~near_edge])
    assert near_edge.mean() < 0.05


def test_fill_over_some_inks_only_and_off_the_canvas() -> None:
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    fill(canvas, polygon(0, 0, 32, 0, 32, 64, 0, 64), 1)
    fill(canvas, oval(32, 32, 20, 10), 2, [1])
    assert (canvas[:, CANVAS // 2 :] == 0).all() and (canvas[:, : CANVAS // 2] == 2).any()
    before = canvas.copy()
    fill(canvas, polygon(-90, -90, -70, -90, -80, -70), 3)
    fill(canvas, polygon(70, 0, 90, 0, 80, 60), 3)
    assert np.array_equal(canvas, before)


def test_an_oval_is_one() -> None:
    canvas, reference = np.zeros((CANVAS, CANVAS), dtype=np.uint8), Image.new("L", (CANVAS, CANVAS))
    fill(canvas, oval(30, 34, 20, 10), 1)
    ImageDraw.Draw(reference).ellipse((40, 96, 200, 176), fill=1)
    assert np.mean(canvas != np.asarray(reference)) < 0.01


def test_dice_are_fair_and_reach_both_ends() -> None:
    dice = Dice(11)
    many = dice.array(-3, 4, (8000,))
    assert sorted(set(many.tolist())) == list(range(-3, 5))
    assert np.bincount(many + 3).min() > 880
    assert {dice.between(-3, 4) for _ in range(200)} == set(range(-3, 5))
    assert Dice(1, 2).between(0, 1 << 30) != Dice(2, 1).between(0, 1 << 30)


def test_sines_are_safe_from_the_last_bit_of_any_libm() -> None:
    exact = [16384 * math.sin(math.radians(degree)) for degree in range(len(SINE))]
    assert min(abs(value - math.floor(value) - 0.5) for value in exact) > 1e-6
