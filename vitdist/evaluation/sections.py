"""The parts of a report as plain values: what was measured, under which conditions, and how training went."""

from __future__ import annotations

import re
from typing import Any

from vitdist.evaluation.plots import Series, line_chart, smoothed
from vitdist.evaluation.run_folder import Evaluation, RunFolder

PROTOCOLS = {
    "val": "Weights were chosen on a validation split held out of train; test was not used for any choice.",
    "refit": "Trained on all of train with settings chosen before; nothing was chosen on test.",
    "paper": "This run chose its weights on the test split itself (protocol: paper), as many papers do. "
    "Its test numbers are therefore too good to be an estimate for new pictures.",
}


def readable(name: str) -> str:
    """A class name for people: without CUB's number and underscores."""
    return re.sub(r"^\d+\.", "", name).replace("_", " ")


def percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def coverage(summary: dict[str, Any]) -> tuple[str, bool]:
    """("5,794 of 5,794 evaluated", whether that is all of them)."""
    count, expected = int(summary.get("count") or 0), int(summary.get("expected") or 0)
    return f"{count:,} of {expected:,} evaluated", count == expected and count > 0


def pretraining(run: RunFolder) -> str:
    """What the model started from, in words."""
    backbone, weights = run.recipe.get("model.backbone"), run.recipe.get("model.weights")
    record = run.environment.get("weights")
    mark = f" (sha256 {str(record['sha256'])[:12]})" if isinstance(record, dict) and record.get("sha256") else ""
    if weights is None:
        return "not known: the recipe could not be read"
    if weights == "none":
        return "none, trained from scratch"
    return f"{backbone if weights == 'pretrained' else f'{backbone} from {weights}'}{mark}"


def ending(run: RunFolder) -> str:
    """How the run ended, as far as it is known: a report made by the run itself comes before its exit.json."""
    if run.end:
        return f"Ended: {run.end.get('reason', 'unknown')} at step {run.end.get('step', 'unknown')}."
    if run.evaluations:
        return f"Trained for {_length(run)}, and evaluated."
    return "No end recorded: the run is going on, or was cut off."


def facts(run: RunFolder, evaluation: Evaluation | None) -> list[tuple[str, str]]:
    """What a number needs beside it: (name, value)."""
    recipe = run.recipe
    rows = [("Pretraining", pretraining(run)), ("Seed", str(recipe.get("seed", "not known")))]
    if evaluation is not None:
        weights = {"ema": "moving average (EMA)", "raw": "as trained"}.get(str(evaluation.summary.get("weights")), "–")
        rows.append(("Weights", f"{weights}, step {evaluation.summary.get('step', '–')}"))
        rows.append(("Split", _split_words(run, evaluation.split)))
    rows.append(("Protocol", str(recipe.get("evaluation.protocol", "not known"))))
    rows.append(("Model", f"{recipe.get('model.backbone', '–')}, {recipe.get('model.head', '–')} head"))
    rows.append(("Data", str(recipe.get("data.path", "–"))))
    rows.append(("Training", _length(run)))
    return rows


def _split_words(run: RunFolder, split: str) -> str:
    about = run.splits.get(split, {})
    digest = str(about.get("sha256") or run_hash(run, split) or "")
    return f"{split}, sha256 {digest[:16]}" if digest else f"{split} (hash not recorded)"


def run_hash(run: RunFolder, split: str) -> str | None:
    """The hash of a split's rows where evaluation/<split>.json carries it."""
    found = next((e.summary for e in run.evaluations if e.split == split), {})
    value = found.get("split_hash")
    return str(value) if value else None


def _length(run: RunFolder) -> str:
    lines = run.training_lines
    if not lines:
        return "no training step recorded"
    return f"{lines[-1]['step']:,} steps, {int(lines[-1].get('epoch', 0)) + 1} epochs"


def level_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """The table of numbers, finest level first."""
    rows = []
    for name, part in reversed(list(evaluation.levels.items())):
        low, high = (f"{100 * bound:.1f}" for bound in part.get("interval") or (0.0, 1.0))
        rows.append(
            {
                "level": name,
                "accuracy": percent(part.get("accuracy")),
                "counts": f"{part.get('correct', 0):,} of {part.get('count', 0):,}",
                "interval": f"{low} – {high}\N{NO-BREAK SPACE}%",
                "precision": percent(part.get("macro_precision")),
                "recall": percent(part.get("macro_recall")),
                "f1": percent(part.get("macro_f1")),
                "classes": f"{part.get('classes_present', '–')} of {part.get('classes', '–')}",
                "unknown": f"{part.get('unknown', 0):,}",
                "loss": "–" if part.get("loss") is None else f"{part['loss']:.4f}",
            }
        )
    return rows


def remarks(evaluation: Evaluation) -> list[str]:
    """What else the predictions say, a sentence each."""
    summary, lines = evaluation.summary, []
    if (top := summary.get("top_k")) and top.get("count"):
        lines.append(f"True class among the best {top['k']}: {_share(top['correct'], top['count'])}.")
    if (part := summary.get("consistency")) and part.get("count"):
        words = _share(part["consistent"], part["count"])
        lines.append(f"All coarser answers are the ancestors of the finest answer: {words}.")
    for level, part in (summary.get("through_finest") or {}).items():
        if part.get("count"):
            lines.append(
                f"{level} read off the finest answer would be right: {_share(part['correct'], part['count'])}."
            )
    severity = summary.get("mistake_severity") or {}
    if severity.get("mean") is not None:
        lines.append(
            f"Mean height of the common ancestor of the {severity['mistakes']:,} mistakes: {severity['mean']:.2f} "
            f"(1: the next level up is shared, {len(evaluation.levels)}: no level is)."
        )
    ties = (summary.get("near_ties") or {}).get("count")
    if ties:
        lines.append(f"Near ties (best two classes within 1e-5), which other devices may answer differently: {ties:,}.")
    return lines


def _share(correct: int, count: int) -> str:
    return f"{percent(correct / count)} ({correct:,} of {count:,})"


def left_out(run: RunFolder) -> list[str]:
    """Damaged and missing samples, a sentence each."""
    lines = []
    for evaluation in run.evaluations:
        words, whole = coverage(evaluation.summary)
        if not whole:
            lines.append(f"{evaluation.split}: {words}.")
        damaged = evaluation.summary.get("damaged")
        lines += [f"{evaluation.split}: {text}" for text in damaged] if isinstance(damaged, list) else []
    bad = [line["damaged"] for line in run.metrics if isinstance(line.get("damaged"), int) and line["damaged"]]
    if bad:
        lines.append(f"train: {bad[-1]:,} damaged samples were replaced.")
    skipped = sum(1 for line in run.training_lines if line.get("nonfinite"))
    if skipped:
        lines.append(f"train: {skipped:,} steps had a loss that is no number.")
    for line in run.metrics:
        if "rolled_back_to" in line:
            first, last = line["rolled_back_to"] + 1, line["step"]
            lines.append(f"train: steps {first:,} to {last:,} were undone, their losses being no numbers in the end.")
    return lines


def curves(run: RunFolder) -> list[dict[str, str]]:
    """The charts of training: {title, svg}; those without points are left out."""
    train, val = run.training_lines, run.evaluation_lines
    steps, val_steps = [line["step"] for line in train], [line["step"] for line in val]
    losses = [line.get("train/loss") for line in train]
    # Single steps are noise next to a validation point: the strong line follows about 2 % of the run.
    calm = smoothed(losses, 1 - 1 / max(1.0, len(losses) / 50))
    chosen = "test" if run.recipe.get("evaluation.protocol") == "paper" else "validation"
    loss = [
        Series("", steps, losses, 1, faint=True),
        Series("train", steps, calm, 1),
        Series(chosen, val_steps, [line.get("val/loss") for line in val], 2, dots=True),
    ]
    names = [key for key in (val[-1] if val else {}) if key.startswith("val/accuracy/")]
    accuracy = [
        Series(name.rpartition("/")[2], val_steps, [line.get(name) for line in val], 4 - number % 4, dots=True)
        for number, name in enumerate(names)
    ]
    speed = smoothed([line.get("images_per_second") for line in train], 1 - 1 / max(1.0, len(train) / 50))
    charts = [
        ("Loss", line_chart(loss, label="loss over steps")),
        (
            f"Accuracy ({chosen})",
            line_chart(accuracy, label="accuracy over steps", y_format=lambda v: f"{100 * v:.0f} %"),
        ),
        (
            "Learning rate",
            line_chart([Series("", steps, [x.get("lr") for x in train], 3)], label="rate", from_zero=True),
        ),
        ("Images per second", line_chart([Series("", steps, speed, 4)], label="images per second", from_zero=True)),
    ]
    return [{"title": title, "svg": svg} for title, svg in charts if svg]


def headline(evaluation: Evaluation) -> dict[str, Any]:
    """The big numbers: {split, coverage, complete, levels: finest first}."""
    words, whole = coverage(evaluation.summary)
    return {
        "split": evaluation.split,
        "coverage": words,
        "complete": whole,
        "levels": level_rows(evaluation),
    }
