"""Predictions for people and programs: lines on the terminal, JSON, CSV, photographs with their answers below."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from PIL import Image, ImageDraw, ImageFont

from vitdist.data.pixels.images import decode
from vitdist.durable import write_whole
from vitdist.errors import ResourceError
from vitdist.photographs import Photograph

if TYPE_CHECKING:
    from vitdist.predict import Prediction, Predictor

WIDTH = 560  # pixels of a drawn picture
_LINE, _EDGE = 30, 16
_PAPER, _INK, _SOFT, _BAR = (250, 250, 248), (29, 33, 38), (93, 102, 113), (203, 220, 243)


def say(prediction: Prediction) -> None:
    """One line a photograph; what could not be read goes to stderr."""
    if prediction.error is not None:
        _print(f"{prediction.source}: skipped, {prediction.error}", sys.stderr)
        return
    best = prediction.top[0]
    _print(f"{prediction.source}: {best['class']} {100 * best['probability']:.1f} % ({way(best)})", sys.stdout)


def say_total(num_read: int, predictions: Sequence[Prediction], out: Path | None) -> None:
    """How many were read, and where the answers lie."""
    where = f"; written to {out}" if out is not None else ""
    _print(f"{num_read:,} of {len(predictions):,} read{where}", sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    """Letters that the terminal's encoding lacks are shown by their numbers."""
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def way(answer: dict[str, Any]) -> str:
    """The way through the tree, coarse to fine."""
    return " > ".join(answer["path"].values())


def write(out: Path, predictor: Predictor, predictions: Sequence[Prediction]) -> None:
    """predictions.json and predictions.csv; ResourceError when they cannot be written."""
    num_read = sum(prediction.error is None for prediction in predictions)
    about = {"checkpoint": str(predictor.checkpoint), "levels": list(predictor.tree.levels)}
    counts = {"count": len(predictions), "read": num_read, "skipped": len(predictions) - num_read}
    content = {**about, **counts, "predictions": [prediction.to_json() for prediction in predictions]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / "predictions.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _replace(out / "predictions.csv", _table(predictor.tree.levels, predictions))
    except OSError as error:
        raise ResourceError(f"cannot write {out}: {error.strerror}; make room or choose another --out") from None


def _table(levels: Sequence[str], predictions: Sequence[Prediction]) -> str:
    num_top = max((len(prediction.top) for prediction in predictions), default=0)
    places = range(num_top)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    head = [f"{name}{kind}" for name in levels for kind in ("", "_probability")]
    table.writerow(
        ["source", "error", *head, *(f"{kind}_{place + 1}" for place in places for kind in ("top", "probability"))]
    )
    for prediction in predictions:
        answers = [prediction.levels.get(name, {}) for name in levels]
        answers += [prediction.top[place] if place < len(prediction.top) else {} for place in places]
        cells = [cell for answer in answers for cell in (answer.get("class", ""), _share(answer))]
        table.writerow([prediction.source, prediction.error or "", *cells])
    return text.getvalue()


def _share(answer: dict[str, Any]) -> str:
    return f"{answer['probability']:.6f}" if answer else ""


def _replace(path: Path, text: str) -> None:
    write_whole(path, text.encode(errors="backslashreplace"))  # a file name may hold bytes that are no text


class Pictures:
    """A folder of annotated photographs; equal names from different folders get numbers of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: set[str] = set()

    def write(self, photograph: Photograph, prediction: Prediction) -> Path | None:
        """Draw one photograph with its answers; None when it is gone, ResourceError when that cannot be written."""
        try:
            sheet = draw(photograph.read(), prediction)
        except (OSError, ValueError):  # it was there a moment ago, and its answer stands
            return None
        path = self.folder / self._name(prediction.source)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(path, "JPEG", quality=88)
        except OSError as error:
            raise ResourceError(f"cannot write {path}: {error.strerror}; make room or choose another --out") from None
        return path

    def _name(self, source: str) -> str:
        """The photograph's own name where it is free; compared without case, as some file systems do."""
        stem = (
            re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", Path(source).stem).encode()[:150].decode(errors="ignore") or "image"
        )
        name, number = f"{stem}.jpg", 1
        while name.casefold() in self._taken:
            number += 1
            name = f"{stem}_{number}.jpg"
        self._taken.add(name.casefold())
        return name


def draw(data: bytes, prediction: Prediction) -> Image.Image:
    """The photograph with its best classes, their probabilities as bars, and the way through the tree."""
    photo = Image.fromarray(decode(data, min_side=WIDTH))
    photo.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    height = photo.height + 2 * _EDGE + _LINE * (len(prediction.top) + 1)
    sheet = Image.new("RGB", (WIDTH, height), _PAPER)
    sheet.paste(photo, ((WIDTH - photo.width) // 2, 0))
    pen, y = ImageDraw.Draw(sheet), photo.height + _EDGE
    pen.text((_EDGE, y), _fit(pen, way(prediction.top[0]), 14, WIDTH - 2 * _EDGE), _SOFT, _font(14))
    for answer in prediction.top:
        y += _LINE
        share = answer["probability"]
        length = round(share * (WIDTH - 2 * _EDGE))
        pen.rectangle((_EDGE, y, _EDGE + length, y + _LINE - 6), _BAR)
        text, number = _fit(pen, answer["class"], 16, WIDTH - 120), f"{100 * share:.1f} %"
        pen.text((_EDGE + 6, y + 2), text, _INK, _font(16))
        pen.text((WIDTH - _EDGE, y + 2), number, _INK, _font(16), anchor="ra")
    return sheet


def _fit(pen: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    if pen.textlength(text, _font(size)) <= width:
        return text
    while text and pen.textlength(text + "…", _font(size)) > width:
        text = text[:-1]
    return text + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Latin, Greek and Cyrillic letters."""
    # found, not imported: it would look for a place for its settings, and speak of it
    package = find_spec("matplotlib")
    assert package is not None and package.origin is not None
    return ImageFont.truetype(str(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
