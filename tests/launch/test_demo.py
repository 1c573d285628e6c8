"""The demos' flow, from prompts to a measured drafter, each on a tiny target in its own's place."""

import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from draftsmith.launch import measurement
from draftsmith.launch.cli import app
from draftsmith.launch.demo import DEMOS, Functions, TrainingRows, command, demo, run
from draftsmith.models.errors import UserError
from draftsmith.models.formats import save_drafter
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from draftsmith.train.reference.pretrain import train_tokenizer
from tests.conftest import ROOT, tiny_head, tiny_target

PROMPTS = {"code": Functions(8, ("packaging",)), "smollm2": TrainingRows("few.jsonl")}
SMALL = (
    "head.intermediate_size=null",
    "head.draft_vocab_size=100",
    "objective.steps=2",
    "optimization.epochs=1",
    "data.max_length=256",
    "optimization.batch_tokens=256",
    "evaluation.rows=2",
    "evaluation.times=1",
    "evaluation.max_new_tokens=4",
)


@pytest.mark.parametrize("name", DEMOS)
def test_the_flow_ends_with_a_drafter_beside_the_shipped_one_and_lossless(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = (ROOT / "recipes/prompts/chat.jsonl").read_text().splitlines()
    Path("few.jsonl").write_text("\n".join(texts[75:90]) + "\n")
    target = tiny_target(vocab=600, max_position_embeddings=1024)
    target.model.generation_config.eos_token_id = target.model.config.eos_token_id = 2
    target.model.save_pretrained("target")
    train_tokenizer(texts, 600).save_pretrained("target")
    save_drafter(tiny_head(target, 100), "shipped", {"target": "target"})
    tiny = replace(
        DEMOS[name],
        target="target",
        prompts=PROMPTS[name],
        answer_tokens=12,
        overrides=("target=target", *SMALL),
        shipped="shipped",
        limit=3,
        max_new_tokens=6,
        temperatures=(0.0,),
        tree="chain:2",
    )
    said = []
    run(tiny, Path("out"), said.append)
    stages = [line.split("] ", 1)[1] for line in said if re.match(r"\n\[\d/4, ", line)]
    assert [stage.split(" ")[0] for stage in stages[1:]] == ["draftsmith"] * 3
    asked = [json.loads(line) for line in Path("out/prompts.jsonl").read_text().splitlines()]
    assert len(asked) == {"code": 8, "smollm2": 10}[name] and all(row.get("split") != "held-out" for row in asked)
    result = json.loads(Path("out/result.json").read_text())
    assert result["lossless"] and result["shipped"]["lossless"] and result["conditions"]["first"] == "demo"
    assert result["tree_tau"] >= 1 and Path("out/drafter/model.safetensors").is_file()


@pytest.mark.parametrize("name", DEMOS)
def test_the_last_printed_command_asks_for_the_measurement_that_is_made(name, monkeypatch):
    request, asked = DEMOS[name].request(Path("runs/x")), []
    monkeypatch.setattr(measurement, "measure", lambda request, report: asked.append(request))
    result = CliRunner().invoke(app, shlex.split(command(request))[1:], catch_exceptions=False)
    assert result.exit_code == 0 and asked == [request]


def test_the_first_printed_command_writes_the_very_prompts_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    prompts = DEMOS["smollm2"].prompts
    prompts.write(str(tmp_path / "a/prompts.jsonl"), None)
    subprocess.run(["bash", "-c", prompts.command(str(tmp_path / "b/prompts.jsonl"))], check=True)
    written = (tmp_path / "a/prompts.jsonl").read_text()
    assert written == (tmp_path / "b/prompts.jsonl").read_text() and len(written.splitlines()) == 320


@pytest.mark.parametrize("name", DEMOS)
def test_the_recipe_of_a_demo_takes_its_overrides(name):
    chosen = DEMOS[name]
    recipe = read_recipe(ROOT / "recipes" / chosen.recipe, DrafterRecipe, list(chosen.overrides))
    assert recipe.target == chosen.target and recipe.data.max_length <= recipe.optimization.batch_tokens


def test_an_unknown_demo_is_named():
    with pytest.raises(UserError, match="found llama, expected code or smollm2"):
        demo("llama")
