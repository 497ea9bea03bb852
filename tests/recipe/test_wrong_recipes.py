"""M1, M2 and X3: every mistake is one line with its place, what was given, what is allowed and what was meant."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from vitdist.errors import RecipeError
from vitdist.recipe import load_recipe, parse_recipe

FIRST = "data: {path: data/x}\n"
BLOCKS = Path(__file__).with_name("wrong_recipes.txt").read_text(encoding="utf-8").split("\n\n")[1:]


def _problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipes/x.yaml", overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def _split(block: str) -> tuple[str, list[str], list[str]]:
    lines = block.strip("\n").split("\n")
    recipe = [line for line in lines if line[:2] not in ("$ ", "> ")]
    overrides = [line[2:] for line in lines if line.startswith("$ ")]
    return FIRST + "\n".join(recipe) + "\n", overrides, [line[2:] for line in lines if line.startswith("> ")]


def test_there_are_sixty() -> None:
    assert len(BLOCKS) >= 60 and all("\n> " in block or block.startswith("> ") for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n> ")[0].replace("\n", " ") for block in BLOCKS])
def test_exact_lines(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITDIST_TEST_UNSET", raising=False)
    text, overrides, expected = _split(block)
    assert _problems(text, *overrides) == expected


def test_all_mistakes_of_a_file_at_once_in_order() -> None:
    text = (
        "optimizer: {lerning_rate: 1, lr: x}\naugment:\n- flip\nseed: 1\nseed: 2\ntrain:\n  precision: bf17\n"
        "  global_batch_size: 50\n  micro_batch_size: 8\nout: ${oops\nparallel: {offload: cpu}\n"
    )
    problems = _problems(FIRST + text, "optimizer.betas=1", "nonsense")
    assert [problem.rpartition(":")[0].split(": ")[0].rpartition(":")[2] for problem in problems[:-2]] == [
        "2", "2", "3", "6", "8", "10", "11", "12"
    ]  # fmt: skip
    assert all(problem.startswith("command line: ") for problem in problems[-2:])


def test_contradictions_show_beside_mistakes_they_do_not_depend_on() -> None:
    text = FIRST + "optimizer: {lr: x}\nlr_scheduler: {min_lr: 1}\nmodel: {backbone: vit}\n"
    assert [problem.split(": ")[1] for problem in _problems(text)] == ["optimizer.lr", "model.weights"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipes/x.yaml:1: is empty; a recipe needs at least data.path"),
        ("# nothing\n", "recipes/x.yaml:1: is empty; a recipe needs at least data.path"),
        ("- a\n", "recipes/x.yaml:1: holds no keys; a recipe is lines of `key: value`"),
        ("name: x\n", "recipes/x.yaml:1: data.path: missing; allowed: a path"),
        ("name: x\ndata:\n", "recipes/x.yaml:2: data.path: missing; allowed: a path"),
        ("a: 1\0\n", r"recipes/x.yaml:1: holds the control character '\x00'; recipes are plain text"),
        ("name: x\nb: \x1b[31m\n", r"recipes/x.yaml:2: holds the control character '\x1b'; recipes are plain text"),
        ("data:\n\tpath: x\n", "recipes/x.yaml:2: a tab stands where YAML wants spaces; indent with spaces"),
        ("a: 1\n---\nb: 1\n", "recipes/x.yaml:2: a second document starts here; a recipe is one document"),
        ("? [a]\n: 1\n", "recipes/x.yaml:1: a list or section stands where a key should; write key: value"),
        ("<<: {a: 1}\n", "recipes/x.yaml:1: merge key <<; recipes have none: inherit with base: other.yaml"),
        ("a: &x 1\n", "recipes/x.yaml:1: anchor &x; recipes have no anchors: write it out"),
        ("a: *x\n", "recipes/x.yaml:1: alias *x; recipes have no aliases: write it out"),
        ("a: !x 1\n", "recipes/x.yaml:1: tag !x; recipes are data and have no tags: remove it"),
        ("[" * 100_000, "recipes/x.yaml:1: is nested more than 16 levels deep; recipes need 3"),
        ("{a: " * 1000, "recipes/x.yaml:1: is nested more than 16 levels deep; recipes need 3"),
    ],
)
def test_what_is_no_recipe_is_one_line(text: str, expected: str) -> None:
    assert _problems(text) == [expected]


@pytest.mark.parametrize("kind", ["python/object/apply:os.system [touch {0}]", "python/name:os.system", "binary aGk="])
def test_tags_run_nothing(kind: str, tmp_path: Path) -> None:
    problems = _problems(f"data: {{path: x}}\nname: !!{kind.format(tmp_path / 'ran')}\n")
    assert len(problems) == 1 and problems[0].startswith("recipes/x.yaml:2: tag tag:yaml.org,2002:")
    assert not any(tmp_path.iterdir())


def test_a_billion_anchors_cost_nothing() -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)]
    start = time.perf_counter()
    problems = _problems("a0: &a0 [x]\n" + "".join(levels))
    assert problems == ["recipes/x.yaml:1: anchor &a0; recipes have no anchors: write it out"]
    assert time.perf_counter() - start < 1


def _file_problem(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0].removeprefix(str(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    assert _file_problem(file) == ": no such file; `vitdist recipe list` shows what is shipped"
    assert _file_problem(tmp_path) == ": is no file; `vitdist recipe list` shows what is shipped"
    file.write_bytes(b"#" * 10_000_000)
    assert _file_problem(file) == ": has more than 256 KiB; that is no recipe"
    file.write_bytes(b"name: x\nout: \xff\n")
    assert _file_problem(file) == ":2: is not UTF-8; save the file as UTF-8"
    file.write_bytes("name: x\n".encode("utf-16"))
    assert _file_problem(file) == ":1: is not UTF-8; save the file as UTF-8"


def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + FIRST.encode())
    assert load_recipe(file).data.path == "data/x"


@pytest.mark.parametrize("address", ["pipe:cat /etc/passwd", "file:///etc/passwd", "ssh://host/x"])
def test_addresses_run_nothing(address: str) -> None:
    (problem,) = _problems(f"data: {{path: '{address}', cache_dir: /tmp/x}}\n")
    assert problem.startswith("recipes/x.yaml:1: data.path: n")


def test_foreign_text_stays_on_its_line() -> None:
    problems = _problems('data: {path: x}\n"a\\nb\\e[31m": 1\nseed: "x\\ny"\n', "tracking.wandb=a\nb")
    assert len(problems) == 3 and all(problem.isprintable() for problem in problems)


SCRAPS = [
    "null",
    "[1, 2]",
    "{a: 1}",
    "-1",
    "1e309",
    "true",
    "''",
    "[]",
    "{}",
    "5ep",
    "0",
    "!!int 3",
    "&a",
    "*a",
    "\t",
    "\n",
]
SCRAPS += ["- ", ": ", "# ", "? ", "| ", "> ", "\\", '"', "'", "\u2028", "\x85", "[[1]]", "{null: 1}", "vit", "refit"]


@pytest.mark.parametrize("seed", range(4))
def test_scrambled_recipes_are_refused_or_load_and_never_crash(seed: int) -> None:
    dice = random.Random(seed)
    whole = (Path(__file__).parents[2] / "recipes/demo.yaml").read_text(encoding="utf-8")
    for _ in range(50):
        text = whole
        for _ in range(dice.randint(1, 3)):
            lines = text.split("\n")
            where, scrap = dice.randrange(len(lines)), dice.choice(SCRAPS)
            lines[where] = lines[where].split(":")[0] + ": " + scrap if dice.random() < 0.6 else scrap + lines[where]
            text = "\n".join(lines)
        try:
            recipe = parse_recipe(text, "x.yaml")
        except RecipeError as error:
            assert all(problem.isprintable() and len(problem) < 500 for problem in error.problems)
        else:
            assert parse_recipe(recipe.to_yaml(), "y.yaml") == recipe
