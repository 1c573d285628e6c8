"""Every head and objective under ZeRO: two real processes, each of which takes one bin of a step, learn what one
process learns that takes both. All trainings of two processes share one launch (tests/one_launch.py).
"""

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from safetensors.torch import load_file

from draftsmith.launch.training import main
from draftsmith.train.distributed import free_port
from tests.conftest import ROOT
from tests.one_launch import run, train_in_two_processes
from tests.tiny_vision import draw, saved_llava
from tests.train.test_train import log_of, weights

pytestmark = pytest.mark.timeout(900)

ZERO1, ZERO2, ZERO3 = (f"engine.zero_stage={stage}" for stage in (1, 2, 3))
SHARDED, CACHED = "engine.target=sharded", "data.features=cached"
STAGES = {  # of each recipe, what its trainings in two processes change
    "eagle3": {"zero0": [], "zero1": [ZERO1], "zero2": [ZERO2], "zero3": [ZERO3, SHARDED, CACHED]},
    "hass": {"zero2": [ZERO2], "zero3": [ZERO3, SHARDED, CACHED]},
    "owl": {"zero2": [ZERO2], "zero3": [ZERO3]},
    "lora": {"zero2": [ZERO2], "zero3": [ZERO3]},
    "gto": {"zero2": [ZERO2], "zero3": [ZERO3]},
    "dream": {"zero2": [ZERO2], "zero3": [ZERO3, SHARDED]},
    "hivis": {"zero2": [ZERO2, SHARDED]},
}
TRAININGS = [(name, stage) for name, stages in STAGES.items() for stage in stages]
MODULES = ["fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
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
ROWS = [
    (0, 1),
    (1, 3),
    (1, 1),
    (2, 2),
    (0, 4),
    (1, 2),
    (1, 5),
    (2, 1),
    (1, 4),
    (1, 2),
    (0, 2),
    (1, 3),
]  # (pictures, length of the answers) of each that the heads for targets that see learn from


def recipes(folder: Path, place: Path) -> dict[str, Path]:
    """The recipe of each, for a tiny target. Rows are of different lengths, so that a mean of the processes' means
    would differ.
    """
    found = {}
    start = place / "start" / "drafter"
    assert main([str(folder / "recipe.yaml"), "optimization.epochs=10", f"output={place}/start"]) == 0

    def written(name: str, values: dict, *sections: dict) -> None:
        for section in sections:
            for key, value in section.items():
                values[key] = {**values[key], **value} if key in ("optimization", "data", "engine") else value
        found[name] = place / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump(values))

    def text(**head) -> dict:
        values = yaml.safe_load((folder / "recipe.yaml").read_text())
        values["head"] = {**values["head"], **head}
        values["optimization"]["name"] = "adamw"
        return values

    written("eagle3", text(draft_vocab_size=None))
    # with noise keyed by step and rows; ZeRO-3 pulls the loss back through the output head of a sharded target
    written(
        "hass",
        text(),
        {"head": {"name": "eagle", "intermediate_size": None, "bias": True, "start_from": None}},
        {"objective": {"steps": 3, "ce_weight": 0.1, "topk_weight": 1.0, "topk": 10, "noise": 0.02}},
        {"optimization": {"lr": 0.02}},
    )
    # gradients of the probe's embedding come from two processes' documents; which documents drop it follows from the
    # rows, not from who has them
    written(
        "owl",
        text(),
        {"head": {"name": "owl", "inner_dim": 24, "n_predict": 3, "spec_mode": "replace", "start_from": None}},
        {"objective": {"steps": 3, "spec_dropout": 0.3}, "optimization": {"muon_lr": None}},
    )
    written(
        "lora",
        text(start_from=str(start)),
        {"lora": {"rank": 4, "alpha": 8, "modules": MODULES}, "optimization": {"lr": 0.01}},
    )
    # half of the rows are too short for a group of ten: the bins of some steps hold no window on one side or on both
    written(
        "gto",
        text(start_from=str(start)),
        {"gto": GTO, "optimization": {"lr": 0.003, "batch_tokens": 90, "epochs": 3}},
    )
    rows = pictures(place)
    for name in ("dream", "hivis"):
        values = yaml.safe_load((ROOT / "recipes" / f"{name}-llava-1.5-7b.yaml").read_text())
        if name == "hivis":  # stage 2
            values["head"] |= {"residuals": 2, "qkv_bias": True}
            values["objective"] |= {"steps": 2, "topk_weight": 1.0}
        written(
            name,
            values,
            {"target": str(place / "seeing"), "wandb": None},
            {"data": {"files": [str(rows)], "max_length": 64, "max_image_pixels": 64}},
            {"optimization": {"lr": 0.01, "epochs": 3, "batch_tokens": 64, "accumulation": 1, "warmup": 0.0}},
            {"engine": {"dtype": "fp32", "config": None, "zero_stage": 0}},
            {"evaluation": {**values["evaluation"], "rows": 0}},
        )
    return found


def pictures(place: Path) -> Path:
    """Rows of text and of one and two pictures, for a tiny LLaVA in `place/seeing`."""
    saved_llava(place / "seeing", 320)
    records = []
    for number, (count, length) in enumerate(ROWS):
        names = [f"{number}-{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            draw(place / name, 10 * number + i)
        turns = [
            turn
            for i in range(max(1, count))
            for turn in (
                {"from": "human", "value": "<image>\nWhat is this?" if i < count else "What?"},
                {"from": "gpt", "value": "A square. " * length},
            )
        ]
        records.append({**({"image": names} if count else {}), "conversations": turns})
    (place / "rows.json").write_text(json.dumps(records))
    return place / "rows.json"


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory) -> Path:
    """A folder with the output of each training: NAME/one of one process, NAME/STAGE of two."""
    place = tmp_path_factory.mktemp("zero")
    made = recipes(folder, place)
    for name, recipe in made.items():
        assert main([str(recipe), "optimization.accumulation=2", f"output={place}/{name}/one"]) == 0
    several = [[made[name], *STAGES[name][stage], f"output={place}/{name}/{stage}"] for name, stage in TRAININGS]
    (place / "said").write_text(told(train_in_two_processes(place, *several)))
    return place


def told(result: CompletedProcess) -> str:
    return result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.parametrize(("name", "stage"), TRAININGS)
def test_two_processes_learn_what_one_learns(place, name, stage):
    one, two = place / name / "one", place / name / stage
    assert (two / "drafter").is_dir(), (place / "said").read_text()
    assert json.loads((two / "drafter" / "draftsmith.json").read_text())["world_size"] == 2
    want, found = log_of(one), log_of(two)
    losses = [line["loss"] for line in want]
    assert len(losses) > 5 and (losses[-1] < losses[0] or name in ("lora", "gto"))  # which start from a trained one
    # ratios and rewards of trees, which are drawn by what the drafter says, follow it less smoothly
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-4 if name == "gto" else 1e-5)
    if name == "gto":
        for a, b in zip(want, found, strict=True):
            assert b["gto"] == pytest.approx(a["gto"], rel=1e-3, abs=1e-4), a["step"]
        return
    same(weights(one), weights(two))
    if name == "lora":
        adapters = [load_file(output / "adapter" / "adapter_model.safetensors") for output in (one, two)]
        assert len(adapters[0]) == 2 * len(MODULES)
        same(*adapters)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), atol=2e-3, rtol=1e-2)  # stored in bf16


def test_the_steps_of_gto_differ_in_how_many_groups_they_have(place):
    told = [line["gto"] for line in log_of(place / "gto" / "one")]
    groups = [line["groups"] for line in told]
    assert 0 in groups and max(groups) > 0 and len(set(groups)) > 2, groups
    assert any(line["ratio"] not in (0.0, 1.0) for line in told)


def test_torchrun_restarts_a_run_whose_process_died_and_it_ends_with_the_same_weights(place, tmp_path):
    """Process 1 of the first attempt dies in step 4 without a word; torchrun starts both again, which go on from the
    checkpoint. The run that nothing happened to is the one of DeepSpeed's launcher.
    """
    (tmp_path / "dying.py").write_text(
        "import os, sys\nfrom draftsmith.launch.training import main\nfrom draftsmith.train.loop import Run\nstep = "
        "Run._step\n"
        "def dying(self, *a):\n    if self.state.step == 3 and os.environ['RANK'] == '1' and "
        "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os._exit(9)\n    return step(self, *a)\nRun._step = dying\nsys.exit(main(sys.argv[1:]))\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--max-restarts", 2]
    where = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    arguments = [place / "eagle3.yaml", ZERO2, "engine.checkpoint_minutes=0", f"output={tmp_path}/cut"]
    result = run([sys.executable, *torchrun, *where, tmp_path / "dying.py", *arguments], tmp_path)
    assert result.returncode == 0, told(result)
    assert "resumed at step 3" in result.stdout
    whole, cut = place / "eagle3" / "zero2", tmp_path / "cut"
    assert all(torch.equal(value, weights(cut)[name]) for name, value in weights(whole).items())
    assert [line["loss"] for line in log_of(cut)] == [line["loss"] for line in log_of(whole)]
