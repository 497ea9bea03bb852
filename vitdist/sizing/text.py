"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Sequence

from vitdist.recipe.batch import BatchSplit
from vitdist.recipe.learning_rate import explained
from vitdist.recipe.schema import Recipe
from vitdist.sizing.memory import Parts, States, checkpoint_bytes, usable
from vitdist.sizing.simulate import Finding
from vitdist.sizing.steps import Reading, Steps, rates

TO_HOST, TO_DISK = 5e9, 5e8  # bytes a second that are assumed where nothing is measured
_COLUMNS = ["weights", "gradients", "optimizer", "average", "activations", "working", "inputs", "all", "host"]
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def amount(num_bytes: float) -> str:
    """Bytes with three figures."""
    for unit, name in _UNITS:
        if abs(num_bytes) >= unit:
            return (
                f"{num_bytes / unit:.3g} {name}" if abs(num_bytes) < 1000 * unit else f"{num_bytes / unit:.0f} {name}"
            )
    return f"{num_bytes:.0f} B"


def several(count: int, word: str) -> str:
    return f"{count:,} {word}" + "s" * (count != 1)


def batch_lines(recipe: Recipe, world: int, batch: BatchSplit, *, chosen: str) -> list[str]:
    size = recipe.train.global_batch_size
    text = (
        f"{size} = {several(world, 'rank')} x micro-batch {batch.micro_batch_size} x accumulation {batch.accumulation}"
    )
    return [_line("batch", f"{text}{chosen}")]


def step_lines(recipe: Recipe, steps: Steps) -> list[str]:
    left = f", {several(steps.left_out, 'sample')} left out of each" if steps.left_out else ""
    saves = [f"every {every:,}" for every in steps.save_every]
    saves += [f"every {wish}" for wish in recipe.checkpoint.every if wish.is_time]
    evaluated = f"evaluation every {steps.evaluate_every:,} on {several(steps.num_val, 'sample')}"
    return [
        _line("epoch", f"{several(steps.per_epoch, 'step')} from {several(steps.num_train, 'training sample')}{left}"),
        _line("run", f"{recipe.train.max_duration} = {several(steps.total, 'step')}; "
              f"{evaluated if steps.num_val else 'nothing held back to evaluate on'}; checkpoint {', '.join(saves)}"),
        _line("lr", f"{recipe.lr_scheduler.name}, {explained(recipe)}: "
              + " · ".join(f"step {step:,} {rate:.3g}" for step, rate in rates(recipe, steps))),
    ]  # fmt: skip


def reading_line(found: Reading | None, num_nodes: int) -> list[str]:
    if found is None:
        return []
    of = f"{found.num_shards:,} of {found.all_shards:,} shards ({amount(found.shard_bytes)})"
    node = "the node" if num_nodes == 1 else "the node with most"
    return [
        _line("reading", f"{node} touches {of} an epoch and uses {amount(found.sample_bytes)} of photographs in them")
    ]


def checkpoint_lines(recipe: Recipe, states: States, rate: float | None) -> list[str]:
    each = checkpoint_bytes(states)
    kept = recipe.checkpoint.keep_last + int(recipe.checkpoint.keep_best) + 1
    disk = f"{amount(rate)}/s, as given" if rate else f"{amount(TO_DISK)}/s assumed; --disk-rate gives yours"
    return [
        _line("checkpoint", f"{amount(each)} each, up to {kept} at once on disk: {amount(kept * each)}"),
        _line(
            "",
            f"training stands still {each / TO_HOST:.2g} s for the copy to the host ({amount(TO_HOST)}/s assumed); "
            f"a thread writes it in {each / (rate or TO_DISK):.2g} s ({disk})",
        ),
    ]


def memory_table(found: Sequence[Parts], memory: int | None, largest: dict[str, int]) -> list[str]:
    """A row a strategy; `largest` is the largest micro-batch that fits, by the row's name."""
    rows = [["", *_COLUMNS, *([f"fits {amount(memory)}"] if memory else [])]]
    for one in found:
        working = one.total - one.states - one.working.activations - one.working.inputs
        numbers = (one.weights, one.gradients, one.optimizer, one.ema, one.working.activations, working)
        cells = [amount(number) if number else "–" for number in (*numbers, one.working.inputs, one.total, one.host)]
        rows.append([one.name, *cells, *([_verdict(one, memory, largest.get(one.name))] if memory else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(_aligned, range(len(row)), row, widths)).rstrip() for row in rows]


def _aligned(column: int, cell: str, width: int) -> str:
    return cell.rjust(width) if 0 < column <= len(_COLUMNS) else cell.ljust(width)


def _verdict(one: Parts, memory: int, largest: int | None) -> str:
    if one.fits(memory):
        return "yes"
    return f"no; micro-batch {largest} would" if largest else "no"


def too_small(ddp: Parts, memory: int | None) -> str | None:
    """Plain words where sharing a model's states among ranks is not worth its messages."""
    if memory is not None and (not ddp.fits(memory) or ddp.states > 0.15 * usable(memory)):
        return None
    if memory is None and ddp.states > 4e9:
        return None
    part = f" ({100 * ddp.states / memory:.1f} % of {amount(memory)})" if memory else ""
    return (
        f"this model is too small for ZeRO to pay: all its states take {amount(ddp.states)} a rank{part}, "
        "the most that sharing could free, at the price of more messages each step; use ddp"
    )


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    width = max(len(found.promise) for found in findings)
    return [
        f"  {found.promise:<{width}}  {'BROKEN: ' + found.fault if found.fault else 'holds'}  ({found.scope})"
        for found in findings
    ]


def _line(name: str, text: str) -> str:
    return f"{name:<11}{text}"
