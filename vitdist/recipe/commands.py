"""`vitdist recipe validate|show|list|copy|schema`: what needs no torch and answers at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vitdist.errors import RecipeError, lines
from vitdist.recipe.json_schema import schema_text
from vitdist.recipe.learning_rate import explained
from vitdist.recipe.load import load_recipe
from vitdist.recipe.shipped import copy_recipe, find_recipe, shipped_recipes, summary

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["register", "shipped_recipes"]


def register(subparsers: Subparsers) -> None:
    """Add `recipe` and its commands to a command line; each sets `run`, a function of the parsed arguments."""
    parser = subparsers.add_parser("recipe", help="check, show, list and copy recipes")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_validate(commands)
    _add_show(commands)
    _add_copy(commands)
    listing = commands.add_parser("list", help="the shipped recipes")
    listing.set_defaults(function=list_recipes)
    schema = commands.add_parser("schema", help="the JSON Schema of recipes, for editors")
    schema.set_defaults(function=print_schema)


def _add_validate(commands: Subparsers) -> None:
    parser = commands.add_parser("validate", help="all mistakes of recipes, one a line")
    parser.add_argument("files", nargs="+", metavar="FILE", help="recipes, and key=value for all of them")
    parser.set_defaults(function=validate)


def _add_show(commands: Subparsers) -> None:
    parser = commands.add_parser("show", help="every value of a recipe and where it comes from")
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(function=show)


def _add_copy(commands: Subparsers) -> None:
    parser = commands.add_parser("copy", help="copy a shipped recipe")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("target", nargs="?", default=".", type=Path, help="a file or folder; here when left out")
    parser.set_defaults(function=copy)


def validate(args: argparse.Namespace) -> int:
    """Check recipes; the mistakes of all of them go to stderr, exit code 2 when there are any."""
    overrides = [text for text in args.files if "=" in text and not Path(text).exists()]
    files = [text for text in args.files if text not in overrides]
    if not files:
        raise RecipeError("validate: no recipe given; write vitdist recipe validate FILE...")
    code = 0
    for file in files:
        try:
            load_recipe(find_recipe(file), overrides)
        except RecipeError as error:
            code = error.exit_code
            print("\n".join(lines(error)), file=sys.stderr)
        else:
            print(f"{file}: fine")
    return code


def show(args: argparse.Namespace) -> int:
    """Print the resolved recipe, each line with the place its value comes from."""
    recipe = load_recipe(find_recipe(args.recipe), args.overrides)
    print(recipe.to_yaml(sources=True), end="")
    if recipe.optimizer.lr_scaling != "none":
        print(f"# the learning rate's {explained(recipe)}")
    return 0


def list_recipes(args: argparse.Namespace) -> int:
    """Print the shipped recipes and what each is for."""
    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, file in shipped.items():
        print(f"{name:<{width}}  {summary(file)}")
    return 0


def copy(args: argparse.Namespace) -> int:
    """Copy a shipped recipe and say where to."""
    for path in copy_recipe(args.name, args.target):
        print(path)
    return 0


def print_schema(args: argparse.Namespace) -> int:
    """Print the JSON Schema."""
    print(schema_text(), end="")
    return 0
