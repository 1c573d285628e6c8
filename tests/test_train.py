"""Recipes, and training by DeepSpeed in one and two real processes: equal losses, exact resume, checkpoints that are complete or invisible."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from draftsmith.launch.inspect import inspect, spans
from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget
from draftsmith.train import distributed, telemetry
from draftsmith.train.optimizers import orthogonalise
from draftsmith.train.pretrain import TargetRecipe, grow, pretrain
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import ROOT, tiny_target


def test_inspect_shows_the_mask(folder):
    console = Console(record=True, width=200, file=io.StringIO())
    inspect(read_recipe(folder / "recipe.yaml", DrafterRecipe), 1, console)
    text, html = console.export_text(clear=False), console.export_html()
    assert text.startswith("24 rows") and "a draft vocabulary of 200 covers 100.00%" in text
    assert "return" in re.search(r"<span class=\"r\d\">(\s*return[^<]*)</span>", html).group(1)


@pytest.mark.parametrize(("override", "message"), [
    ("head.nme=eagle3", "head.nme: unknown key"), ("seed=abc", "seed: found 'abc'"), ("optimization.lr=-1", "optimization.lr: found -1"),
    ("engine.zero_stage=7", "engine.zero_stage: found 7"), ("nonsense", "expected section.key=value"), ("data=3", "data"),
])
def test_bad_recipe_values_name_the_key(override, message):
    with pytest.raises(UserError, match=message):
        read_recipe(ROOT / "recipes" / "eagle3-code.yaml", DrafterRecipe, [override])


def test_recipe_files(tmp_path):
    recipe = read_recipe(ROOT / "recipes" / "eagle3-code.yaml", DrafterRecipe, ["optimization.epochs=2.5", "data.files=[a.jsonl]"])
    assert recipe.data.files == ["a.jsonl"] and recipe.optimization.epochs == 2.5
    bad = tmp_path / "bad.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- 1", "expected a mapping"), ("seed: 0", "missing")):
        bad.write_text(text)
        with pytest.raises(UserError, match=message):
            read_recipe(bad, DrafterRecipe)
    with pytest.raises(UserError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml", DrafterRecipe)


def test_target_recipe_is_checked_before_anything_runs(tmp_path):
    recipe = ROOT / "recipes" / "targets" / "code.yaml"
    assert read_recipe(recipe, TargetRecipe).stages[-1].layers >= 20
    with pytest.raises(UserError, match="found 4 layers before 6, expected a multiple"):
        one = "length: 8, batch: 1, tokens: 8"
        read_recipe(recipe, TargetRecipe, [f"stages=[{{layers: 4, {one}}}, {{layers: 6, {one}}}]"])
    with pytest.raises(UserError, match="exists; expected a new place"):
        pretrain(read_recipe(recipe, TargetRecipe, [f"output={tmp_path}"]))


def test_spans_cut_where_the_mask_changes():
    assert spans([1, 1, 0, 1]) == [(0, 2, 1), (2, 3, 0), (3, 4, 1)] and spans([0]) == [(0, 1, 0)]


def test_orthogonalised_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5 and values.max() < 1.4


def test_grown_target_computes_the_same():
    model = tiny_target(layers=2, tie_word_embeddings=True).model
    grown, tokens = grow(model, 6), torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(grown(tokens).logits, model(tokens).logits, atol=0, rtol=0)
    with pytest.raises(ValueError, match="not a multiple"):
        grow(model, 3)


def run(command, folder, timeout=240):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    return subprocess.run([str(c) for c in command], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_training_in_one_process_saves_a_loadable_drafter(folder):
    result = run([sys.executable, "-m", "draftsmith.train", folder / "recipe.yaml", f"output={folder}/one"], folder)
    assert result.returncode == 0, result.stderr[-2000:]
    target = TextTarget.load(folder / "target")
    head = load_drafter(folder / "one" / "drafter", target.embedding, target.layers)
    assert head.config.draft_vocab_size == 200 and 2 in head.ids
    log = log_of(folder / "one")
    assert log[-1]["step"] == log[-1]["total"] == len(log) and log[-1]["loss"] < log[0]["loss"]


@pytest.mark.timeout(900)
def test_zero_stages_in_two_processes_equal_one_process(folder):
    """The same steps: one process accumulates the two bins that two processes share. Rows are of different lengths, so that a mean of the
    processes' means would differ; ZeRO-3 runs with its target sharded and its features cached too."""
    common = [folder / "recipe.yaml", "optimization.name=adamw", "head.draft_vocab_size=null"]
    one = run([sys.executable, "-m", "draftsmith.train", *common, "optimization.accumulation=2", f"output={folder}/single"], folder)
    assert one.returncode == 0, one.stderr[-2000:]
    want = [line["loss"] for line in log_of(folder / "single")]
    assert want[-1] < want[0] and len(want) > 5
    for name, more in {"0": [], "1": ["engine.zero_stage=1"], "2": ["engine.zero_stage=2"],
                       "3": ["engine.zero_stage=3", "engine.target=sharded", "data.features=cached"]}.items():
        two = run(["deepspeed", "--num_gpus", "2", "--master_port", distributed.free_port(), "--module", "draftsmith.train", *common, *more,
                   f"output={folder}/{name}"], folder)
        assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]
        assert json.loads((folder / name / "drafter" / "draftsmith.json").read_text())["world_size"] == 2
        assert [line["loss"] for line in log_of(folder / name)] == pytest.approx(want, rel=1e-5), name
    for name in ("0", "1", "2", "3"):
        for a, b in zip(weights(folder / name).values(), weights(folder / "single").values()):
            torch.testing.assert_close(a.float(), b.float(), atol=2e-3, rtol=1e-2)  # stored in bf16


class Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "drafter" / "model.safetensors")


@pytest.mark.parametrize("engine", [["optimization.name=muon"], ["optimization.name=adamw", "engine.zero_stage=2"],
                                    ["optimization.name=adamw", "engine.zero_stage=1", "engine.dtype=bf16"]], ids=["muon", "zero2", "bf16"])
def test_a_killed_run_resumes_to_the_same_weights(folder, tmp_path, monkeypatch, engine):
    arguments = [str(folder / "recipe.yaml"), *engine, "engine.checkpoint_minutes=0"]
    assert main([*arguments, f"output={tmp_path}/whole"]) == 0
    whole = log_of(tmp_path / "whole")
    write = telemetry.Log.write

    def killed_at_8(log, line):
        if line["step"] == 8:
            raise Killed
        write(log, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(telemetry.Log, "write", killed_at_8)
        main([*arguments, f"output={tmp_path}/cut"])
    (tmp_path / "cut" / "checkpoints" / ".step-9").mkdir()  # a checkpoint that was never completed
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").glob("step-*")] == ["step-7"] and not (tmp_path / "cut" / "drafter").exists()
    assert main([*arguments, "seed=5", f"output={tmp_path}/cut"]) == 2  # the checkpoint of another recipe
    assert main([*arguments, f"output={tmp_path}/cut"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values()))
    assert [line["loss"] for line in log_of(tmp_path / "cut")] == [line["loss"] for line in whole]
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_checkpoint_of_another_world_size_is_a_warm_start_and_of_another_engine_is_refused(folder, tmp_path, monkeypatch, capsys):
    arguments = [str(folder / "recipe.yaml"), f"output={tmp_path}/out"]
    write = telemetry.Log.write

    def killed_at_5(log, line):
        if line["step"] == 5:
            raise Killed
        write(log, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(telemetry.Log, "write", killed_at_5)
        main([*arguments, "engine.checkpoint_minutes=0"])
    first = log_of(tmp_path / "out")[0]["loss"]
    assert main([*arguments, "optimization.name=adamw", "engine.zero_stage=1"]) == 2
    assert "engine, optimization differ" in capsys.readouterr().err
    state = tmp_path / "out" / "checkpoints" / "step-4" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "world_size": 2}))
    assert main(arguments) == 0
    assert "warm start" in capsys.readouterr().out
    log = log_of(tmp_path / "out")
    assert [line["step"] for line in log] == list(range(1, log[0]["total"] + 1)) and log[0]["loss"] < first


def test_termination_saves_and_the_same_command_resumes(folder, tmp_path, monkeypatch):
    arguments = [str(folder / "recipe.yaml"), f"output={tmp_path}/out"]
    write = telemetry.Log.write

    def terminated_at_3(log, line):
        write(log, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(telemetry.Log, "write", terminated_at_3)
    assert main(arguments) == 143
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-3"]
    assert main(arguments) == 0 and [line["step"] for line in log_of(tmp_path / "out")] == list(range(1, log_of(tmp_path / "out")[0]["total"] + 1))
