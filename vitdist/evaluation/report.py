"""The report of a run: one self-contained page for people, and the same numbers as JSON and CSV for programs."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from vitdist.durable import write_whole
from vitdist.errors import ResourceError
from vitdist.evaluation import confusions, sections
from vitdist.evaluation.pictures import Pictures
from vitdist.evaluation.predictions import UNKNOWN, PredictionTable
from vitdist.evaluation.run_folder import Evaluation, RunFolder, read_run
from vitdist.taxonomy import Taxonomy

FOLDER = "report"
_SORT = "sort_script.j2"  # plain JavaScript; the suffix is that of the package data


def build_report(run_dir: Path) -> Path:
    """Write report/ of a run folder and return the page; parts of the run that are not there are told, not missed."""
    run = read_run(Path(run_dir))
    folder = run.path / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = _page(run, folder)
        _write(folder / "report.json", json.dumps(report_json(run), indent=1, allow_nan=False) + "\n")
        _write(folder / "index.html", page)
    except OSError as error:
        raise ResourceError(
            f"cannot write {folder}: {error.strerror or error}; make room or change its owner"
        ) from None
    return folder / "index.html"


def report_json(run: RunFolder) -> dict[str, Any]:
    """The report's numbers, each with its counts and conditions."""
    protocol = run.recipe.get("evaluation.protocol")
    best = [line for line in run.evaluation_lines if line.get("val/loss") is not None]
    return {
        "name": run.name,
        "seed": run.recipe.get("seed"),
        "protocol": protocol,
        "selected_on_test": protocol == "paper",
        "pretraining": sections.pretraining(run),
        "splits": run.splits,
        "evaluations": {evaluation.split: evaluation.summary for evaluation in run.evaluations},
        "training": {
            "steps": run.training_lines[-1]["step"] if run.training_lines else 0,
            "last": run.training_lines[-1] if run.training_lines else None,
            "last_evaluation": best[-1] if best else None,
        },
        "left_out": sections.left_out(run),
        "environment": run.environment,
        "end": run.end,
        "notes": run.notes,
    }


def _page(run: RunFolder, folder: Path) -> str:
    main = run.evaluations[0] if run.evaluations else None
    parts: dict[str, Any] = {"maps": [], "pairs": [], "mistakes": [], "classes": [], "pictures_note": ""}
    if main is not None and main.table is not None and run.tree is not None:
        parts = _by_class(run, main, main.table, run.tree, folder)
    script = _resource(_SORT)
    return _template().render(
        run=run,
        main=main,
        heads=[sections.headline(evaluation) for evaluation in run.evaluations],
        remarks=sections.remarks(main) if main else [],
        ending=sections.ending(run),
        facts=sections.facts(run, main),
        protocol=run.recipe.get("evaluation.protocol"),
        protocol_words=sections.PROTOCOLS.get(str(run.recipe.get("evaluation.protocol")), ""),
        curves=sections.curves(run),
        left_out=sections.left_out(run),
        environment=_flat(run.environment),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **parts,
    )


def _by_class(run: RunFolder, main: Evaluation, table: PredictionTable, tree: Taxonomy, folder: Path) -> dict[str, Any]:
    """The parts of the page that need predictions; writes both CSV files on the way."""
    pictures, why = confusions.pictures_of(run, main, table)
    finest = confusions.class_rows(table, tree, tree.num_levels - 1)
    _write_csv(folder / "per_class.csv", *_class_csv(finest, tree))
    _write_csv(folder / "predictions.csv", *_prediction_csv(table, tree, pictures))
    parts = {
        "maps": confusions.heat_maps(table, tree),
        "pairs": confusions.confusions(table, tree, pictures),
        "mistakes": confusions.surest_mistakes(table, tree, pictures),
        "classes": finest,
        "finest": tree.levels[-1],
        "above": tree.levels[:-1],
    }
    if pictures is not None and pictures.num_unreadable:
        why = f"{pictures.num_unreadable} pictures could not be read."
    return {**parts, "pictures_note": why}


def _class_csv(rows: Sequence[dict[str, Any]], tree: Taxonomy) -> tuple[list[str], list[list[Any]]]:
    plain = ["count", "predicted", "correct", "recall", "precision", "f1", "confused_with", "confused"]
    above = list(tree.levels[:-1])
    body = [[row["class"], *(row["path"][name] for name in above), *(row[key] for key in plain)] for row in rows]
    return ["class", *above, *plain], body


def _prediction_csv(
    table: PredictionTable, tree: Taxonomy, pictures: Pictures | None
) -> tuple[list[str], Iterable[list[Any]]]:
    keys = pictures.keys(table.rows) if pictures is not None else {}
    num_top = table.topk_ids.shape[1]
    head = ["row", "key", *(f"{kind}_{level}" for level in tree.levels for kind in ("true", "predicted")), "margin"]
    head += [f"{kind}_{place + 1}" for place in range(num_top) for kind in ("top", "probability")]

    def line(index: int) -> list[Any]:
        row = int(table.rows[index])
        cells: list[Any] = [row, keys.get(row, "")]
        for level, names in enumerate(tree.names):
            true = table.targets[index, level]
            cells += ["" if true == UNKNOWN else names[true], names[table.predictions[index, level]]]
        cells.append(repr(float(table.margin[index, -1])))
        for place in range(num_top):
            cells += [tree.names[-1][table.topk_ids[index, place]], f"{table.topk_probs[index, place]:.6f}"]
        return cells

    return head, (line(index) for index in range(len(table)))


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode(errors="surrogateescape"))  # a file name may hold bytes that are no text


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((prefix + str(key), text[:400]))
    return rows


def _resource(name: str) -> str:
    return resources.files("vitdist.evaluation").joinpath(name).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"readable": sections.readable, "percent": sections.percent}
    return environment.from_string(_resource("report.html.j2"))
