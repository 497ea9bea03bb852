"""Values, bases, overrides, variables and sources of recipes that are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vitdist.errors import RecipeError
from vitdist.recipe import Duration, Recipe, load_recipe, parse_recipe
from vitdist.recipe.fields import describe, takes_text, walk
from vitdist.recipe.sizes import num_bytes

FIRST = "data: {path: data/x}\n"


def _parse(text: str = "", *overrides: str) -> Recipe:
    return parse_recipe(FIRST + text, "recipes/x.yaml", overrides)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_scalars_follow_yaml_1_2() -> None:
    recipe = _parse("optimizer: {lr: 1e-4, weight_decay: .05}\nseed: 0777\nname: no\nout: 0777\n")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.seed) == (1e-4, 0.05, 777)
    assert (recipe.name, recipe.out) == ("no", "0777")
    assert _parse("model: {levels: [1e4, no]}\n").model.levels == ("1e4", "no")
    assert _parse("loss: {level_weights: {on: 2}}\n").loss.level_weights == {"on": 2.0}


def test_a_recipe_of_one_line_is_whole() -> None:
    recipe = _parse()
    assert (recipe.name, recipe.out) == ("x", "runs/x")
    assert recipe.train.max_duration == Duration(30, "ep")
    assert _parse("train:\nmodel:\n") == recipe  # empty sections


def test_defaults_that_follow_from_other_keys() -> None:
    assert _parse("model: {head: attention}\n").model.self_attention_blocks == 1
    assert _parse("model: {head: hierarchical}\n").model.self_attention_blocks == 0
    scratch = _parse("model: {backbone: vit, weights: none, depth: 3}\n")
    assert (scratch.model.patch_size, scratch.model.embed_dim, scratch.model.depth) == (16, 384, 3)
    assert (scratch.data.image_size, scratch.optimizer.layer_decay, scratch.optimizer.head_lr_scale) == (224, 1, 1)
    assert _parse("model: {freeze: backbone}\n").optimizer.layer_decay == 1
    assert _parse("evaluation: {protocol: refit}\n").checkpoint.monitor is None
    assert _parse("", "evaluation.protocol=refit").checkpoint.monitor is None


def test_remote_data_and_its_cache() -> None:
    words = ("data.path=https://host/a b/set", "data.cache_dir=/scratch", "data.cache_size=1.5GiB")
    recipe = _parse("", *words)
    assert recipe.data.path == "https://host/a b/set" and num_bytes(recipe.data.cache_size or "") == 3 << 29
    assert parse_recipe(recipe.to_yaml(), "y.yaml") == recipe


def test_one_duration_or_several() -> None:
    assert _parse("checkpoint: {every: 5steps}\n").checkpoint.every == (Duration(5, "steps"),)
    assert _parse("checkpoint: {every: [1ep, 1.5h]}\n").checkpoint.every == (Duration(1, "ep"), Duration(1.5, "h"))


def test_overrides_win_and_reach_into_null() -> None:
    recipe = _parse("seed: 1\nloss: {level_weights: null}\n", "seed=2", "seed=3", "loss.level_weights.species=2",
                    "loss.level_weights.genus=1", "augment.crop_scale=[0.5, 1]", "train.max_time=null")  # fmt: skip
    assert (recipe.seed, recipe.loss.level_weights) == (3, {"species": 2.0, "genus": 1.0})
    assert (recipe.augment.crop_scale, recipe.train.max_time) == ((0.5, 1.0), None)
    assert _parse("", "optimizer={lr: 1e-3, name: sgd}", "optimizer.momentum=0.5").optimizer.momentum == 0.5
    weights = _parse("loss: {level_weights: {species: 2}}\n", "loss.level_weights={genus: 1}").loss.level_weights
    assert weights == {"genus": 1.0}
    assert _parse("", "out=a = b #c").out == "a = b #c"
    assert _parse("", 'name="1"').name == "1"


def test_base_inherits_all_but_name_and_out(tmp_path: Path) -> None:
    _write(tmp_path / "sub/below.yaml", FIRST + "name: below\nout: below\nseed: 5\noptimizer: {lr: 1e-3, name: sgd}\n"
           "loss: {level_weights: {species: 2}}\n")  # fmt: skip
    above = _write(
        tmp_path / "above.yaml", "base: sub/below.yaml\noptimizer: {lr: 1}\nloss: {level_weights: {genus: 1}}\n"
    )
    recipe = load_recipe(above, ["optimizer.momentum=0"])
    assert (recipe.name, recipe.out, recipe.seed) == ("above", "runs/above", 5)
    assert (recipe.optimizer.lr, recipe.optimizer.name, recipe.optimizer.momentum) == (1.0, "sgd", 0.0)
    assert recipe.loss.level_weights == {"genus": 1.0}
    sources = recipe.sources
    assert sources["optimizer.lr"] == f"{above}:2"
    assert sources["optimizer.name"] == f"{tmp_path / 'sub/below.yaml'}:5"
    assert (sources["optimizer.momentum"], sources["train.precision"]) == ("command line", "default")


@pytest.mark.parametrize(
    ("base", "line"),
    [
        (None, "{above}:1: base: {below}: no such file; `vitdist recipe list` shows what is shipped"),
        ("base: other.yaml\n" + FIRST, "{below}:1: base: a base has no base of its own; name that recipe directly"),
        (FIRST + "optimizer: {lrr: 1}\n", "{below}:2: optimizer.lrr: unknown key; did you mean lr?"),
        (FIRST + "seed: 1\nseed: 2\n", "{below}:3: seed: given twice, first on line 2"),
        ("a: *x\n", "{below}:1: alias *x; recipes have no aliases: write it out"),
    ],
)
def test_mistakes_of_a_base(base: str | None, line: str, tmp_path: Path) -> None:
    below = tmp_path / "below.yaml"
    if base is not None:
        _write(below, base)
    above = _write(tmp_path / "above.yaml", "base: below.yaml\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(above)
    assert caught.value.problems == [line.format(above=above, below=below)]


def test_a_recipe_may_not_be_its_own_base(tmp_path: Path) -> None:
    file = _write(tmp_path / "x.yaml", "base: x.yaml\n" + FIRST)
    with pytest.raises(RecipeError, match="x.yaml:1: base: a base has no base of its own"):
        load_recipe(file)


def test_variables_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITDIST_TEST_DIR", "/fast/a b")
    monkeypatch.setenv("HOME", "/home/me")
    recipe = _parse("out: ${VITDIST_TEST_DIR}/runs\n", "data.path=~/cub",
                    "model.weights=${VITDIST_TEST_DIR}/w.safetensors")  # fmt: skip
    assert (recipe.out, recipe.data.path) == ("/fast/a b/runs", "/home/me/cub")
    assert recipe.model.weights == "/fast/a b/w.safetensors"
    assert parse_recipe(recipe.to_yaml(), "y.yaml") == recipe
    monkeypatch.setenv("VITDIST_TEST_DIR", "${HOME}")
    with pytest.raises(RecipeError, match="itself holds"):
        _parse("out: ${VITDIST_TEST_DIR}\n")


AWKWARD = [
    "no",
    "1e-4",
    "1:30",
    "0x1F",
    "null",
    "~x",
    "a: b",
    "- a",
    "'",
    '"',
    "a #b",
    "ü/é",
    "2024-01-01",
    "=",
    "&a",
    "1_0",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_resolved_recipes_load_back_equal(text: str) -> None:
    quoted = json.dumps(text)
    recipe = _parse(f"model: {{levels: [{quoted}, y]}}\n", f"out={quoted}", f"loss.level_weights={{{quoted}: 2}}")
    assert recipe.out == text and recipe.model.levels == (text, "y") and recipe.loss.level_weights == {text: 2}
    again = parse_recipe(recipe.to_yaml(), "other.yaml")
    assert again == recipe and again.flat() == recipe.flat()
    assert parse_recipe(recipe.to_yaml(sources=True), "other.yaml") == recipe


def test_resolved_recipes_mean_the_same_to_yaml_1_1() -> None:
    recipe = _parse("", "name=no", "out=1e-4", "optimizer.lr=0.1")
    assert '\nout: "1e-4"\n' in recipe.to_yaml()  # a number to YAML 1.2, text to YAML 1.1
    plain = yaml.safe_load(recipe.to_yaml())
    assert (plain["name"], plain["out"], plain["optimizer"]["lr"]) == ("no", "1e-4", 0.1)


def test_every_key_is_documented() -> None:
    keys = dict(walk(Recipe))
    assert len(keys) > 80
    for name, info in keys.items():
        assert info.description and "\n" not in info.description, name
        text = describe(info)
        assert text, name
        if "number" in text and not takes_text(info):
            assert any(sign in text for sign in "<>") or "two numbers" in text, f"{name} has no range: {text}"


CONTRACT = {
    "": "name seed out",
    "data": "path taxonomy image_size num_workers sampling on_bad_sample max_bad_samples cache_dir",
    "data.val": "fraction seed group fold",
    "augment": "crop_scale flip rotation color_jitter auto mixup cutmix erasing",
    "model": "backbone weights levels head head_init head_dropout drop_path freeze patch_size embed_dim depth "
    "num_heads mlp_ratio",
    "loss": "level_weights label_smoothing class_weights l1 l2",
    "optimizer": "name lr head_lr_scale weight_decay layer_decay clip_grad_norm",
    "ema": "decay warmup",
    "lr_scheduler": "name warmup monitor factor patience threshold cooldown min_lr",
    "train": "max_duration max_time global_batch_size micro_batch_size precision "
    "deterministic compile grad_checkpointing max_nonfinite_steps",
    "early_stopping": "monitor patience min_delta",
    "evaluation": "every batch_size protocol",
    "parallel": "strategy offload timeout",
    "checkpoint": "every keep_last keep_best monitor",
    "tracking": "wandb project log_samples",
}


def test_the_contract_s_keys_are_there() -> None:
    keys = {f"{section}.{name}".lstrip(".") for section, names in CONTRACT.items() for name in names.split()}
    assert len(keys) == 82 and keys - {name for name, _ in walk(Recipe)} == set()
