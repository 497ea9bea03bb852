"""Shared fixtures: the tiny set, tiny recipes, and where the real photographs are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.data.tiny import tiny_packed
from vitdist.data.index import DatasetIndex

# Tests fork ranks and compare bits; a pool of OpenMP threads in this process would disturb both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

Recipes = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    """200 classes in 3 levels, 32 px: 400 training and 200 test pictures."""
    return tiny_packed(tmp_path_factory.mktemp("tiny") / "packed", train_per_class=2, test_per_class=1)


@pytest.fixture
def tiny_recipe(tiny: DatasetIndex, tmp_path: Path) -> Recipes:
    """Writes a recipe of 12 steps on the tiny set; dotted keys replace values. Two ranks share nothing but the file."""

    def write(name: str = "tiny", **changes: Any) -> Path:
        recipe: dict[str, Any] = {
            "name": name,
            "seed": 7,
            "data": {"path": str(tiny.root), "image_size": 32, "num_workers": 1, "val": {"fraction": 0.2}},
            "augment": {"crop_scale": [0.6, 1.0], "mixup": 0.2, "cutmix": 0.5},
            "model": {
                "backbone": "vit", "weights": "none", "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2,
                "head": "hierarchical", "drop_path": 0.0,
            },
            "optimizer": {"lr": 1e-3},
            "lr_scheduler": {"warmup": "2steps"},
            "train": {"max_duration": "12steps", "global_batch_size": 24},
            "evaluation": {"every": "6steps"},
            "checkpoint": {"every": "3steps"},
        }  # fmt: skip
        for key, value in changes.items():
            section, _, field = key.partition("__")
            if field:
                recipe[section] = {**recipe.get(section, {}), field: value}
            else:
                recipe[section] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write
