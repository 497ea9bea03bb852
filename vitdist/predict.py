"""Answers for new photographs from a run or a checkpoint alone: the best classes with their way through the tree."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vitdist.checkpoint import state as files
from vitdist.checkpoint.store import find_checkpoint
from vitdist.data.pixels.images import DamagedImage
from vitdist.data.pixels.mixing import ToModelInput
from vitdist.data.pixels.transforms import EvalTransform, Preprocessing
from vitdist.errors import CheckpointError, DataError, RecipeError, UsageError
from vitdist.models.classifier import Classifier
from vitdist.photographs import NotAPhotograph, Photograph, find_photographs
from vitdist.recipe.load import load_recipe
from vitdist.taxonomy import Taxonomy
from vitdist.training.assemble import build_model

BATCH_SIZE = 32
MAX_READERS = 8
Picture = str | os.PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What the model says of one photograph, or why it could not be read.

    top: the best classes of the finest level, [{"class", "probability", "path": {level: name}}]; levels: the best class
    of every level as that level's own classifier sees it, {level: {"class", "probability"}}.
    """

    source: str
    error: str | None = None
    top: list[dict[str, Any]] = field(default_factory=list)
    levels: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "error": self.error, "top": self.top, "levels": self.levels}


class Predictor:
    """A trained classifier with its own preprocessing and class tree."""

    def __init__(
        self, model: Classifier, tree: Taxonomy, preprocessing: Preprocessing, *, checkpoint: Path, device: torch.device
    ) -> None:
        self.model = model.eval().to(device)
        self.tree = tree
        self.preprocessing = preprocessing
        self.checkpoint = checkpoint
        self.device = device
        self._view = EvalTransform(preprocessing)
        self._input = ToModelInput(preprocessing.mean, preprocessing.std).to(device)

    def predict(self, images: Picture | Sequence[Picture], top: int = 5) -> list[Prediction]:
        """Answers in the order given; a folder stands for the photographs in it.

        Paths, PIL images and arrays (uint8, [H, W] or [H, W, 3 or 4]) may be mixed. `error` says what cannot be read.
        """
        alone = isinstance(images, (str, os.PathLike, Image.Image, np.ndarray))
        given: Sequence[Any] = [images] if alone else images  # type: ignore[list-item,assignment]
        return list(self.stream(_photographs(given), top))

    def stream(
        self, photographs: Iterable[Photograph], top: int = 5, batch_size: int = BATCH_SIZE
    ) -> Iterator[Prediction]:
        """Answers one by one, with only a batch of photographs in memory."""
        if top < 1:
            raise UsageError(f"top is {top}; at least 1 class can be named")
        waiting = iter(photographs)
        with ThreadPoolExecutor(min(MAX_READERS, len(os.sched_getaffinity(0)))) as readers:
            while batch := list(islice(waiting, batch_size)):
                yield from self._answer(batch, list(readers.map(self._read, batch)), top)

    def _read(self, photograph: Photograph) -> np.ndarray | str:
        """The view of a photograph for the model, or what is wrong with it."""
        try:
            return self._view(photograph.read())
        except (DamagedImage, NotAPhotograph) as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)

    def _answer(self, batch: list[Photograph], views: list[np.ndarray | str], top: int) -> list[Prediction]:
        good = [view for view in views if not isinstance(view, str)]
        answers = iter(self._classify(np.stack(good), top) if good else [])
        return [
            Prediction(photograph.name, error=view)
            if isinstance(view, str)
            else Prediction(photograph.name, None, *next(answers))
            for photograph, view in zip(batch, views, strict=True)
        ]

    @torch.inference_mode()
    def _classify(self, views: np.ndarray, top: int) -> list[tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]]:
        """(top, levels) of each view; views uint8 [B, S, S, 3]."""
        logits = self.model(self._input(torch.from_numpy(views).to(self.device)))
        shares = [level.float().softmax(dim=1).cpu().numpy() for level in logits]
        best = np.argsort(-shares[-1], axis=1, kind="stable")[:, :top]
        return [
            (
                [self._named(int(index), float(shares[-1][row, index])) for index in best[row]],
                {name: self._level(level, shares[level][row]) for level, name in enumerate(self.tree.levels)},
            )
            for row in range(len(views))
        ]

    def _named(self, index: int, probability: float) -> dict[str, Any]:
        path = self.tree.path_names(self.tree.offsets[-2] + index)
        return {"class": self.tree.names[-1][index], "probability": probability, "path": path}

    def _level(self, level: int, shares: np.ndarray) -> dict[str, Any]:
        index = int(shares.argmax())
        return {"class": self.tree.names[level][index], "probability": float(shares[index])}


def load(run_or_checkpoint: str | Path, device: str | torch.device | None = None) -> Predictor:
    """The classifier of a run (its best, else last checkpoint) or of a checkpoint; CheckpointError when there is none.

    On a GPU where there is one, unless `device` says otherwise.
    """
    folder = find_checkpoint(Path(run_or_checkpoint))
    tree = _tree_of(folder)
    preprocessing = Preprocessing.from_json(files.read_json(folder / files.PREPROCESSING))
    try:
        model = build_model(load_recipe(folder / files.RECIPE), tree, weights="none")
    except RecipeError as error:
        raise CheckpointError(f"{folder}: its recipe cannot be used: {error.problems[0]}") from None
    try:
        model.load_state_dict(files.read_tensors(folder / files.MODEL))
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit its own recipe: {' '.join(str(error).split())[:300]}") from None
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Predictor(model, tree, preprocessing, checkpoint=folder, device=chosen)


def run_predict(
    run: str | Path, images: Sequence[str | Path], top: int = 5, out: Path | None = None, overrides: Sequence[str] = ()
) -> int:
    """`launch/predict.py`: name, count and skip what cannot be read; DataError when that is all. Returns 0.

    With `out`, also predictions.json, predictions.csv and a picture per photograph.
    """
    from vitdist import prediction_files as results

    if overrides:
        raise UsageError(f"{overrides[0]}: predicting takes no recipe keys; the checkpoint holds all it needs")
    predictor = load(run)
    photographs = list(find_photographs([Path(path) for path in images]))
    predictions = []
    pictures = results.Pictures(out / "pictures") if out is not None else None
    for photograph, prediction in zip(photographs, predictor.stream(photographs, top), strict=True):
        results.say(prediction)
        predictions.append(prediction)
        if pictures is not None and prediction.error is None:
            pictures.write(photograph, prediction)
    num_read = sum(prediction.error is None for prediction in predictions)
    if out is not None:
        results.write(out, predictor, predictions)
    if not num_read:
        raise DataError(f"none of {len(predictions)} could be read; give JPEG, PNG or WebP files, or folders of them")
    results.say_total(num_read, predictions, out)
    return 0


def _tree_of(folder: Path) -> Taxonomy:
    try:
        return Taxonomy.from_json(files.read_json(folder / files.TAXONOMY))
    except DataError as error:
        raise CheckpointError(f"{folder / files.TAXONOMY}: {error}; choose another checkpoint") from None


def _photographs(given: Sequence[Any]) -> Iterator[Photograph]:
    for number, picture in enumerate(given):
        if isinstance(picture, (str, os.PathLike)):
            yield from find_photographs([Path(picture)])
        else:
            yield Photograph(f"image {number}", data=_encoded(picture))


def _encoded(picture: Any) -> bytes:
    """A picture in memory as PNG, so that it takes the very way of a file; upright, as a file's EXIF would make it."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise UsageError(f"an array must be uint8 [H, W] or [H, W, 3], not {picture.dtype} {list(picture.shape)}")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise UsageError(f"a picture is a path, a PIL image or an array, not {type(picture).__name__}")
    buffer = io.BytesIO()
    ImageOps.exif_transpose(picture).convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
