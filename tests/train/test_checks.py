"""What is refused before any row is prepared, by training and dry runs alike: the only row of these files is bad, so
that whoever reads it first says so.
"""

import json
import shutil
import sys

import pytest
import torch
import yaml

from draftsmith.launch.training import main
from draftsmith.models.formats import save_drafter
from draftsmith.models.heads import EagleConfig, EagleHead
from draftsmith.models.targets import TextTarget
from tests.conftest import ROOT, tiny_head, tiny_target
from tests.models.targets.test_recurrent import FAMILIES as RECURRENT
from tests.models.targets.test_targets import model_of
from tests.train.test_train_errors import refused
from tests.train.test_zero import GTO

SHIPPED = {"dream": "dream-shapes.yaml", "owl": "owl-code.yaml"}
COMMANDS = pytest.mark.parametrize("command", [[], ["--dry-run"]], ids=["train", "--dry-run"])


@pytest.fixture
def arguments(folder, tmp_path):
    """A recipe whose only row is bad."""
    (tmp_path / "rows.jsonl").write_text("{")
    return [str(folder / "recipe.yaml"), f"data.files=[{tmp_path}/rows.jsonl]", f"output={tmp_path}/never"]


def other_head(**changes):
    target = tiny_target(**{"vocab": 300} | changes)
    return EagleHead(EagleConfig.for_target(target.config), target.shared)


STARTS = {
    "another head": (other_head, "head.name: found eagle3, expected eagle as in"),
    "another vocabulary": (
        lambda: tiny_head(tiny_target(vocab=61), 50),
        "vocab_size: found 61, expected the target's 300",
    ),
    "another width": (
        lambda: tiny_head(tiny_target(vocab=300, hidden_size=64, head_dim=16), 200),
        "hidden_size: found 64, expected the target's 32",
    ),
    "a deeper target": (
        lambda: tiny_head(tiny_target(vocab=300, layers=12), 200),
        "eagle_aux_hidden_state_layer_ids: found [2, 6, 9], expected ascending numbers from 1 to 6",
    ),
    "another draft vocabulary": (
        lambda: tiny_head(tiny_target(vocab=300), 100),
        "head.draft_vocab_size: found 200, expected 100 as in",
    ),
}


@COMMANDS
@pytest.mark.parametrize("kind", STARTS)
def test_a_drafter_to_start_from_is_of_the_recipes_head_and_target(kind, command, arguments, tmp_path, capsys):
    make, message = STARTS[kind]
    start = save_drafter(make(), tmp_path / "start", {})
    assert message in refused(capsys, [*arguments, f"head.start_from={start}", *command])
    assert not (tmp_path / "never").exists()


DAMAGE = {
    "no folder": (lambda start: start.rename(start.with_name("away")), "/start: no such directory; expected a drafter"),
    "no weights": (lambda start: (start / "model.safetensors").unlink(), "/start: model.safetensors is missing"),
    "half of the weights": (
        lambda start: (start / "model.safetensors").write_bytes((start / "model.safetensors").read_bytes()[:999]),
        "/start/model.safetensors: cannot be read",
    ),
    "no configuration": (lambda start: (start / "config.json").unlink(), "/start: config.json is missing"),
}


@COMMANDS
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_drafter_to_start_from_is_whole(kind, command, arguments, tmp_path, capsys):
    change, message = DAMAGE[kind]
    change(save_drafter(tiny_head(tiny_target(vocab=300), 200), tmp_path / "start", {}))
    assert message in refused(capsys, [*arguments, f"head.start_from={tmp_path}/start", *command])


def test_a_drafter_that_fits_lets_the_rows_be_read(arguments, tmp_path, capsys):
    """With the target's embedding beside it as well, which only the loaded target can be compared with."""
    target = tiny_target(vocab=300)
    for name, head in (("eagle3", tiny_head(target, 200)), ("eagle", other_head())):
        recipe = yaml.safe_load(open(arguments[0]))
        if name == "eagle":
            recipe["head"] = {"name": "eagle", "intermediate_size": None, "bias": True}
            recipe["objective"] = {"steps": 1, "ce_weight": 0.1, "topk_weight": 0.0, "topk": 10, "noise": 0.2}
        recipe["head"]["start_from"] = str(save_drafter(head, tmp_path / name, {}, torch.float32))
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert "row 1: not valid JSON" in refused(capsys, [f"{tmp_path}/recipe.yaml", *arguments[1:]])


SETTINGS = {
    "evaluation.tree": (["evaluation.rows=4", "evaluation.tree=bush"], "tree: found 'bush', expected chain:DEPTH"),
    "gto.tree": (
        ["head.start_from=START", f"gto={json.dumps(GTO | {'tree': 'sampled:binary:2'})}"],
        "gto.tree: found sampled:binary:2, expected one that is not sampled",
    ),
    "soft_budget.tree": (
        ['soft_budget={"roots": 4, "tree": "chain:4", "theta": 0.5, "omega": 1.0}'],
        "soft_budget.tree: found chain:4, expected dynamic",
    ),
    "lora.modules": (
        ["head.start_from=START", 'lora={"rank": 2, "alpha": 4, "modules": ["fc", "mlp"]}', "optimization.name=adamw"],
        "lora.modules: found mlp, expected some of fc,",
    ),
    "engine.dtype": (["engine.dtype=fp16"], "engine.dtype: found fp16, which cpu does not support"),
}


@COMMANDS
@pytest.mark.parametrize("key", SETTINGS)
def test_settings(key, command, arguments, tmp_path, capsys, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    changes, message = SETTINGS[key]
    if "head.start_from=START" in changes:
        start = save_drafter(tiny_head(tiny_target(vocab=300), 200), tmp_path / "start", {})
        changes = [change.replace("START", str(start)) for change in changes]
    assert message in refused(capsys, [*arguments, *changes, *command])
    assert not (tmp_path / "never").exists()


@COMMANDS
def test_a_cache_of_what_changes_as_it_learns(command, arguments, tmp_path, capsys):
    recipe = yaml.safe_load(open(arguments[0]))
    recipe["head"] = {"name": "owl", "inner_dim": 24, "n_predict": 3, "spec_mode": "replace", "start_from": None}
    recipe["objective"] = {"steps": 3, "spec_dropout": 0.3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = refused(capsys, [f"{tmp_path}/recipe.yaml", *arguments[1:], "data.features=cached", *command])
    assert "data.features: found cached, expected online with a probe" in line


HEADS_FOR = {
    "DREAM": ("dream", [], "mamba2 has no attention statistics"),
    "probes of a sharded target": (
        "owl",
        ["engine.target=sharded", "head.spec_mode=replace"],
        "expected a whole target to train on probes",
    ),
    "a sharded target with states": ("eagle3", ["engine.target=sharded"], "found 'sharded' for mamba2, whose layers"),
}


@COMMANDS
@pytest.mark.parametrize("kind", HEADS_FOR)
def test_what_a_target_does_not_give_to_training(kind, command, arguments, folder, tmp_path, capsys):
    head, changes, message = HEADS_FOR[kind]
    recipe = yaml.safe_load(open(arguments[0]))
    if head != "owl":
        target = TextTarget(model_of(RECURRENT["mamba2"]()), "mamba2").model
        target.resize_token_embeddings(300)
        shutil.copytree(folder / "target", tmp_path / "target", ignore=shutil.ignore_patterns("model*", "config*"))
        target.save_pretrained(tmp_path / "target")
        recipe |= {"target": str(tmp_path / "target")}
    if head != "eagle3":
        ours = yaml.safe_load((ROOT / "recipes" / SHIPPED[head]).read_text())
        recipe |= {name: ours[name] for name in ("head", "objective")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert message in refused(capsys, [f"{tmp_path}/recipe.yaml", *arguments[1:], *changes, *command])


@COMMANDS
@pytest.mark.parametrize(
    ("package", "changes", "message"),
    [
        ("wandb", ["wandb=project"], "but the package wandb is not installed"),
        (
            "peft",
            ["head.start_from=START", 'lora={"rank": 2, "alpha": 4, "modules": ["fc"]}', "optimization.name=adamw"],
            "lora needs the package peft, found none",
        ),
        ("deepspeed", [], "training needs the package deepspeed, found none"),
    ],
)
def test_packages(package, changes, message, command, arguments, tmp_path, capsys, monkeypatch):
    start = save_drafter(tiny_head(tiny_target(vocab=300), 200), tmp_path / "start", {})
    monkeypatch.setitem(sys.modules, package, None)
    changes = [change.replace("START", str(start)) for change in changes]
    assert message in refused(capsys, [*arguments, *changes, *command])


@COMMANDS
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("more.txt", "more.txt: found suffix '.txt', expected .jsonl"),
        ("more.parquet", "more.parquet: reading it needs the package datasets, found none"),
    ],
)
def test_the_last_file_is_looked_at_before_the_first_is_read(
    name, message, command, arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / name).write_text("")
    files = f"data.files=[{tmp_path}/rows.jsonl, {tmp_path}/{name}]"
    assert message in refused(capsys, [*arguments, files, *command])


@pytest.mark.parametrize("left", ["drafter", "checkpoint"])
def test_an_output_of_another_recipe(left, folder, arguments, tmp_path, capsys):
    output = f"output={tmp_path}/out"
    assert main([arguments[0], output, "optimization.epochs=1"]) == 0
    if left == "checkpoint":
        (tmp_path / "out" / "drafter").rename(tmp_path / "away")
        (tmp_path / "out" / "checkpoints" / "step-1").mkdir(parents=True)
        settings = json.loads((tmp_path / "away" / "draftsmith.json").read_text())["settings"]
        state = {"settings": settings, "world_size": 1, "state": {}}
        (tmp_path / "out" / "checkpoints" / "step-1" / "state.json").write_text(json.dumps(state))
    line = refused(capsys, [*arguments[:2], output, "optimization.epochs=1", "seed=9"])
    assert "another recipe" in line and "(data, seed differ)" in line
