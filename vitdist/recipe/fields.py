"""What every section of a recipe is made of: strict frozen models whose keys carry a doc line, unit and range."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from vitdist.recipe.durations import DurationOf

VALUES = {"loss.level_weights"}  # mappings that are one value, not a section


class Section(BaseModel):
    """A group of keys: unknown ones are refused, numbers are finite, nothing is converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def key(doc: str, default: Any = ..., *, unit: str = "", path: bool = False, allowed: str = "", **limits: Any) -> Any:
    """A key of a section.

    `path` marks text in which `${NAME}` and a leading `~/` are expanded; `allowed` replaces the description of its
    range in messages where the type alone cannot say it; `limits` are pydantic's ge, gt, le, lt.
    """
    extra: Any = {name: value for name, value in (("unit", unit), ("path", path), ("allowed", allowed)) if value}
    return Field(default, description=doc, json_schema_extra=extra or None, **limits)


def section(doc: str, model: type[Section] | None = None) -> Any:
    """A nested section; without a model to make it from, one that must be given."""
    return Field(default_factory=model, description=doc) if model else Field(description=doc)


def extra(info: FieldInfo, name: str) -> Any:
    """What `key` noted about a field beyond pydantic's own, or None."""
    return info.json_schema_extra.get(name) if isinstance(info.json_schema_extra, dict) else None


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _alone_or_listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("falls; write the smaller number first")
    return value


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value:
        raise ValueError("is empty")
    if len(set(value)) < len(value):
        raise ValueError("names one twice")
    return value


Share = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Interval = Annotated[tuple[Share, Share], BeforeValidator(_listed), AfterValidator(_rising)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
ALONE_OR_LISTED = BeforeValidator(_alone_or_listed)
DISTINCT = AfterValidator(_distinct)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_of(info: FieldInfo) -> type[Section]:
    """The model of a nested section."""
    assert is_section(info.annotation), f"{info.annotation} is no section"
    return cast("type[Section]", info.annotation)


def walk(model: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a model that is no section, by its dotted name."""
    for name, info in model.model_fields.items():
        if is_section(info.annotation):
            yield from walk(section_of(info), f"{prefix}{name}.")
        else:
            yield prefix + name, info


def options(annotation: Any) -> Sequence[Any]:
    """The alternatives of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def choices(annotation: Any) -> list[str]:
    """The words a key accepts literally."""
    return [word for option in options(annotation) if get_origin(option) is Literal for word in get_args(option)]


def takes_text(info: FieldInfo) -> bool:
    """Whether a key is free text, or a list of it, so that `name: 0777` is those four characters."""
    return any(option is str or option == Names for option in options(info.annotation))


def describe(info: FieldInfo) -> str:
    """What a key accepts, for messages."""
    text = extra(info, "allowed") or _describe(info.annotation, info.metadata)
    unit = extra(info, "unit")
    return f"{text} ({unit})" if unit else text


def _describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    alternatives = options(annotation)
    if len(alternatives) > 1:
        return _either([_describe(option, metadata) for option in alternatives])
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        return _describe(inner, [*notes, *metadata])
    if get_origin(annotation) is Literal:
        return ", ".join(get_args(annotation))
    for note in metadata:
        if isinstance(note, DurationOf):
            return note.allowed
        if isinstance(note, FieldInfo):
            metadata = [*metadata, *note.metadata]
    simple = {bool: "true or false", str: "text", type(None): "null"}
    if annotation in simple:
        return simple[annotation]
    return ("a whole number" if annotation is int else "a number") + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    signs = ((annotated_types.Ge, ">=", "ge"), (annotated_types.Gt, ">", "gt"), (annotated_types.Le, "<=", "le"),
             (annotated_types.Lt, "<", "lt"))  # fmt: skip
    limits = [f"{sign} {getattr(note, name)}" for kind, sign, name in signs for note in metadata if type(note) is kind]
    return " " + " and ".join(limits) if limits else ""


def _either(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
