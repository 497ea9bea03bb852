"""The prediction table: what a model said about every sample of a split, as plain arrays in one .npz file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vitdist.durable import whole_file
from vitdist.errors import DataError

UNKNOWN = -1
NEAR_TIE = 1e-5  # below this the order of two classes may differ between devices and batch shapes
_TYPES = {
    "rows": np.int64,
    "targets": np.int32,
    "predictions": np.int32,
    "topk_ids": np.int32,
    "topk_probs": np.float32,
    "margin": np.float32,
    "loss": np.float32,
}


@dataclass(frozen=True)
class PredictionTable:
    """N samples, L levels from coarse to fine, the K best classes of the finest level.

    rows [N] are positions in the packed split; targets, predictions [N, L] class indices, -1 unknown; topk_ids and
    topk_probs [N, K]; margin [N, L] the difference of the two best logits; loss [N, L] cross-entropy, NaN unknown.
    """

    rows: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    topk_ids: np.ndarray
    topk_probs: np.ndarray
    margin: np.ndarray
    loss: np.ndarray

    def __post_init__(self) -> None:
        for name, kind in _TYPES.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=kind))
        if self.margin.ndim == 1:
            object.__setattr__(self, "margin", self.margin.reshape(-1, 1))
        shape = self.targets.shape
        shapes_fit = (
            self.rows.ndim == 1
            and len(shape) == 2
            and self.predictions.shape == self.loss.shape == shape
            and self.topk_ids.ndim == 2
            and self.topk_ids.shape == self.topk_probs.shape
            and self.margin.ndim == 2
            and all(len(getattr(self, name)) == len(self.rows) for name in _TYPES)
        )
        if not shapes_fit:
            raise DataError("the arrays of the prediction table do not fit together; run the evaluation again")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_levels(self) -> int:
        return int(self.targets.shape[1])

    def take(self, which: np.ndarray) -> PredictionTable:
        """The rows chosen by a mask or by positions, in that order."""
        return PredictionTable(**{name: getattr(self, name)[which] for name in _TYPES})

    def sorted(self) -> PredictionTable:
        """The same predictions in the order of the packed split."""
        return self.take(np.argsort(self.rows, kind="stable"))

    def near_ties(self, below: float = NEAR_TIE) -> np.ndarray:
        """int64: rows whose two best classes differ by less than `below` at some level."""
        return self.rows[(self.margin < below).any(axis=1)]

    def save(self, path: Path) -> None:
        """Write the table so that the final name only ever holds a whole file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.savez_compressed(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def load(path: Path) -> PredictionTable:
        """Read a table without unpickling anything; DataError when the file is missing, cut or of another kind."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return PredictionTable(**{name: file[name] for name in _TYPES})
        except FileNotFoundError:
            raise DataError(f"{path} is missing; run the evaluation again to write it") from None
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no prediction table ({error}); run the evaluation again") from None


def merge(tables: Sequence[PredictionTable]) -> PredictionTable:
    """One table of many ranks' parts, in the order of the split; DataError when a row comes twice."""
    joined = PredictionTable(**{name: np.concatenate([getattr(part, name) for part in tables]) for name in _TYPES})
    whole = joined.sorted()
    twice = whole.rows[1:][whole.rows[1:] == whole.rows[:-1]]
    if len(twice):
        raise DataError(
            f"{len(twice)} samples were evaluated twice, the first is row {twice[0]}: a bug, please report it"
        )
    return whole


def from_logits(
    rows: np.ndarray, targets: np.ndarray, logits: Sequence[np.ndarray], num_top: int = 5
) -> PredictionTable:
    """The table of one batch: rows [B], targets [B, L] (-1 unknown), float32 logits [B, C] for each level."""
    scores = [np.asarray(level, dtype=np.float32) for level in logits]
    log_probs = [_log_softmax(level) for level in scores]
    finest = scores[-1]
    best = np.argsort(-finest, axis=1, kind="stable")[:, : min(num_top, finest.shape[1])]
    losses = [_cross_entropy(values, targets[:, level]) for level, values in enumerate(log_probs)]
    return PredictionTable(
        rows=rows,
        targets=targets,
        predictions=np.stack([level.argmax(axis=1) for level in scores], axis=1),
        topk_ids=best,
        topk_probs=np.exp(np.take_along_axis(log_probs[-1], best, axis=1)),
        margin=np.stack([_margin(level) for level in scores], axis=1),
        loss=np.stack(losses, axis=1),
    )


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _cross_entropy(log_probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    known = targets != UNKNOWN
    picked = np.take_along_axis(log_probs, np.where(known, targets, 0)[:, None].astype(np.int64), axis=1)[:, 0]
    return np.where(known, -picked, np.nan)


def _margin(scores: np.ndarray) -> np.ndarray:
    if scores.shape[1] < 2:
        return np.full(len(scores), np.inf, dtype=np.float32)
    top = np.partition(scores, -2, axis=1)
    return top[:, -1] - top[:, -2]
