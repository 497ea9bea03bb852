"""A training as files, and back: tensors in safetensors, the rest in JSON, no pickle.

model.safetensors holds the weights to use (the average where there is one); training.safetensors what only going on
needs: the weights under training, the optimizer's tensors by parameter name, and every rank's random generators.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitdist.checkpoint.manifest import is_plain_file
from vitdist.errors import CheckpointError, NonFiniteError

MODEL = "model.safetensors"
TRAINING = "training.safetensors"
STATE = "state.json"
RECIPE = "recipe.yaml"
TAXONOMY = "taxonomy.json"
PREPROCESSING = "preprocessing.json"
_MAX_JSON = 64 << 20
_MAX_HEADER = 16 << 20  # safetensors itself takes 100 MB, which cost a second and 500 MB; ours are below 1 MB


@dataclass(frozen=True)
class Snapshot:
    """Everything one checkpoint holds, on the host: nothing here changes while it is written."""

    step: int
    model: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    state: Mapping[str, Any]
    recipe: str
    taxonomy: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    weights: str  # "ema" or "raw": what model.safetensors holds

    @property
    def num_bytes(self) -> int:
        """What its tensors take on disk; the rest is small."""
        return num_bytes(self.model) + num_bytes(self.training)

    def write(self, folder: Path, mark: Callable[[str], None] = lambda phase: None) -> dict[str, Any]:
        """Write the files; returns what the manifest says of them. NonFiniteError instead of keeping a NaN."""
        self._check_finite()
        save_file(dict(self.model), folder / MODEL)
        mark("between-files")
        save_file(dict(self.training), folder / TRAINING)
        (folder / STATE).write_text(_dump(self.state))
        (folder / RECIPE).write_text(self.recipe, encoding="utf-8")
        (folder / TAXONOMY).write_text(_dump(self.taxonomy))
        (folder / PREPROCESSING).write_text(_dump(self.preprocessing))
        for name in (MODEL, TRAINING):  # safetensors makes its files for their owner alone, whatever the umask says
            shutil.copymode(folder / RECIPE, folder / name)
        return {"weights": self.weights}

    def _check_finite(self) -> None:
        for tensors in (self.model, self.training):
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteError(
                        f"{name} at step {self.step} holds numbers that are not finite, so it is not kept; "
                        "start again to go on from the checkpoint before, with a lower optimizer.lr"
                    )


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """JSON of a checkpoint; CheckpointError when it is damaged, too large, too deep or holds NaN."""
    try:
        if not is_plain_file(path) or path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is too large, or no plain file")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; choose another checkpoint") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; CheckpointError when it is damaged."""
    try:
        _check_header(path)
        return load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; choose another checkpoint") from None


def _check_header(path: Path) -> None:
    """A header is parsed whole before anything can be said of it, so its size is looked at first."""
    if not is_plain_file(path):
        raise CheckpointError(f"{path} is not a plain file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"its header claims {length} bytes")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`name/key` -> tensor for every parameter's state; names are the model's, so groups may change their order."""
    tensors = {}
    for name, parameter in _named(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                assert isinstance(value, Tensor), f"{key} of the optimizer is no tensor"
                tensors[f"{name}/{key}"] = value
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; CheckpointError when it is of another model."""
    parameters = dict(_named(optimizer))
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"the optimizer's state has {name}, which is not trained here")
        if tensor.numel() != 1 and tensor.shape != parameter.shape:
            raise CheckpointError(
                f"the optimizer's state of {name} has shape {tuple(tensor.shape)}, not the parameter's"
            )
        # fused kernels want moments and step counters beside their parameters, and moments laid out like them
        like = parameter if tensor.shape == parameter.shape else tensor
        state = torch.empty_like(like, dtype=tensor.dtype, device=parameter.device, requires_grad=False)
        optimizer.state[parameter][key] = state.copy_(tensor)


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a prefix before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
