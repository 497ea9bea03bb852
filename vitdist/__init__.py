"""vitdist: hierarchical fine-grained image classification that scales from a laptop to a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdist.predict import Predictor

__all__ = ["load"]


def load(run: str | Path, device: str | None = None) -> Predictor:
    """A trained model, ready to predict: `vitdist.load("runs/demo").predict(["bird.jpg"])`.

    `run` is a run folder (its best, else last checkpoint) or a checkpoint folder; CheckpointError when it is neither.
    """
    from vitdist.predict import load as load_predictor  # torch, only where it is needed

    return load_predictor(run, device)
