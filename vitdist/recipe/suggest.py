"""Which key or word somebody meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "base_lr": "optimizer.lr",
    "head_lr": "optimizer.head_lr_scale",
    "wd": "optimizer.weight_decay",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "clip_grad": "optimizer.clip_grad_norm",
    "grad_clip": "optimizer.clip_grad_norm",
    "gradient_clip_val": "optimizer.clip_grad_norm",
    "epochs": "train.max_duration",
    "num_epochs": "train.max_duration",
    "max_epochs": "train.max_duration",
    "steps": "train.max_duration",
    "max_steps": "train.max_duration",
    "duration": "train.max_duration",
    "time_limit": "train.max_time",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "accumulation": "train.micro_batch_size",
    "mixed_precision": "train.precision",
    "dtype": "train.precision",
    "amp": "train.precision",
    "gradient_checkpointing": "train.grad_checkpointing",
    "workers": "data.num_workers",
    "img_size": "data.image_size",
    "resolution": "data.image_size",
    "root": "data.path",
    "dataset": "data.path",
    "tree": "data.taxonomy",
    "hierarchy": "data.taxonomy",
    "val_fraction": "data.val.fraction",
    "jitter": "augment.color_jitter",
    "autoaugment": "augment.auto",
    "random_erasing": "augment.erasing",
    "hflip": "augment.flip",
    "horizontal_flip": "augment.flip",
    "architecture": "model.backbone",
    "arch": "model.backbone",
    "pretrained": "model.weights",
    "checkpoint_path": "model.weights",
    "dropout": "model.head_dropout",
    "drop_path_rate": "model.drop_path",
    "stochastic_depth": "model.drop_path",
    "frozen": "model.freeze",
    "width": "model.embed_dim",
    "num_layers": "model.depth",
    "direction": "model.head_direction",
    "smoothing": "loss.label_smoothing",
    "scheduler": "lr_scheduler.name",
    "schedule": "lr_scheduler.name",
    "warmup_epochs": "lr_scheduler.warmup",
    "ema_decay": "ema.decay",
    "output": "out",
    "output_dir": "out",
    "run_dir": "out",
    "zero": "parallel.strategy",
    "wandb_project": "tracking.project",
    "save_every": "checkpoint.every",
    "eval_every": "evaluation.every",
}


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of some words, however the given one is capitalised and hyphenated."""
    table = {candidate.lower(): candidate for candidate in words}
    found = difflib.get_close_matches(word.lower().replace("-", "_")[:80], list(table), 1, cutoff)
    return table[found[0]] if found else None


def meant_key(section: str, name: str, siblings: Iterable[str], known: Iterable[str]) -> str | None:
    """The key meant by an unknown one: a sibling by its bare name, one of another section by its dotted name."""
    siblings, known = list(siblings), list(known)
    if name in known:  # a dotted key written as one word
        above, _, last = name.rpartition(".")
        return f"{above}: {{{last}: ...}}"
    target = SYNONYMS.get(name.lower().replace("-", "_"), "")
    if target and target.rpartition(".")[0] == section:
        return target.rpartition(".")[2]
    close = nearest(name, siblings, 0.75)
    return close or target or _elsewhere(section, name, known) or nearest(name, siblings)


def _elsewhere(section: str, name: str, known: list[str]) -> str | None:
    """A key of any section with this name or a similar one."""
    namesakes = [dotted for dotted in known if dotted.rpartition(".")[2] == name]
    if namesakes:
        return namesakes[0]
    synonym = nearest(name, SYNONYMS, 0.85)
    if synonym:
        return SYNONYMS[synonym].removeprefix(section + ".") if section else SYNONYMS[synonym]
    similar = nearest(name, {dotted.rpartition(".")[2] for dotted in known}, 0.85)
    return next((dotted for dotted in known if similar and dotted.endswith(f".{similar}")), None)
