"""OWL in a run: every ZeRO stage in two processes gives what one process gives, with [SPEC]; recipes say what they
mean.
"""

import json

import pytest
import torch
import yaml

from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget, describe
from draftsmith.train import distributed
from draftsmith.train.estimate import estimate
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import ROOT
from tests.train.test_train import log_of, run, weights

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


@pytest.mark.timeout(900)
def test_zero_stages_in_two_processes_equal_one_process(recipe, tmp_path):
    """Gradients of the probe's embedding come from two processes' documents; which documents drop it follows from the
    rows, not from who has them.
    """
    assert main([str(recipe), "optimization.accumulation=2", f"output={tmp_path}/single"]) == 0
    want = [line["loss"] for line in log_of(tmp_path / "single")]
    assert want[-1] < want[0] and len(want) > 5
    for stage in (2, 3):
        two = run(
            [
                "deepspeed",
                "--num_gpus",
                "2",
                "--master_port",
                distributed.free_port(),
                "--module",
                "draftsmith.train",
                recipe,
                f"engine.zero_stage={stage}",
                f"output={tmp_path}/{stage}",
            ],
            tmp_path,
        )
        assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]
        assert [line["loss"] for line in log_of(tmp_path / str(stage))] == pytest.approx(want, rel=1e-5), stage
        for a, b in zip(weights(tmp_path / str(stage)).values(), weights(tmp_path / "single").values()):
            torch.testing.assert_close(a.float(), b.float(), atol=2e-3, rtol=1e-2)  # stored in bf16


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
