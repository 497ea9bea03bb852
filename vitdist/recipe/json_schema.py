"""The recipe's JSON Schema, by which editors complete and check keys.

The committed `recipe.schema.json` is this module's output: `vitdist recipe schema > vitdist/recipe/recipe.schema.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitdist.recipe.schema import Recipe

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")


def recipe_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a recipe file, `base` included; with a base a recipe may leave everything else to it."""
    schema = Recipe.model_json_schema()
    base = {"type": "string", "description": "recipe to inherit from, relative to this file's folder; one level"}
    schema["properties"] = {"base": base, **schema["properties"]}
    schema.pop("required", None)
    schema["$defs"]["Data"].pop("required", None)
    every = schema["$defs"]["Checkpoint"]["properties"]["every"]
    every["anyOf"] = [every["items"], {"type": every.pop("type"), "items": every.pop("items"), "minItems": 1}]
    schema["anyOf"] = [{"required": ["base"]}, {"required": ["data"], "properties": {"data": {"required": ["path"]}}}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "vitdist recipe", **_tidy(schema)}


def schema_text() -> str:
    """The schema as the committed file holds it."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _tidy(node: Any) -> Any:
    """Without pydantic's titles, which repeat the key, and our notes other than the unit; empty sections pass."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"value", "unit"}:  # a duration inside a list of defaults
        return f"{node['value']}{node['unit']}"
    noise = ("title", "path", "allowed")
    tidy = {name: _tidy(value) for name, value in node.items() if name not in noise or isinstance(value, dict)}
    if "properties" in tidy and "type" in tidy and "data" not in tidy["properties"]:
        tidy["type"] = [tidy["type"], "null"]
    return tidy
