"""What colours alone can tell: a random forest on colour histograms, to hold a trained model against.

`python -m vitdist.data.baseline FOLDER` prints its accuracy on a packed set, or on a folder that `draw_demo` drew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitdist.data.index import INDEX_NAME, load_index
from vitdist.data.pixels.images import decode
from vitdist.data.storage.shards import ShardReader
from vitdist.errors import VitdistError, lines

BINS = 8  # of each channel
NUM_TREES = 300

Labelled = tuple[bytes, str]  # an image, and its class at the finest level


@dataclass(frozen=True)
class Baseline:
    """How many test images the forest got right, and out of what."""

    correct: int
    count: int
    num_train: int
    num_classes: int
    level: str

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    def __str__(self) -> str:
        return (
            f"colour histograms ({BINS}x{BINS}x{BINS}) and a random forest of {NUM_TREES} trees: {self.accuracy:.1%} "
            f"{self.level} accuracy ({self.correct} of {self.count} test images, {self.num_classes} classes, "
            f"{self.num_train} training images)"
        )


def histogram_baseline(folder: str | Path, *, seed: int = 0) -> Baseline:
    """Fit on train, count on test, at the finest level of a packed or drawn set; DataError when it is neither."""
    from sklearn.ensemble import RandomForestClassifier  # seconds to import, and only needed here

    folder = Path(folder)
    read = _packed if (folder / INDEX_NAME).is_file() or not (folder / "images.txt").is_file() else _drawn
    level, train, test = read(folder)
    (train_counts, train_names), (test_counts, test_names) = _table(train), _table(test)
    forest = RandomForestClassifier(NUM_TREES, random_state=seed, n_jobs=1)
    forest.fit(train_counts, train_names)
    correct = int((forest.predict(test_counts) == test_names).sum())
    return Baseline(correct, len(test_names), len(train_names), len(set(train_names)), level)


def histogram(image: bytes) -> np.ndarray:
    """float32 [512]: the share of an image's pixels in each colour cell."""
    cells = (decode(image) // (256 // BINS)).reshape(-1, 3).astype(np.int64) @ (BINS * BINS, BINS, 1)
    return np.bincount(cells, minlength=BINS**3).astype(np.float32) / len(cells)


def _table(samples: Iterable[Labelled]) -> tuple[np.ndarray, np.ndarray]:
    rows = [(histogram(image), name) for image, name in samples]
    return np.stack([counts for counts, _ in rows]), np.array([name for _, name in rows])


def _packed(folder: Path) -> tuple[str, Iterable[Labelled], Iterable[Labelled]]:
    index = load_index(folder)
    level = index.taxonomy.levels[-1]

    def samples(name: str) -> Iterable[Labelled]:
        split = index.split(name)
        reader = ShardReader(split)
        for row, label in enumerate(split.samples["label"].tolist()):
            if level in (path := index.taxonomy.path_names(label)):
                yield reader.read(row), path[level]
        reader.close()

    return level, samples("train"), samples("test")


def _drawn(folder: Path) -> tuple[str, Iterable[Labelled], Iterable[Labelled]]:
    from vitdist.data.sources.cub import read_cub
    from vitdist.data.sources.demo import demo_taxonomy

    tree, samples = read_cub(folder, taxonomy=demo_taxonomy())
    level = tree.levels[-1]

    def part(name: str) -> Iterable[Labelled]:
        return ((sample.image.read(), sample.labels[level]) for sample in samples if sample.split == name)

    return level, part("train"), part("test")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints one line; 0, or the exit code of what is wrong with the folder."""
    parser = argparse.ArgumentParser(prog="python -m vitdist.data.baseline", description=main.__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="a packed set, or a folder that was drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the forest (default 0)")
    options = parser.parse_args(arguments)
    try:
        print(histogram_baseline(options.folder, seed=options.seed))
    except VitdistError as error:
        print("\n".join(lines(error)), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
