"""OWL in a run: its drafter, and recipes that say what they mean."""

import json

import pytest
import torch
import yaml

from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget, describe
from draftsmith.train.estimate import estimate
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import ROOT
from tests.train.test_train import log_of

RECIPES = sorted(ROOT.glob("recipes/owl-*.yaml"))


@pytest.fixture
def recipe(folder, tmp_path):
    """A recipe for a tiny target, with [SPEC]."""
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    values["head"] = {"name": "owl", "inner_dim": 24, "n_predict": 3, "spec_mode": "replace", "start_from": None}
    values["objective"] = {"steps": 3, "spec_dropout": 0.3}
    values["optimization"] |= {"name": "adamw", "muon_lr": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_a_run_saves_a_drafter_whose_embedding_has_learned(recipe, folder, tmp_path):
    assert (
        main(
            [
                str(recipe),
                f"output={tmp_path}/out",
                "optimization.lr=0.01",
                "evaluation.rows=2",
                "evaluation.times=1",
                "evaluation.max_new_tokens=6",
            ]
        )
        == 0
    )
    target = TextTarget.load(folder / "target")
    head = load_drafter(tmp_path / "out" / "drafter", target.shared)
    assert head.config.n_predict == 3 and head.config.spec_mode == "replace"
    assert (head.feature_spec.probe - target.embedding.mean(0)).abs().max() > 1e-3
    assert (
        log_of(tmp_path / "out")[-1]["tau"] >= 1
        and json.loads((tmp_path / "out/drafter/draftsmith.json").read_text())["head"] == "owl"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.steps=2", "objective.steps: found 2, expected head.n_predict 3"),
        ("data.features=cached", "data.features: found cached, expected online with a probe"),
        ("engine.target=sharded", "expected a whole target to train on probes"),
        ("head.spec_mode=concat", "head.spec_mode: found 'concat'"),
        ("objective.spec_dropout=1.5", "objective.spec_dropout: found 1.5"),
        ("head.inner_dim=0", "head.inner_dim: found 0"),
        ("objective.decay=0.8", "objective.decay: unknown key"),
    ],
)
def test_what_does_not_fit_is_one_line(recipe, tmp_path, capsys, override, message):
    assert main([str(recipe), override, f"output={tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err


def test_off_is_a_word(recipe):
    """YAML 1.1 takes `off` for a boolean; in a recipe it is a mode, in the file and on the command line."""
    assert read_recipe(recipe, DrafterRecipe, ["head.spec_mode=off"]).head.spec_mode == "off"
    text = recipe.read_text().replace("spec_mode: replace", "spec_mode: off")
    recipe.write_text(text)
    assert read_recipe(recipe, DrafterRecipe).head.spec_mode == "off"
    with pytest.raises(UserError, match="head.spec_mode: found False"):
        read_recipe(recipe, DrafterRecipe, ["head.spec_mode=false"])


@pytest.mark.parametrize("place", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_train_the_steps_that_their_heads_are_made_for(place):
    found = read_recipe(place, DrafterRecipe)
    assert found.goal.steps == found.head.n_predict == 8 and found.goal.weights == [1.0] * 8
    assert (found.head.spec_mode == "off") == (found.goal.spec_dropout == 0)
    assert not (found.head.spec_mode == "replace" and found.engine.target == "sharded")


def test_dry_run_counts_the_target_and_the_probes(recipe, folder):
    """Probes behind the written rows: forward and backward of the frozen target beside its forward over all of them,
    and its activations kept.
    """
    described = describe(str(folder / "target"))
    with_probes, without = (
        estimate(
            read_recipe(recipe, DrafterRecipe, [f"head.spec_mode={mode}"]),
            described,
            1,
            torch.device("cpu"),
            (1000, 500),
            timed=False,
        )
        for mode in ("replace", "off")
    )
    assert with_probes.head_parameters == without.head_parameters + 32
    assert with_probes.memory["probes"] == 100 * 0.5 * 7 * (8 * 32 + 4 * 48) * 4 and "probes" not in without.memory
