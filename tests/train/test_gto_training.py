"""GTO in the training loop: exact resume, and a drafter that keeps its form."""

import pytest
import torch
import yaml

from draftsmith.launch.training import main
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget
from tests.conftest import train_killed_at
from tests.train.test_train import log_of, weights
from tests.train.test_train_errors import refused
from tests.train.test_zero import GTO


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    """A recipe with GTO that starts from a drafter trained for a moment. Half of the rows are too short for a group of
    ten.
    """
    place = tmp_path_factory.mktemp("gto")
    assert main([str(folder / "recipe.yaml"), "optimization.epochs=10", f"output={place}/start"]) == 0
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["head"]["start_from"], recipe["gto"] = str(place / "start" / "drafter"), GTO
    recipe["optimization"] |= {"name": "adamw", "lr": 0.003}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place


@pytest.mark.parametrize(
    "engine",
    [["optimization.name=muon"], ["engine.zero_stage=2"], ["engine.zero_stage=2", "engine.dtype=bf16"]],
    ids=["muon", "zero2", "bf16"],
)
def test_a_killed_run_resumes_to_the_same_weights(start, tmp_path, engine):
    """The reference that ratios and rewards are taken against is the start, not the drafter at the kill."""
    arguments = [str(start / "recipe.yaml"), *engine, "engine.checkpoint_minutes=0"]
    assert main([*arguments, f"output={tmp_path}/whole"]) == 0
    train_killed_at(6, [*arguments, f"output={tmp_path}/cut"])
    assert main([*arguments, f"output={tmp_path}/cut"]) == 0
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values())
    )
    told = [[(line["loss"], line["gto"]) for line in log_of(tmp_path / name)] for name in ("whole", "cut")]
    assert (
        told[0] == told[1]
        and told[0][0][1]["ratio"] in (0.0, 1.0)
        and any(g["reward"] != g["frozen_reward"] for _, g in told[0])
    )


def test_the_drafter_keeps_its_form_and_the_run_tells_what_it_does(start, tmp_path, capsys):
    """The same files, keys and shapes as the start (methods: test 9)."""
    assert main([str(start / "recipe.yaml"), f"output={tmp_path}/out"]) == 0
    shown = capsys.readouterr().out
    assert "reward" in shown and "clipped" in shown and "skipped" in shown
    before, after = weights(start / "start"), weights(tmp_path / "out")
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    assert (start / "start" / "drafter" / "config.json").read_text() == (
        tmp_path / "out" / "drafter" / "config.json"
    ).read_text()
    target = TextTarget.load(start.parent.glob("run*/target").__next__())
    assert load_drafter(tmp_path / "out" / "drafter", target.shared, target.layers).ids.tolist()
    told = log_of(tmp_path / "out")[-1]["gto"]
    assert set(told) == {
        "groups",
        "skipped",
        "reward",
        "frozen_reward",
        "spread",
        "accepted",
        "ratio",
        "clipped",
        "loss",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.start_from=null", "head.start_from: found null, expected a trained drafter with gto"),
        ("data.features=cached", "found cached, replicated, expected online, replicated with gto"),
        ("engine.target=sharded", "found online, sharded, expected online, replicated with gto"),
        ("gto.tree=sampled:chain:3", "gto.tree: found sampled:chain:3, expected one that is not sampled"),
        ("gto.tree=bush", "tree: found 'bush'"),
        ("gto.group_size=1", "gto.group_size: found 1"),
        ("gto.reward_agg=sum", "gto.reward_agg: found 'sum'"),
        ("gto.omega=0", "gto.omega: found 0"),
        ("gto.rate=1", "gto.rate: unknown key"),
    ],
)
def test_bad_recipes(start, tmp_path, capsys, override, message):
    assert message in refused(capsys, [str(start / "recipe.yaml"), override, f"output={tmp_path}/never"])
    assert not (tmp_path / "never" / "drafter").exists()
