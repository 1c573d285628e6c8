"""Recipes, rows and their masks, and training by DeepSpeed in one and two real processes."""

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
import yaml
from rich.console import Console
from safetensors.torch import load_file

from draftsmith.launch.inspect import inspect, spans
from draftsmith.models.chat import encode_prompt, encode_row
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter
from draftsmith.models.targets import TextTarget
from draftsmith.train import data, distributed, loop, main
from draftsmith.train.loop import rate_scale
from draftsmith.train.muon import orthogonalise
from draftsmith.train.pretrain import TargetRecipe, grow, pretrain, train_tokenizer
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import tiny_target

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(a, b):\n    return a + b\n", "the quick brown fox", "import os\nimport sys\n"], 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny target with a real tokenizer and 24 rows to learn from."""
    folder = tmp_path_factory.mktemp("run")
    target = tiny_target(vocab=300)
    target.model.config.eos_token_id = target.model.generation_config.eos_token_id = 2
    target.model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    rows = [{"messages": [{"role": "user", "content": f"def f{i}(a):"}, {"role": "assistant", "content": f"    return a + {i}\n"}]} for i in range(10, 34)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = yaml.safe_load((ROOT / "recipes" / "eagle3-code.yaml").read_text())
    recipe |= {"target": str(folder / "target"), "output": str(folder / "out"), "data": {"files": [str(folder / "rows.jsonl")], "max_length": 64}}
    recipe["head"] |= {"intermediate_size": None, "draft_vocab_size": 200}
    recipe["objective"] |= {"steps": 3}
    recipe["optimization"] |= {"batch_rows": 4, "epochs": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_answer_mask_with_and_without_generation_blocks(tokenizer):
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "return"}, {"role": "user", "content": "fox"},
                {"role": "assistant", "content": "os"}]
    ids, mask = encode_row(tokenizer, messages, {2})
    assert tokenizer.decode([t for t, m in zip(ids, mask) if m]) == "return<|end|>os<|end|>"
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = kept.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert encode_row(tokenizer, messages, {2}) == (ids, mask)
        assert ids[:len(encode_prompt(tokenizer, messages[:1]))] == encode_prompt(tokenizer, messages[:1])
        tokenizer.chat_template = "{{ messages | length }}" + kept.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        with pytest.raises(UserError, match="not prefix-stable"):
            encode_row(tokenizer, messages, {2})
    finally:
        tokenizer.chat_template = kept


def test_rows_as_regenerate_writes_them_and_plain_text(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"tokens": [1, 3, 9, 8, 7], "prompt_length": 2}) + "\n")
    assert data.read_rows([str(file)], tokenizer, {2}, 300, 4) == [data.Row([1, 3, 9, 8], [0, 0, 1, 1])]
    file.write_text(json.dumps({"text": "import os"}) + "\n")
    row = data.read_rows([str(file)], tokenizer, {2}, 300, 64)[0]
    assert tokenizer.decode(row.tokens) == "import os" and all(row.mask)


def test_spans_cut_where_the_mask_changes():
    assert spans([1, 1, 0, 1]) == [(0, 2, 1), (2, 3, 0), (3, 4, 1)] and spans([0]) == [(0, 1, 0)]


def test_inspect_shows_the_mask(folder):
    console = Console(record=True, width=200, file=io.StringIO())
    inspect(read_recipe(folder / "recipe.yaml", DrafterRecipe), 1, console)
    text, html = console.export_text(clear=False), console.export_html()
    assert text.startswith("24 rows") and "a draft vocabulary of 200 covers 100.00%" in text
    assert "return" in re.search(r"<span class=\"r\d\">(\s*return[^<]*)</span>", html).group(1)


def test_parquet_rows_equal_jsonl_rows(folder, tmp_path, tokenizer):
    import datasets

    table = datasets.Dataset.from_list([json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()])
    table.to_parquet(str(tmp_path / "rows.parquet"))
    read = lambda f: data.read_rows([str(f)], tokenizer, {2}, 300, 64)  # noqa: E731
    assert read(tmp_path / "rows.parquet") == read(folder / "rows.jsonl")


@pytest.mark.parametrize(("content", "name", "message"), [
    (None, "rows.jsonl", "no such file"), ("x", "rows.txt", "found suffix '.txt'"), ("", "rows.jsonl", "rows.jsonl"), ("{", "rows.jsonl", "cannot be read"),
    ('{"a": 1}', "rows.jsonl", r"row 1: found keys \['a'\], expected tokens, messages or text"),
    ('{"messages": [{"role": "user"}]}', "rows.jsonl", "row 1: messages"),
    ('{"tokens": [1, 900], "prompt_length": 1}', "rows.jsonl", "row 1: found token id 900, expected 0..299"),
    ('{"tokens": [1, 9], "prompt_length": 5}', "rows.jsonl", "prompt_length: found 5, expected 1..2"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "rows.jsonl", "found no row with two or more tokens"),
])
def test_bad_rows_are_one_line(tmp_path, tokenizer, content, name, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content + "\n")
    with pytest.raises(UserError, match=message):
        data.read_rows([str(file)], tokenizer, {2}, 300, 64)


def test_batches_are_deterministic_and_cover_every_row_once():
    rows = [data.Row(list(range(n % 7 + 2)), [1] * (n % 7 + 2)) for n in range(50)]
    batches = data.epoch_batches(rows, 4, 2, seed=1, epoch=3)
    assert batches == data.epoch_batches(rows, 4, 2, seed=1, epoch=3) != data.epoch_batches(rows, 4, 2, seed=1, epoch=4)
    flat = [i for b in batches for i in b]
    assert len(set(flat)) == len(flat) == 48 and all(len(b) == 8 for b in batches)


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


def test_rate_rises_and_falls_linearly():
    scales = [rate_scale(s, 10, 0.2) for s in range(10)]
    assert scales[:2] == [0.5, 1.0] and scales[-1] == 1 / 8 and all(a > b for a, b in zip(scales[2:], scales[3:]))


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
    assert log[-1]["step"] == log[-1]["total"] == 12 and log[-1]["loss"] < log[0]["loss"]


@pytest.mark.timeout(600)
def test_deepspeed_launch_with_two_processes_equals_one(folder):
    """Same global batch: two processes of 2 rows and ZeRO-2 against one process of 4 rows; rows are all of one length, so the mean of the
    processes' means is the mean of one."""
    common = [folder / "recipe.yaml", "optimization.name=adamw", "optimization.epochs=1", "head.draft_vocab_size=null"]
    one = run([sys.executable, "-m", "draftsmith.train", *common, f"output={folder}/single"], folder)
    assert one.returncode == 0, one.stderr[-2000:]
    port = distributed.free_port()
    two = run(["deepspeed", "--num_gpus", "2", "--master_port", port, "--module", "draftsmith.train", *common, "optimization.batch_rows=2",
               "engine.zero_stage=2", f"output={folder}/double"], folder)
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]
    about = json.loads((folder / "double" / "drafter" / "draftsmith.json").read_text())
    assert about["world_size"] == 2 and about["steps"] == 6
    losses = [[line["loss"] for line in log_of(folder / name)] for name in ("single", "double")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), losses
    assert losses[0][-1] < losses[0][0]


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
    write = loop.Log.write

    def killed_at_8(log, line):
        if line["step"] == 8:
            raise Killed
        write(log, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Log, "write", killed_at_8)
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
    write = loop.Log.write

    def killed_at_5(log, line):
        if line["step"] == 5:
            raise Killed
        write(log, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Log, "write", killed_at_5)
        main([*arguments, "engine.checkpoint_minutes=0"])
    first = log_of(tmp_path / "out")[0]["loss"]
    assert main([*arguments, "optimization.name=adamw", "engine.zero_stage=1"]) == 2
    assert "engine, optimization differ" in capsys.readouterr().err
    state = tmp_path / "out" / "checkpoints" / "step-4" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "world_size": 2}))
    assert main(arguments) == 0
    assert "warm start" in capsys.readouterr().out
    assert len(log_of(tmp_path / "out")) == 12 and log_of(tmp_path / "out")[0]["loss"] < first


def test_termination_saves_and_the_same_command_resumes(folder, tmp_path, monkeypatch):
    arguments = [str(folder / "recipe.yaml"), f"output={tmp_path}/out"]
    write = loop.Log.write

    def terminated_at_3(log, line):
        write(log, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Log, "write", terminated_at_3)
    assert main(arguments) == 143
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-4"]
    assert main(arguments) == 0 and len(log_of(tmp_path / "out")) == 12


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "usage"), (["none.yaml"], "none.yaml: no such recipe"), (["RECIPE", "target=/nowhere/at-all"], "/nowhere/at-all"),
    (["RECIPE", "target=bundled:targets/none"], "no such bundled model"), (["RECIPE", "engine.zero_stage=1"], "expected 0 with optimization.name muon"),
    (["RECIPE", "head.draft_vocab_size=301"], "found 301, expected at most"), (["RECIPE", "optimization.batch_rows=999"], "found 24 rows, expected at least"),
    (["RECIPE", "data.files=[none.jsonl]"], "none.jsonl: no such file"),
])
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    arguments = [str(folder / "recipe.yaml") if a == "RECIPE" else a for a in arguments]
    assert main([*arguments, *([f"output={folder}/never"] if len(arguments) > 1 else [])]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert not (folder / "never").exists()
