"""The recipe as one typed object: what a run is, and nothing else decides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, PrivateAttr, model_validator

from vitdist.recipe.emit import emit
from vitdist.recipe.fields import VALUES, Section, key, section
from vitdist.recipe.inputs import Augment, Data
from vitdist.recipe.learning import Ema, Loss, LrScheduler, Model, Optimizer
from vitdist.recipe.running import Checkpoint, EarlyStopping, Evaluation, Parallel, Tracking, Train

MAX_NAME = 100


def _file_name(text: str) -> str:
    if not text or len(text) > MAX_NAME or text[0] in ". " or any(c in "/\\" or not c.isprintable() for c in text):
        raise ValueError("cannot name a folder")
    return text


class Recipe(Section):
    """A resolved recipe; `load_recipe` makes one, `to_yaml` writes it so that it loads back equal."""

    name: Annotated[str, AfterValidator(_file_name)] = key(
        "the run's name; the recipe file's where it is not given", "run",
        allowed=f"text without / of at most {MAX_NAME} characters",
    )  # fmt: skip
    seed: int = key("all randomness of the run but the validation split", 0, ge=0, le=2**32 - 1)
    out: str = key("the run folder itself; runs/NAME where it is not given", "", path=True, allowed="a path")
    data: Data = section("which photographs, and how they are read")
    augment: Augment = section("what is varied in training pictures", Augment)
    model: Model = section("backbone, weights and head", Model)
    loss: Loss = section("cross-entropy over the levels, and penalties", Loss)
    optimizer: Optimizer = section("how gradients become updates", Optimizer)
    ema: Ema = section("an average of the weights, evaluated in their place", Ema)
    lr_scheduler: LrScheduler = section("how the learning rate changes", LrScheduler)
    train: Train = section("length, batch and arithmetic", Train)
    early_stopping: EarlyStopping = section("ending before max_duration", EarlyStopping)
    evaluation: Evaluation = section("when and on what the model is measured", Evaluation)
    parallel: Parallel = section("how ranks share the work", Parallel)
    checkpoint: Checkpoint = section("when state is saved, and what is kept", Checkpoint)
    tracking: Tracking = section("where numbers go besides metrics.jsonl", Tracking)

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:
        return resolve_defaults(data) if isinstance(data, Mapping) else data

    @property
    def sources(self) -> dict[str, str]:
        """Where each key's value comes from: `file:line`, `command line` or `default`."""
        return {name: self._sources.get(name, "default") for name in self.flat()}

    def flat(self) -> dict[str, Any]:
        """Dotted key -> plain value (text, number, truth value, list, mapping, None); durations as text."""
        return flatten(self.model_dump(mode="json"))

    def to_yaml(self, *, sources: bool = False) -> str:
        """All values as a recipe that loads back equal; with `sources`, each line says where its value comes from."""
        return emit(self.model_dump(mode="json"), self.sources if sources else {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.flat() == other.flat()

    __hash__ = None  # type: ignore[assignment]


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        dotted = prefix + name
        if isinstance(value, Mapping) and dotted not in VALUES:
            flat.update(flatten(value, dotted + "."))
        else:
            flat[dotted] = value
    return flat


VIT = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0}


def resolve_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that depend on other keys; values of a wrong type pass untouched to the validation."""
    filled = {name: dict(part) if isinstance(part, Mapping) else part for name, part in data.items()}

    def given(section: str, name: str, default: Any = None) -> Any:
        part = filled.get(section)
        return part.get(name, default) if isinstance(part, dict) else default

    def fill(section: str, name: str, value: Any) -> None:
        part = filled.setdefault(section, {})
        if isinstance(part, dict) and part.get(name) is None:
            part[name] = value

    if filled.get("out") in (None, ""):
        filled["out"] = f"runs/{filled.get('name', 'run')}"
    fill("model", "self_attention_blocks", int(given("model", "head") == "attention"))
    if given("model", "backbone") == "vit":
        fill("data", "image_size", 224)
        for name, value in VIT.items():
            fill("model", name, value)
    if given("model", "backbone") == "vit" or given("model", "freeze") == "backbone":
        fill("optimizer", "layer_decay", 1.0)
    if given("model", "weights") == "none":
        fill("optimizer", "head_lr_scale", 1.0)
    if given("evaluation", "protocol") == "refit" and "monitor" not in (filled.get("checkpoint") or {}):
        fill("checkpoint", "monitor", None)
    return filled
