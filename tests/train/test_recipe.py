"""Recipes: numbers, words and places as people write them."""

import pytest
import yaml

from draftsmith.models.errors import UserError
from draftsmith.models.targets import locate
from draftsmith.train.recipe import DrafterRecipe, Yaml, read_recipe
from draftsmith.train.reference.pretrain import TargetRecipe, pretrain
from tests.conftest import ROOT

PLAIN = (ROOT / "recipes" / "eagle3-code.yaml").read_text()
NUMBERS = {
    "1e-4": 0.0001,
    "1E-4": 0.0001,
    "+5e-5": 0.00005,
    "2e3": 2000,
    "-1E+2": -100,
    "1_0e3": 10000,
    "2.0e3": 2000.0,
    "1e400": float("inf"),
    ".5": 0.5,
    "1.": 1.0,
    "010": 10,
    "0o17": 15,
    "0x1F": 31,
    "1_000": 1000,
    "-3": -3,
}
TEXTS = ["2026-11-27", "2026-11-27 10:00:00", "1:30", "190:20:30", "off", "yes", "no", "=", "1.2.3", "e5", "0b11", "1e"]


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers(text, value):
    found = yaml.load(f"[{text}]", Yaml)[0]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_number_stays_text(text):
    assert yaml.load(f"key: {text}", Yaml) == {"key": text}


def test_quoted_scalars_are_text_and_words_for_nothing_are_none():
    assert yaml.load("['1e-4', \"true\", null, ~, true]", Yaml) == ["1e-4", "true", None, None, True]


def write(folder, *changes: tuple[str, str]):
    text = PLAIN
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.mark.parametrize("rate", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_a_rate_in_a_file_and_as_an_override(tmp_path, rate):
    file = write(tmp_path, ("lr: 0.003 ", f"lr: {rate} "))
    assert read_recipe(file, DrafterRecipe).optimization.lr == 0.0001
    file = write(tmp_path)
    assert read_recipe(file, DrafterRecipe, [f"optimization.lr={rate}"]).optimization.lr == 0.0001


def test_a_whole_number_with_an_exponent(tmp_path):
    file = write(tmp_path, ("max_length: 384", "max_length: 1e3"))
    assert read_recipe(file, DrafterRecipe).data.max_length == 1000
    assert read_recipe(write(tmp_path), DrafterRecipe, ["data.max_length=1E+3"]).data.max_length == 1000


def test_a_key_that_stands_twice_is_named(tmp_path):
    """The first would be left out without a word."""
    for old, new in (("seed: 0", "seed: 0\nseed: 1"), ("  lr: 0.003 ", "  lr: 0.1\n  lr: 0.003 ")):
        with pytest.raises(UserError, match=r"recipe.yaml: not valid YAML \(found (seed|lr) twice .*line \d+"):
            read_recipe(write(tmp_path, (old, new)), DrafterRecipe)
    merged = yaml.load("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}", Yaml)
    assert merged["b"] == {"x": 3, "y": 2}


def test_nesting_without_end_is_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("[" * 3000)
    with pytest.raises(UserError, match="recipe.yaml: not valid YAML"):
        read_recipe(tmp_path / "recipe.yaml", DrafterRecipe)


def test_dates_and_times_name_projects_and_folders(tmp_path):
    file = write(tmp_path, ("wandb: null", "wandb: 2026-11-27"), ("output: runs/eagle3-code", "output: 1:30"))
    recipe = read_recipe(file, DrafterRecipe)
    assert (recipe.wandb, recipe.output) == ("2026-11-27", "1:30")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr: '1e-4' ", "optimization.lr: found '1e-4'; Input should be a valid number"),
        ("lr: .inf ", "optimization.lr: found inf; Input should be a finite number"),
        ("lr: .nan ", "optimization.lr: found nan; Input should be"),
    ],
)
def test_numbers_that_are_none(tmp_path, change, message):
    with pytest.raises(UserError, match=f"{tmp_path}/recipe.yaml: {message}"):
        read_recipe(write(tmp_path, ("lr: 0.003 ", change)), DrafterRecipe)


def test_the_home_is_expanded_wherever_a_place_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path, ("files: [runs/eagle3-code/answers.jsonl]", "files: [~/rows.jsonl, 'hub:a/b']"))
    places = ["target=~/target", "output=~/out", "head.start_from=~/drafter", "engine.config=~/engine.json"]
    recipe = read_recipe(file, DrafterRecipe, places)
    assert recipe.data.files == [f"{tmp_path}/rows.jsonl", "hub:a/b"]
    assert (recipe.target, recipe.output) == (f"{tmp_path}/target", f"{tmp_path}/out")
    assert (recipe.head.start_from, recipe.engine.config) == (f"{tmp_path}/drafter", f"{tmp_path}/engine.json")
    assert locate("~/target") == f"{tmp_path}/target"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.nme=eagle3", "head.nme: unknown key"),
        ("head.name=medusa", "head.name: found .medusa.; .*expected one of eagle3"),
        ("seed=abc", "seed: found 'abc'"),
        ("optimization.lr=-1", "optimization.lr: found -1"),
        ("engine.zero_stage=7", "engine.zero_stage: found 7"),
        ("nonsense", "expected section.key=value"),
        ("data=3", "data"),
    ],
)
def test_bad_recipe_values_name_the_key(override, message):
    with pytest.raises(UserError, match=message):
        read_recipe(ROOT / "recipes" / "eagle3-code.yaml", DrafterRecipe, [override])


def test_recipe_files(tmp_path):
    recipe = read_recipe(
        ROOT / "recipes" / "eagle3-code.yaml", DrafterRecipe, ["optimization.epochs=2.5", "data.files=[a.jsonl]"]
    )
    assert recipe.data.files == ["a.jsonl"] and recipe.optimization.epochs == 2.5
    bad = tmp_path / "bad.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- 1", "expected a mapping"), ("seed: 0", "missing")):
        bad.write_text(text)
        with pytest.raises(UserError, match=message):
            read_recipe(bad, DrafterRecipe)
    with pytest.raises(UserError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml", DrafterRecipe)


def test_target_recipe_is_checked_before_anything_runs(tmp_path):
    recipe = ROOT / "recipes" / "targets" / "code.yaml"
    assert read_recipe(recipe, TargetRecipe).stages[-1].layers >= 20
    with pytest.raises(UserError, match="found 4 layers before 6, expected a multiple"):
        one = "length: 8, batch: 1, tokens: 8"
        read_recipe(recipe, TargetRecipe, [f"stages=[{{layers: 4, {one}}}, {{layers: 6, {one}}}]"])
    with pytest.raises(UserError, match="exists; expected a new place"):
        pretrain(read_recipe(recipe, TargetRecipe, [f"output={tmp_path}"]))


def test_a_regression_is_for_heads_that_have_one():
    assert read_recipe(ROOT / "recipes" / "hass-code.yaml", DrafterRecipe, ["head.regression=true"]).head.regression
    with pytest.raises(UserError, match="head.regression: found true, expected false .owl has no such start"):
        read_recipe(ROOT / "recipes" / "owl-code.yaml", DrafterRecipe, ["head.regression=true"])
