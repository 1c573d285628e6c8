"""GTO in the training loop: one process equals two under ZeRO, rows without a group included; exact resume; the drafter
keeps its form.
"""

import sys

import pytest
import torch
import yaml

from draftsmith.launch.training import main
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget
from draftsmith.train import distributed
from tests.conftest import train_killed_at
from tests.train.test_train import log_of, run, weights
from tests.train.test_train_errors import refused

GTO = {
    "groups": 3,
    "group_size": 10,
    "tree": "dynamic:3x3x9",
    "reward_agg": "lse",
    "reward_mode": "prob",
    "debias": True,
    "clip": 0.2,
    "delta": 0.01,
    "min_spread": 1e-6,
    "omega": 0.5,
}


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


@pytest.mark.timeout(900)
def test_zero_stages_in_two_processes_equal_one_process(start):
    """Two processes that each take one bin of a step against one that takes both: loss, rewards, ratios and skipped
    groups agree, though the bins of some steps hold no window on one side or on both.
    """
    common = [start / "recipe.yaml", "optimization.batch_tokens=90", "optimization.epochs=3"]
    one = run(
        [sys.executable, "-m", "draftsmith.train", *common, "optimization.accumulation=2", f"output={start}/single"],
        start,
    )
    assert one.returncode == 0, one.stderr[-2000:]
    want = log_of(start / "single")
    groups = [line["gto"]["groups"] for line in want]
    assert 0 in groups and max(groups) > 0 and len(set(groups)) > 2, groups
    assert any(line["gto"]["ratio"] not in (0.0, 1.0) for line in want)
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
                *common,
                f"engine.zero_stage={stage}",
                f"output={start}/zero{stage}",
            ],
            start,
        )
        assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]
        for a, b in zip(want, log_of(start / f"zero{stage}"), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["gto"] == pytest.approx(a["gto"], rel=1e-3, abs=1e-4), (stage, a["step"])


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
