"""20 steps of a tiny recipe: the losses as hex floats, by torch version and CPU capability."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests import launching, run_state
from tests.data.tiny import tiny_packed

FILE = Path(__file__).with_name("losses.json")
RECIPE = """name: golden
seed: 11
data: {{path: {path}, image_size: 32, num_workers: 1}}
augment: {{crop_scale: [0.4, 1.0], rotation: 10, color_jitter: 0.2, mixup: 0.3, cutmix: 0.5, erasing: 0.2}}
model: {{backbone: vit, weights: none, patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2,
  drop_path: 0.1, head_dropout: 0.1}}
loss: {{label_smoothing: 0.1, class_weights: sqrt, l2: 1e-4}}
optimizer: {{lr: 1e-3}}
lr_scheduler: {{warmup: 3steps}}
ema: {{decay: 0.9}}
train: {{max_duration: 20steps, global_batch_size: 24, micro_batch_size: 6}}
evaluation: {{every: 20steps}}
checkpoint: {{every: 20steps}}
"""


def environment() -> str:
    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def on_file() -> dict[str, dict[str, list[str]]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def measure(world: int, folder: Path) -> list[str]:
    """The losses of 20 steps on some ranks."""
    data = folder / "golden_data"
    if not data.exists():
        tiny_packed(data, num_classes=100, train_per_class=4, test_per_class=1)
    recipe = folder / "golden.yaml"
    recipe.write_text(RECIPE.format(path=data))
    codes, output = launching.run(world, ["train", str(recipe), f"out=world{world}"], folder)
    assert codes == [0] * world, output
    return [loss for _, loss in run_state.losses(folder / f"world{world}")]
