"""Putting a plan together: from a recipe, its data and a number of ranks to the text that is printed."""

from __future__ import annotations

from vitdist.errors import RecipeError, UsageError
from vitdist.recipe.batch import BatchSplit, split_batch
from vitdist.recipe.schema import Recipe
from vitdist.sizing import simulate, text
from vitdist.sizing.memory import STRATEGIES, Parts, States, parts, states_of
from vitdist.sizing.rehearsal import Rehearsal, skeleton
from vitdist.sizing.source import Source
from vitdist.sizing.steps import candidates, reading, steps_of, with_micro_batch
from vitdist.training.assemble import build_schedule_of


class Sizer:
    """A recipe's memory at any number of ranks, strategy and micro-batch."""

    def __init__(self, recipe: Recipe, source: Source, world: int) -> None:
        self.recipe, self.source, self.world = recipe, source, world
        self.states: States = states_of(recipe, skeleton(recipe, source.tree))
        self._rehearsal = Rehearsal(recipe, source.tree)

    def parts(self, strategy: str, offload: str, batch: BatchSplit) -> Parts:
        working = self._rehearsal.step(batch.micro_batch_size)
        return parts(self.states, working, strategy, offload, world=self.world, accumulation=batch.accumulation)

    def largest(self, strategy: str, offload: str, memory: int, below: int) -> int | None:
        """The largest micro-batch of at most `below` that fits."""
        for size in candidates(self.recipe, self.world):
            if size <= below:
                batch = with_micro_batch(self.recipe, self.world, size)
                if self.parts(strategy, offload, batch).fits(memory):
                    return size
        return None


def batch_of(recipe: Recipe, world: int) -> BatchSplit:
    """A rank's micro-batches, refused in one line with the nearest numbers, of ranks too; `auto` as its whole share."""
    micro = recipe.train.micro_batch_size
    mixing = recipe.augment.mixup > 0 or recipe.augment.cutmix > 0
    try:
        return split_batch(recipe.train.global_batch_size, world, micro, mixing=mixing)
    except RecipeError as error:
        raise RecipeError(f"{error}; {_nearest_worlds(recipe, world, mixing)}") from None


def _nearest_worlds(recipe: Recipe, world: int, mixing: bool) -> str:
    micro = recipe.train.micro_batch_size
    unit = micro if isinstance(micro, int) else 2 if mixing else 1
    size = recipe.train.global_batch_size // unit
    fitting = [ranks for ranks in range(1, size + 1) if size % ranks == 0]
    below, above = [w for w in fitting if w < world][-1:], [w for w in fitting if w > world][:1]
    return f"or {' or '.join(str(w) for w in below + above)} ranks"


def planned(
    recipe: Recipe, source: Source, *, nodes: int, per_node: int, memory: int | None, rate: float | None
) -> str:
    """The plan of a run on so many nodes."""
    world = nodes * per_node
    batch = batch_of(recipe, world)
    sizer = Sizer(recipe, source, world)
    chosen = ""
    if recipe.train.micro_batch_size == "auto":
        batch, chosen = _auto(sizer, batch, memory)
    lines = [f"{recipe.name} on {text.several(nodes, 'node')} of {text.several(per_node, 'rank')}"]
    lines += [f"note: {source.note}"] if source.note else []
    lines += text.batch_lines(recipe, world, batch, chosen=chosen)
    if source.train is not None:
        lines += text.step_lines(recipe, steps_of(recipe, source))
        lines += text.reading_line(reading(source.plan(recipe), source, nodes), nodes)
    lines += text.checkpoint_lines(recipe, sizer.states, rate)
    return "\n".join([*lines, "", *_memory(sizer, batch, memory)])


def _auto(sizer: Sizer, batch: BatchSplit, memory: int | None) -> tuple[BatchSplit, str]:
    """What `auto` can choose at most; which is fastest only the device itself can say."""
    share = batch.micro_batch_size * batch.accumulation
    if memory is None:
        return batch, " (auto: at most; give --gpu-memory for what fits)"
    largest = sizer.largest("ddp", "none", memory, share)
    if largest is None:
        return batch, " (auto: none fits)"
    return with_micro_batch(sizer.recipe, sizer.world, largest), " (auto: the largest that fits; the fastest is chosen)"


def _memory(sizer: Sizer, batch: BatchSplit, memory: int | None) -> list[str]:
    recipe = sizer.recipe
    found = [sizer.parts(*strategy, batch) for strategy in STRATEGIES]
    below = batch.micro_batch_size * batch.accumulation
    largest = {
        one.name: sizer.largest(one.strategy, one.offload, memory, below) or 0
        for one in found
        if memory is not None and not one.fits(memory)
    }
    counted = sizer.states.weights // 4
    own = next(
        one for one in found if (one.strategy, one.offload) == (recipe.parallel.strategy, recipe.parallel.offload)
    )
    lines = [
        f"memory of one rank: {counted / 1e6:,.3f} million parameters, {recipe.train.precision}, "
        f"micro-batch {batch.micro_batch_size}"
        + (", gradients checkpointed" if recipe.train.grad_checkpointing else ""),
        *text.memory_table(found, memory, largest),
    ]
    small = text.too_small(found[0], memory)
    lines += [small] if small else []
    if memory is not None and not own.fits(memory):
        lines.append(_what_would(own, found, memory, largest, _checkpointed(sizer, own, memory, below)))
    return lines


def _checkpointed(sizer: Sizer, own: Parts, memory: int, below: int) -> int | None:
    """The largest micro-batch that would fit with gradient checkpointing; None where there is none, or it is on."""
    if sizer.recipe.train.grad_checkpointing:
        return None
    train = sizer.recipe.train.model_copy(update={"grad_checkpointing": True})
    recipe = sizer.recipe.model_copy(update={"train": train})
    try:
        return Sizer(recipe, sizer.source, sizer.world).largest(own.strategy, own.offload, memory, below)
    except UsageError:  # a backbone that cannot
        return None


def _what_would(own: Parts, found: list[Parts], memory: int, largest: dict[str, int], checkpointed: int | None) -> str:
    ways = [f"train.micro_batch_size={largest[own.name]}"] if largest.get(own.name) else []
    ways += [f"parallel.strategy={one.strategy}" + (" parallel.offload=cpu" if one.host else "")
             for one in found if one.fits(memory)][:1]  # fmt: skip
    ways += [f"train.grad_checkpointing=true train.micro_batch_size={checkpointed}"] if checkpointed else []
    return f"{own.name} does not fit: {text.amount(own.total)} of {text.amount(memory)}; " + (
        f"what would: {' · '.join(ways)}" if ways else "take more ranks, or a smaller model"
    )


def simulated(recipe: Recipe, source: Source, world: int) -> tuple[str, bool]:
    """(what was looked at, whether anything is broken) of so many ranks."""
    if source.train is None:
        raise UsageError(f"{source.note}")
    batch = batch_of(recipe, world)
    steps = steps_of(recipe, source)
    uniform = recipe.data.sampling == "uniform"
    findings = simulate.train_order(lambda: source.plan(recipe), world, batch, each_once=uniform)
    findings.append(simulate.loader_order(lambda: source.plan(recipe), world, batch))
    if recipe.augment.mixup or recipe.augment.cutmix:
        findings.append(simulate.mixing_pairs(recipe.train.global_batch_size, world, batch))
    if source.val is not None:
        findings.append(simulate.evaluation_order(source.val, world, recipe.evaluation.batch_size))
    findings.append(
        simulate.schedules(
            lambda rank: build_schedule_of(recipe, steps.per_epoch, steps.total),
            world,
            steps.total,
            steps.evaluate_every,
        )
    )
    head = text.batch_lines(recipe, world, batch, chosen="") + ([f"note: {source.note}"] if source.note else [])
    return "\n".join([*head, *text.finding_lines(findings)]), any(found.fault for found in findings)
