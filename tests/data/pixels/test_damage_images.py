"""D1 at the loader: pictures that were bad when packed are met by their kind, odd but sound ones come out right."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.pixels.test_images import JPEG, PNG, SMOOTH, encoded, exif
from tests.data.storage.test_damage import PREPARED, account
from tests.data.storage.test_untrusted import jpeg_bomb, png_bomb, tar
from vitdist.data.index import Split
from vitdist.data.loading.batch import Batch
from vitdist.data.loading.load import TOGETHER, Load, Unseeded
from vitdist.data.loading.loader import batches
from vitdist.data.loading.places import EvaluationSource, Place, TrainSource
from vitdist.data.packing.foreign import index_foreign
from vitdist.data.packing.labels import LabelReader
from vitdist.data.pixels.transforms import Augment, EvalTransform, TrainTransform
from vitdist.data.plan import make_plan
from vitdist.data.views import everything

BAD = {
    "cut to 60 %": (JPEG[: len(JPEG) * 6 // 10], "truncated"),
    "a PNG cut to 60 %": (PNG[: len(PNG) * 6 // 10], "truncated"),
    "empty": (b"", "empty"),
    "HTML": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "format not allowed"),
    "a TIFF": (encoded(SMOOTH, "TIFF"), "format not allowed"),
    "169 megapixels": (png_bomb(), "too many pixels"),
    "4 gigapixels": (jpeg_bomb(), "too many pixels"),
}
_DEEP = np.repeat(np.repeat(np.arange(64, dtype=np.uint16)[:, None] * 1000, 48, 1)[..., None], 1, 2)[..., 0]
GOOD = {
    "CMYK": encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
    "grey": encoded(SMOOTH[..., 0], "JPEG"),
    "16 bits": encoded(Image.fromarray(_DEEP), "PNG"),
    "turned": encoded(SMOOTH, "JPEG", quality=90, exif=exif(6)),
    "usual": JPEG,
}
BATCH = 4


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Every kind once, each between sound ones, all named .jpg as strangers do."""
    folder = tmp_path_factory.mktemp("images")
    kinds = list(itertools.chain.from_iterable(zip(BAD.items(), itertools.repeat(("usual", (JPEG, "")))))) + [
        (name, (data, "")) for name, data in GOOD.items()
    ]
    members = [((f"{n:03d}.jpg", data), (f"{n:03d}.cls", b"0")) for n, (_, (data, _)) in enumerate(kinds)]
    shard = tar(folder / "train.tar", *itertools.chain.from_iterable(members))
    return index_foreign([str(shard)], folder / "out", LabelReader()).index.split("train")


def bad_rows(split: Split) -> dict[int, str]:
    return {2 * n: kind for n, (_, kind) in enumerate(BAD.values())}


def expected(split: Split) -> Counter[tuple[str, str]]:
    return Counter((kind, split.shards[0].path) for kind in bad_rows(split).values())


def epoch(split: Split, *, skip: bool, num_workers: int) -> list[Batch]:
    plan = make_plan(
        everything(split.shard_starts), np.empty(0, np.int32), sampling="uniform", global_batch_size=3, seed=4
    )
    assert split.num_samples % 3 == 0, "so that nothing is left out"
    source = TrainSource(plan, rank=0, world=1, micro_batch_size=3, start=0)
    load = Load(split, TrainTransform(PREPARED, Augment()), replacement=plan.replacement if skip else None)
    return list(itertools.islice(batches(source, load, 32, 3, num_workers=num_workers), plan.steps_per_epoch))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_counts_every_kind_and_fills_every_slot(split: Split, num_workers: int) -> None:
    found = epoch(split, skip=True, num_workers=num_workers)
    assert account(found) == expected(split)
    used = [row for batch in found for row in batch.rows.tolist()]
    assert set(used) == set(range(split.num_samples)) - set(bad_rows(split)) and len(used) == split.num_samples
    assert all(batch.valid.all() for batch in found)


def test_raise_names_the_shard_the_sample_and_the_kind(split: Split) -> None:
    found = epoch(split, skip=False, num_workers=0)
    assert account(found) == expected(split)
    assert {row for batch in found for row in batch.rows[~batch.valid].tolist()} == set(bad_rows(split))
    for damage in (damage for batch in found for damage in batch.damages):
        assert f"sample {damage.row} at byte" in str(damage) and bad_rows(split)[damage.row] in str(damage)


def test_a_gap_is_black_whatever_lay_there_before(split: Split) -> None:
    out = np.full((32, 32, 3), 7, np.uint8)
    loaded = Load(split, Unseeded(EvalTransform(PREPARED)))([Place(next(iter(bad_rows(split))), 0, 0, 0, 0)], out[None])
    assert not loaded[0].is_valid and not out.any()


def test_places_together_become_what_each_becomes_alone(split: Split) -> None:
    """More than are read together, good and bad."""
    rows = 4 * list(range(split.num_samples))
    assert len(rows) > 2 * TOGETHER
    load = Load(split, TrainTransform(PREPARED, Augment()))
    places = [Place(row, 100 + slot, 0, 0, slot) for slot, row in enumerate(rows)]
    images, image = np.full((len(rows), 32, 32, 3), 7, np.uint8), np.full((1, 32, 32, 3), 9, np.uint8)
    loaded = load(places, images)
    assert {row for row, one in zip(rows, loaded, strict=True) if not one.is_valid} == set(bad_rows(split))
    for place, together, one in zip(places, images, loaded, strict=True):
        assert load([place], image) == [one] and np.array_equal(image[0], together), place


def test_evaluation_leaves_the_bad_out_and_shows_the_odd_as_they_are(split: Split) -> None:
    view = everything(split.shard_starts)
    load = Load(split, Unseeded(EvalTransform(PREPARED)))
    found = list(batches(EvaluationSource(view, (0, view.num_samples), BATCH), load, 32, BATCH, num_workers=1))
    assert account(found) == expected(split)
    images = {row: image.numpy() for b in found for row, image in zip(b.rows.tolist(), b.images, strict=True)}
    valid = {row for batch in found for row in batch.rows[batch.valid].tolist()}
    assert valid == set(range(split.num_samples)) - set(bad_rows(split))
    assert all(not images[row].any() for row in bad_rows(split))
    for row, (name, data) in enumerate(GOOD.items(), start=2 * len(BAD)):
        assert np.abs(images[row].astype(int) - by_pil(data).astype(int)).max() <= 3, name


def by_pil(data: bytes) -> np.ndarray:
    """What PIL shows of it: upright, RGB (16 bits cut to their high byte), the short side to 32, its middle."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    scale = 32 / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
    return np.asarray(image)[top : top + 32, left : left + 32]
