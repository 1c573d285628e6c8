"""Objectives, rows and forms of a head in the training loop: by keys of a recipe alone, resumed exactly."""

import json

import pytest
import torch

from draftsmith.launch.training import main
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget
from tests.conftest import train_killed_at
from tests.train.test_train import log_of, weights
from tests.train.test_train_errors import refused

SOFT = {"roots": 4, "tree": "dynamic:3x3x9", "theta": 0.5, "omega": 1.0}
KEYS = [
    f"soft_budget={json.dumps(SOFT)}",
    "objective.reach=overlap",
    "objective.total_variation=0.5",
    "objective.teacher_temperature=0.5",
    "objective.rows=0.5",
    "head.fc_norm=true",
    "head.norm_output=true",
    "head.sliding_window=8",
]


@pytest.mark.timeout(600)
def test_a_run_with_every_key_is_resumed_exactly(folder, tmp_path):
    """Draws of roots and rows follow from the step alone; the drafter keeps its norms and its window."""
    common = [str(folder / "recipe.yaml"), *KEYS, "engine.checkpoint_minutes=0", "optimization.epochs=1"]
    assert main([*common, f"output={tmp_path}/whole"]) == 0
    train_killed_at(3, [*common, f"output={tmp_path}/killed"])
    assert main([*common, f"output={tmp_path}/killed"]) == 0
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "killed")[name]), name
    lines = log_of(tmp_path / "whole")
    assert all(line["soft_budget"]["roots"] > 0 and line["soft_budget"]["accepted"] > 0 for line in lines)
    target = TextTarget.load(str(folder / "target"))
    config = load_drafter(tmp_path / "whole" / "drafter", target.shared, target.layers).config
    assert (config.fc_norm, config.norm_output, config.sliding_window) == (True, True, 8)


def test_a_window_can_be_taken_on_and_a_norm_cannot(folder, tmp_path, capsys):
    common = [str(folder / "recipe.yaml"), "optimization.epochs=1"]
    assert main([*common, f"output={tmp_path}/start"]) == 0
    going_on = [*common, f"head.start_from={tmp_path}/start/drafter", f"output={tmp_path}/on"]
    assert main([*going_on, "head.sliding_window=4"]) == 0
    target = TextTarget.load(str(folder / "target"))
    assert load_drafter(tmp_path / "on" / "drafter", target.shared, target.layers).config.sliding_window == 4
    line = refused(capsys, [*going_on, "head.fc_norm=true", f"output={tmp_path}/other"])
    assert "head.fc_norm: found True, expected False as in" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (f"soft_budget={json.dumps(SOFT | {'tree': 'chain:4'})}", "soft_budget.tree: found chain:4, expected dynamic"),
        ("objective.rows=1.5", "objective.rows"),
        ("objective.reach=far", "objective.reach: found 'far'"),
        ("head.candidate_rank=4", "head.num_candidates: found None with candidate_rank 4"),
    ],
)
def test_values_that_mean_nothing_are_refused(folder, tmp_path, capsys, change, message):
    assert message in refused(capsys, [str(folder / "recipe.yaml"), change, f"output={tmp_path}/out"])


def test_trees_need_the_target_beside_the_training(folder, tmp_path, capsys):
    line = refused(capsys, [str(folder / "recipe.yaml"), KEYS[0], "data.features=cached", f"output={tmp_path}/out"])
    assert "found cached, replicated, expected online, replicated with soft_budget" in line
