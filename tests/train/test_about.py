"""What draftsmith.json tells engines of a drafter's training."""

import pytest
import yaml

from draftsmith.models.chat import load_tokenizer
from draftsmith.models.rendering import Renderer
from draftsmith.train.about import measured, trained
from draftsmith.train.data import prepare
from draftsmith.train.recipe import DrafterRecipe, Gto, read_recipe
from tests.conftest import ROOT

GTO = yaml.safe_load((ROOT / "recipes" / "eagle3-code-gto.yaml").read_text())["gto"]


@pytest.fixture
def rows(folder, tmp_path):
    return prepare(
        [str(folder / "rows.jsonl")], 64, 0.0, load_tokenizer(folder / "target"), {2}, 300, tmp_path, lambda line: None
    )


def test_steps_are_the_drafted_levels_that_were_trained_and_context_the_longest_row(folder, rows):
    found = trained(
        read_recipe(folder / "recipe.yaml", DrafterRecipe), rows, Renderer(load_tokenizer(folder / "target"))
    )
    longest = max(len(rows.row(number)[0]) for number in range(len(rows)))
    assert found == {"steps": 3, "context": longest, "temperatures": [None], "laws": [None], "template_variables": {}}
    assert 0 < longest < 64  # not data.max_length


@pytest.mark.parametrize(("tree", "steps"), [("dynamic:4x5x24", 5), ("chain:2", 3)])
def test_trees_of_gto_train_their_depth_too(folder, rows, tree, steps):
    recipe = read_recipe(folder / "recipe.yaml", DrafterRecipe)
    recipe = recipe.model_copy(update={"gto": Gto(**{**GTO, "tree": tree})})
    assert trained(recipe, rows, Renderer(load_tokenizer(folder / "target")))["steps"] == steps


def test_what_tau_was_measured_with(folder):
    recipe = read_recipe(folder / "recipe.yaml", DrafterRecipe, ["evaluation.tree=dynamic:3x2x8"])
    assert measured(recipe) == {"tree": "dynamic:3x2x8", "temperature": 0.0, "drafts": "one-hot"}
