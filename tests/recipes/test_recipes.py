"""What every recipe of a drafter keeps."""

import pytest

from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import ROOT

RECIPES, TABLE = sorted((ROOT / "recipes").glob("*.yaml")), (ROOT / "recipes" / "README.md").read_text()
SEEING = {
    "llava-1.5-7b": ("hivis", "dream"),
    "llava-1.6-7b": ("eagle", "eagle3", "hivis", "dream"),
    "qwen2.5-vl-7b": ("eagle3", "hivis", "dream"),
    "gemma3": ("hivis", "dream"),
}


@pytest.mark.parametrize("place", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_begins_with_how_it_is_run_and_says_what_it_gave(place):
    recipe, text = read_recipe(place, DrafterRecipe), place.read_text()
    name, comment = place.stem.split("-")[0], text[: text.index("\ntarget:")]
    assert recipe.kind.name == {"hass": "eagle", "eagle31": "eagle3"}.get(name, name)
    assert all(line.startswith("#") for line in comment.splitlines()) and f"draftsmith train recipes/{name}" in comment
    assert recipe.target.startswith("bundled:") or "Figures: not measured" in comment and f"`{place.stem}`" in TABLE


@pytest.mark.parametrize("family", SEEING)
def test_recipes_of_one_target_read_the_same_rows(family):
    """What is compared differs in the head and its objective."""
    recipes = [read_recipe(ROOT / "recipes" / f"{head}-{family}.yaml", DrafterRecipe) for head in SEEING[family]]
    assert len({recipe.target for recipe in recipes}) == 1
    assert (
        len(
            {
                (recipe.data.max_length, recipe.data.max_bad_rows, recipe.data.features, recipe.data.max_image_pixels)
                for recipe in recipes
            }
        )
        == 1
    )
