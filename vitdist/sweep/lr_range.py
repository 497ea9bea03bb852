"""The learning-rate range test (Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017).

One short training of the recipe's own model on its own data, in which the rate rises exponentially step by step: the
loss falls fastest at a good rate, and turns up where the rate is too high.
"""

from __future__ import annotations

import csv
import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from vitdist.durable import write_whole
from vitdist.errors import ResourceError, Stopped, UsageError
from vitdist.evaluation.plots import Series, line_chart, smoothed
from vitdist.recipe.load import load_recipe
from vitdist.recipe.schema import Recipe
from vitdist.runtime.engine import Engine, set_threads
from vitdist.runtime.faults import Faults
from vitdist.runtime.ranks import discover
from vitdist.runtime.stop import StopFlag
from vitdist.runtime.watch import Watch
from vitdist.schedules import Schedule
from vitdist.training.build import build_job
from vitdist.training.datasets import open_datasets
from vitdist.training.folder import Start
from vitdist.training.job import Job
from vitdist.training.loop import loader_of
from vitdist.training.step import Stepper

KEEP = 0.8  # of the running average over steps
TURNED = 1.05
SETTLED = 10  # steps after which it forgets how it began
HOPELESS = 2.0  # times the first loss: nothing is learned beyond
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem; }}
.axis {{ fill: GrayText; font-size: 12.5px; }} .grid {{ stroke: #8884; }}
.line {{ fill: none; stroke-width: 2; }} .faint {{ opacity: .35; }}
.c1 {{ stroke: #2563b8; }} .c2 {{ stroke: #c2571a; }}
.legend i {{ display: inline-block; width: 1em; height: .3em; margin: 0 .4em 0 1em; }}
.b1 {{ background: #2563b8; }} .b2 {{ background: #c2571a; }}
</style></head><body><h1>{title}</h1><p>{text}</p>{chart}</body></html>
"""


@dataclass(frozen=True)
class Wish:
    """From which rate to which, in how many steps."""

    num_steps: int
    low: float
    high: float


class Rising(Schedule):
    """low x (high / low)^(step / last step)."""

    def __init__(self, wish: Wish) -> None:
        super().__init__(wish.low)
        self._wish = wish

    def rule(self, step: int) -> float:
        return (self._wish.high / self._wish.low) ** (step / max(1, self._wish.num_steps - 1))


@dataclass(frozen=True)
class Found:
    """Rates and losses step by step, and what they tell; None where the test did not come to it."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    steepest: float | None
    diverging: float | None


def lr_range(file: Path, overrides: Sequence[str], folder: Path, wish: Wish) -> str:
    """Run the test, write lr_range.csv and lr_range.html into the folder, and say what was found."""
    ranks = discover()
    if ranks.world > 1:
        raise UsageError(f"--lr-range runs on one device, but {ranks.world} ranks were started; leave the launcher out")
    folder.mkdir(parents=True, exist_ok=True)  # now, not after the training, if it cannot be
    with tempfile.TemporaryDirectory(prefix="vitdist-lr-range-") as scratch:
        own = [f"out={scratch}", f"train.max_duration={wish.num_steps}steps", "lr_scheduler.name=constant",
               "lr_scheduler.warmup=0steps", "tracking.wandb=disabled", "tracking.log_samples=false"]  # fmt: skip
        recipe = load_recipe(file, [*overrides, *own])
        losses = _train(recipe, wish)
    rates = [Rising(wish).lr(step) for step in range(len(losses))]
    found = judge(rates, losses)
    text = _words(recipe, found)
    write_whole(folder / "lr_range.csv", _table(found))
    write_whole(folder / "lr_range.html", _page(recipe, found, text))
    return f"{text}\n{folder / 'lr_range.csv'}\n{folder / 'lr_range.html'}"


def _train(recipe: Recipe, wish: Wish) -> list[float]:
    """The losses of real steps; ends early where nothing is learned any more."""
    job = _job(recipe)
    job.schedule = Rising(wish)
    run_step, stream = Stepper(job), iter(loader_of(job))
    losses: list[float] = []
    try:
        for _ in range(wish.num_steps):
            pending = run_step(stream, save=False)
            job.state.step += 1
            report = pending.read()
            if pending.failure is not None:
                raise pending.failure
            if report.starved:
                raise ResourceError(f"out of memory at step {report.step}; use a smaller train.micro_batch_size")
            if report.stop:
                raise Stopped("the range test was stopped; nothing is kept of it")
            losses.append(report.loss)
            if not report.loss < HOPELESS * losses[0]:  # also where it is no number
                break
    finally:
        job.journal.close()
        job.engine.close()
    return losses


def _job(recipe: Recipe) -> Job:
    """A training as any other, in a folder that is thrown away."""
    ranks = discover()
    stop = StopFlag(Path(recipe.out), max_seconds=None, is_main=True)
    stop.install()
    set_threads(ranks)
    seconds = recipe.parallel.timeout.seconds
    engine = Engine(
        ranks,
        precision=recipe.train.precision,
        timeout_seconds=seconds,
        deterministic=recipe.train.deterministic,
    )
    return build_job(
        recipe, engine, open_datasets(recipe), Start(None, 1, []), stop=stop, faults=Faults(ranks.rank), lock=None,
        watch=Watch(ranks, timeout=seconds), debug=False, allow_inexact=False,
    )  # fmt: skip


def judge(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """steepest: where the smoothed loss falls fastest over the logarithm of the rate, before its lowest point.

    diverging: the first rate after the lowest point where half of the gain is lost again and the loss is 5 % above it,
    since a test of few steps gains little more than its noise; or where a loss is no number.
    """
    kept = [loss for loss in losses if math.isfinite(loss)]
    smooth = [value for value in smoothed(kept, KEEP) if value is not None]
    lowest = int(np.argmin(smooth)) if smooth else 0
    bound = max((smooth[0] + smooth[lowest]) / 2, TURNED * smooth[lowest]) if smooth else math.inf
    lost = [step for step in range(lowest + 1, len(smooth)) if smooth[step] > bound]
    lost += [step for step, loss in enumerate(losses) if not math.isfinite(loss)][:1]
    steepest = _steepest(rates, smooth[: lowest + 1])
    return Found(list(rates), list(losses), smooth, steepest, rates[min(lost)] if lost else None)


def _steepest(rates: Sequence[float], falling: Sequence[float]) -> float | None:
    """The middle of the stretch, a fifth of them all, whose fitted line falls most; None where nothing fell.

    The first steps are left out: there the average is no average yet.
    """
    width = max(3, len(falling) // 5)
    first = min(SETTLED, len(falling) // 4)
    if len(falling) < first + width or falling[-1] >= falling[0]:
        return None
    logs = np.log(rates[: len(falling)])
    starts = range(first, len(falling) - width + 1)
    slopes = [np.polyfit(logs[at : at + width], falling[at : at + width], 1)[0] for at in starts]
    return rates[starts[int(np.argmin(slopes))] + width // 2]


def _words(recipe: Recipe, found: Found) -> str:
    span = f"{len(found.losses)} steps of {recipe.train.global_batch_size}"
    span += f", rates {found.rates[0]:.2g} to {found.rates[-1]:.2g}"
    falls = "the loss did not fall" if found.steepest is None else f"the loss falls fastest at {found.steepest:.2g}"
    turns = "it does not diverge" if found.diverging is None else f"it diverges at {found.diverging:.2g}"
    return f"{span}: {falls}, {turns}"


def _table(found: Found) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "lr", "loss", "smoothed"])
    smooth = [*found.smooth, *[math.nan] * (len(found.losses) - len(found.smooth))]
    writer.writerows([step + 1, *row] for step, row in enumerate(zip(found.rates, found.losses, smooth, strict=True)))
    return text.getvalue()


def _page(recipe: Recipe, found: Found, text: str) -> str:
    powers = [math.log10(rate) for rate in found.rates]
    lines = [
        Series("loss", powers, found.losses, faint=True),
        Series("smoothed", powers[: len(found.smooth)], found.smooth),
    ]
    chart = line_chart(lines, label="loss over the learning rate", x_label="learning rate, power of ten")
    return PAGE.format(title=escape(f"Learning-rate range test of {recipe.name}"), text=escape(text), chart=chart)
