"""The command line: reads arguments, calls one function, and turns its failure into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vitdist.errors import RecipeError, UsageError, lines

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = "Hierarchical fine-grained image classification with Vision Transformers, from a laptop to a cluster."


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and under a launcher once, not once a rank with the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the contract."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = _parse(argv)
        code: int = args.function(args)
        return code
    except KeyboardInterrupt:
        print("vitdist: interrupted", file=sys.stderr)
        return 75
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the last resort: whatever was not foreseen still ends in one line
        return _fail(error, debug="--debug" in argv)


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; key=value may stand anywhere, also behind options, where argparse would not look for them."""
    if "" in argv:  # as a path it would be the working directory
        raise UsageError("an argument is empty; is a shell variable not set?")
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(args, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _fail(error: Exception, *, debug: bool) -> int:
    """Say it once: what is wrong before ranks meet is wrong on all of them, and only rank 0 speaks of it."""
    if debug:
        traceback.print_exception(error)
    from vitdist.runtime.failures import classify

    failure = classify(error)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if not failure.spoken_elsewhere and (rank == "0" or _ranks_have_met()):
        for line in lines(failure):
            print(line if isinstance(failure, RecipeError) else f"vitdist: {line}", file=sys.stderr)
        if failure.exit_code == 1:
            place = f"{failure.log} has its traceback" if failure.log is not None else "--debug shows where"
            print(f"vitdist: this is a bug; {place}", file=sys.stderr)
    return failure.exit_code


def _ranks_have_met() -> bool:
    """Whether this process has joined its peers, so that a failure may be its own."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with only the room of the asked command loaded: `recipe validate` must not pay for torch."""
    parser: argparse.ArgumentParser = Parser(prog="vitdist", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"vitdist {metadata.version('vitdist')}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for names, register in ROOMS:
        if asked in names:
            register(subparsers)
        else:
            for name, summary in names.items():
                subparsers.add_parser(name, help=summary)
    _add_debug(subparsers)
    return parser


def _add_debug(subparsers: Subparsers) -> None:
    """Every command, the nested ones too, takes --debug."""
    for parser in set(subparsers.choices.values()):
        if "--debug" not in parser._option_string_actions:
            parser.add_argument("--debug", action="store_true", help="show tracebacks")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                _add_debug(action)


def _work(subparsers: Subparsers) -> None:
    _add_train(subparsers)
    _add_evaluate(subparsers)
    _add_predict(subparsers)


def _add_train(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("train", help="train a recipe, or go on with its run")
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    parser.add_argument("--debug", action="store_true", help="one process, no loader workers, tracebacks")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="where to go on from (auto)")
    parser.add_argument("--allow-inexact-resume", action="store_true", help="go on if some state cannot be restored")
    parser.set_defaults(function=train)


def _add_evaluate(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("evaluate", help="evaluate a run or checkpoint, each sample exactly once")
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--split", default="test", help="test, train or val (test)")
    parser.add_argument("--out", type=Path, help="where to write (the run's evaluation/)")
    parser.set_defaults(function=evaluate)


def _add_predict(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("predict", help="name what is on photographs")
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("images", nargs="+", metavar="IMAGES_OR_FOLDER")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to name (5)")
    parser.add_argument("--out", type=Path, help="folder for predictions.json, predictions.csv and pictures/")
    parser.set_defaults(function=predict)


def train(args: argparse.Namespace) -> int:
    """Train a recipe."""
    from vitdist.recipe.load import load_recipe
    from vitdist.recipe.shipped import find_recipe

    recipe = load_recipe(find_recipe(args.recipe), args.overrides)
    from vitdist.training.run import Options, run

    return run(recipe, Options(resume=args.resume, allow_inexact=args.allow_inexact_resume, debug=args.debug))


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a checkpoint."""
    from vitdist.evaluation.run import run

    return run(Path(args.run), split=args.split, out=args.out, overrides=args.overrides)


def predict(args: argparse.Namespace) -> int:
    """Predict photographs."""
    from vitdist.predict import run_predict

    overrides = [text for text in args.images if "=" in text and not Path(text).exists()]
    images = [text for text in args.images if text not in overrides]
    return run_predict(args.run, images, args.top, args.out, overrides)


def _recipe(subparsers: Subparsers) -> None:
    from vitdist.recipe.commands import register

    register(subparsers)


def _data(subparsers: Subparsers) -> None:
    from vitdist.data.commands import register

    register(subparsers)


def _evaluation(subparsers: Subparsers) -> None:
    from vitdist.evaluation.commands import register

    register(subparsers)


def _bench(subparsers: Subparsers) -> None:
    from vitdist.bench.commands import register

    register(subparsers)


def _sizing(subparsers: Subparsers) -> None:
    from vitdist.sizing.commands import register

    register(subparsers)


def _sweep(subparsers: Subparsers) -> None:
    from vitdist.sweep.commands import register

    register(subparsers)


def _checkpoint(subparsers: Subparsers) -> None:
    from vitdist.checkpoint.commands import register

    register(subparsers)


def _doctor(subparsers: Subparsers) -> None:
    from vitdist.doctor.commands import register

    register(subparsers)


ROOMS: list[tuple[dict[str, str], Callable[[Subparsers], None]]] = [
    ({"train": "train a recipe", "evaluate": "evaluate a run", "predict": "name what is on photographs"}, _work),
    ({"data": "turn photographs into shards with an index"}, _data),
    ({"recipe": "check, show, list and copy recipes"}, _recipe),
    ({"report": "build a run's report again", "compare": "runs side by side"}, _evaluation),
    ({"checkpoint": "list, verify and export checkpoints"}, _checkpoint),
    ({"plan": "batches, steps, bytes and memory of a run; no GPU needed"}, _sizing),
    ({"sweep": "several runs of one recipe, or a learning-rate range test"}, _sweep),
    ({"bench": "measure plan, input and step on this machine"}, _bench),
    ({"doctor": "look at this machine or allocation", "fetch": "weights for nodes without internet"}, _doctor),
]
