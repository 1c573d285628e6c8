"""What draftsmith.json tells of a drafter beside its recipe: what an engine must be told, or should not exceed."""

from draftsmith.models.grow import parse_tree
from draftsmith.models.rendering import Renderer
from draftsmith.train.data import Rows
from draftsmith.train.recipe import DrafterRecipe


def trained(recipe: DrafterRecipe, rows: Rows, renderer: Renderer) -> dict:
    """What a drafter was trained for.

    steps: drafted levels; context: tokens of the longest row (at most data.max_length); temperatures: of the answers
    (`Rows.temperatures`); laws: theirs beside the temperatures (`Rows.laws`); template_variables: those of the chat
    template (`Renderer.told`).
    """
    trees = [spec.tree for spec in (recipe.gto, recipe.soft_budget) if spec]
    return {
        "steps": max([recipe.objective.steps, *(parse_tree(tree).depth for tree in trees)]),
        "context": int(rows.lengths.max()),
        "temperatures": rows.temperatures,
        "laws": rows.laws,
        "template_variables": renderer.told(),
    }


def measured(recipe: DrafterRecipe) -> dict:
    """What the acceptance length during the run (`best`) was measured with: a drafter that drafts its most probable
    tokens (engines call such drafts greedy; their law is one-hot), verified greedily.
    """
    return {"tree": recipe.evaluation.tree, "temperature": 0.0, "drafts": "one-hot"}
