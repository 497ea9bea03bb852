"""Weights to start from: a safetensors file, a checkpoint or run of ours, a timm folder, or the ones timm names.

Only safetensors are read. A .pth or .bin file is a pickle, which may run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitdist.errors import CheckpointError, DataError
from vitdist.taxonomy import Taxonomy

if TYPE_CHECKING:
    from vitdist.models.backbone import Backbone
    from vitdist.models.classifier import Classifier

FILE_NAME = "model.safetensors"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".npz", ".tar")
CONVERT = "convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)"


@dataclass(frozen=True)
class WeightsRecord:
    """What a model started from, for environment.json and the report."""

    source: str
    file: str
    sha256: str
    loaded: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        left_out = f"; left out {', '.join(self.left_out)}" if self.left_out else ""
        return f"weights {self.source} ({self.sha256[:12]}): loaded {', '.join(self.loaded)}{left_out}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_backbone_weights(backbone: Backbone, spec: str) -> WeightsRecord:
    """Load a backbone strictly from `spec`: `pretrained`, a .safetensors file, a checkpoint, a run, or a timm folder.

    Position embeddings are resampled to the backbone's grid and names converted by timm's own filter; a classifier of
    the source is left out. CheckpointError when a weight is missing, left over, misshapen or not finite.
    """
    path = locate(backbone, spec)
    state = read(path)
    ours = {name.removeprefix("backbone.").removeprefix("model."): tensor for name, tensor in state.items()
            if name.startswith("backbone.")}  # fmt: skip
    left_out = _load_strictly(backbone, ours or state, path)
    if ours and len(ours) < len(state):
        left_out = (*left_out, "head")
    return WeightsRecord(spec, str(path), sha256(path), ("backbone",), left_out)


def load_weights(classifier: Classifier, spec: str, tree: Taxonomy) -> WeightsRecord:
    """Load a backbone, and the head too where the source's head and class tree are the same.

    A head of another kind or tree is left out, which the record says: the usual warm start of a new task.
    """
    record = load_backbone_weights(classifier.backbone, spec)
    path = Path(record.file)
    head = {name.removeprefix("head."): t for name, t in read(path).items() if name.startswith("head.")}
    if not head:
        return record
    reason = _why_not(classifier.head, head, _tree_beside(path), tree)
    left_out = tuple(name for name in record.left_out if name != "head")
    if reason:
        return WeightsRecord(spec, record.file, record.sha256, record.loaded, (*left_out, f"head ({reason})"))
    classifier.head.load_state_dict(head)
    return WeightsRecord(spec, record.file, record.sha256, ("backbone", "head"), left_out)


def _why_not(head: nn.Module, state: dict[str, Tensor], theirs: Taxonomy | None, ours: Taxonomy) -> str:
    """Why a head cannot be taken over, or nothing when it can."""
    if theirs is None:
        return "no taxonomy.json beside it"
    if (theirs.levels, theirs.names) != (ours.levels, ours.names):
        return "another class tree"
    wanted = {name: tensor.shape for name, tensor in head.state_dict().items()}
    return "" if wanted == {name: tensor.shape for name, tensor in state.items()} else "another kind of head"


def _tree_beside(path: Path) -> Taxonomy | None:
    file = path.with_name("taxonomy.json")
    if not file.is_file():
        return None
    try:
        return Taxonomy.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, DataError) as error:
        raise CheckpointError(f"{file} is no class tree: {error}") from None


def locate(backbone: Backbone, spec: str) -> Path:
    """The safetensors file that `spec` means; CheckpointError when there is none."""
    if spec == "pretrained":
        return _pretrained(backbone)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{path} may run code when it is opened; only .safetensors are read: {CONVERT}")
    if not path.is_file():
        raise CheckpointError(f"there are no weights at {path}; give a .safetensors file, a checkpoint or a run")
    return path


def _in_folder(folder: Path) -> Path:
    """The weights of a checkpoint or timm folder, or of a run's best, else last checkpoint."""
    if (folder / FILE_NAME).is_file():
        return folder / FILE_NAME
    for pointer in (folder / "checkpoints" / "best", folder / "checkpoints" / "last"):
        target = pointer
        if pointer.is_file():
            with pointer.open(encoding="utf-8", errors="replace") as file:
                target = pointer.with_name(Path(file.read(200).strip()).name)
        if (target / FILE_NAME).is_file():
            return target / FILE_NAME
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    raise CheckpointError(f"{folder} holds {len(files) or 'no'} safetensors and no {FILE_NAME}; name the file itself")


def _pretrained(backbone: Backbone) -> Path:
    """The file of the weights that timm names for this model, from the local cache where it is there."""
    if backbone.name.startswith("local-dir:"):
        return _in_folder(Path(backbone.name.removeprefix("local-dir:")).expanduser())
    config = getattr(backbone.model, "pretrained_cfg", {})
    if backbone.name.startswith("hf-hub:"):
        config = {"hf_hub_id": backbone.name.removeprefix("hf-hub:")}
    if not config.get("hf_hub_id"):
        raise CheckpointError(f"timm names no weights for {backbone.name}; give a file, or set model.weights to none")
    repository, _, revision = str(config["hf_hub_id"]).partition("@")
    filename = str(config.get("hf_hub_filename") or FILE_NAME)
    if not filename.endswith(".safetensors"):
        filename = FILE_NAME
    return fetch(repository, filename, revision or None)


def fetch(repository: str, filename: str = FILE_NAME, revision: str | None = None) -> Path:
    """A file of a Hugging Face repository: from the cache without any network, else downloaded into it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # else each retry is a line of its own on every rank
    download = partial(hf_hub_download, repository, filename, revision=revision)
    try:
        return Path(download(local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(download())
    except Exception as error:  # the client raises its own, the HTTP library's and the socket's errors
        raise CheckpointError(
            f"{filename} of {repository} is not in the cache and cannot be fetched ({type(error).__name__}); run "
            "`vitdist fetch RECIPE` where there is internet, or set model.weights to a .safetensors file"
        ) from None


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floating ones in float32; CheckpointError when it is damaged or hostile.

    The library checks the header's size, every offset against the file, overlaps and gaps before a byte is used.
    """
    try:
        state = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no sound safetensors file ({error}); fetch or write it again") from None
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; use other weights")
    return state


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _load_strictly(backbone: Backbone, state: dict[str, Tensor], path: Path) -> tuple[str, ...]:
    """Load timm-named weights; returns the names that a classifier of the source is left out by."""
    model = backbone.model
    try:
        state = _filter(model)(state, model)
    except (RuntimeError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit {backbone.name}: {error}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    classifier = _classifier_names(model)
    left_out = tuple(name for name in state if name not in wanted and name.rpartition(".")[0] in classifier)
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    misshapen = [name for name in kept if name in wanted and tuple(kept[name].shape) != wanted[name]]
    problems = [
        _some("lacks", (name for name in wanted if name not in kept)),
        _some("has beside them", (name for name in kept if name not in wanted)),
        _some("has another shape of", misshapen),
    ]
    if any(problems):
        what = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{path} does not fit {backbone.name} at {backbone.image_size} px: it {what}")
    model.load_state_dict(kept)
    return left_out


def _some(what: str, names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{what} {', '.join(found[:3])}{more}" if found else ""


def _classifier_names(model: nn.Module) -> set[str]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return {names} if isinstance(names, str) else set(names)


def _filter(model: nn.Module) -> Any:
    """timm's conversion of a checkpoint for a model: each of its modules keeps one under this name.

    FlexiViT wants the bilinear resampling that timm gives it when it loads by itself.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return lambda state, model: state
    if "flexi" in str(getattr(model, "pretrained_cfg", {}).get("architecture", "")):
        return partial(convert, interpolation="bilinear", antialias=False)
    if len(signature(convert).parameters) == 1:
        return lambda state, model: convert(state)
    return convert
