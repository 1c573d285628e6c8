"""Bad recipes, data and environments: one line that names file, key or row with what was found and expected, and exit
code 2.
"""

import io
import json
import sys

import pytest
from deepspeed.accelerator import get_accelerator
from rich.console import Console

from draftsmith.launch.inspect import inspect
from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.train.recipe import DrafterRecipe, read_recipe

RECIPE = [
    ([], "usage: draftsmith train RECIPE"),
    (["none.yaml"], "none.yaml: no such recipe"),
    (["RECIPE", "nonsense"], "override 'nonsense': expected section.key=value"),
    (["RECIPE", "head.nme=eagle3"], "head.nme: unknown key"),
    (["RECIPE", "seed=abc"], "seed: found 'abc'"),
    (["RECIPE", "data=3"], "data: found 3"),
    (["RECIPE", "head.name=eagle9"], "head.name: found 'eagle9'"),
    (["RECIPE", "objective.steps=0"], "objective.steps: found 0"),
    (["RECIPE", "objective.decay=1.5"], "objective.decay: found 1.5"),
    (["RECIPE", "optimization.lr=-1"], "optimization.lr: found -1"),
    (["RECIPE", "optimization.schedule=step"], "optimization.schedule: found 'step'"),
    (["RECIPE", "optimization.accumulation=0"], "optimization.accumulation: found 0"),
    (["RECIPE", "optimization.warmup=2"], "optimization.warmup: found 2"),
    (["RECIPE", "optimization.muon_lr=null"], "optimization.muon_lr: found null, expected a rate"),
    (
        ["RECIPE", "optimization.batch_tokens=10"],
        "optimization.batch_tokens: found 10, expected at least data.max_length",
    ),
    (["RECIPE", "engine.zero_stage=7"], "engine.zero_stage: found 7"),
    (["RECIPE", "engine.zero_stage=1"], "engine.zero_stage: found 1, expected 0 with optimization.name muon"),
    (["RECIPE", "engine.target=halved"], "engine.target: found 'halved'"),
    (["RECIPE", "data.files=[]"], "data.files: found []"),
    (["RECIPE", "data.max_bad_rows=1"], "data.max_bad_rows: found 1"),
    (["RECIPE", "data.features=sometimes"], "data.features: found 'sometimes'"),
    (["RECIPE", "evaluation.times=0"], "evaluation.times: found 0"),
    (["RECIPE", "evaluation.rows=4", "evaluation.tree=bush"], "tree: found 'bush', expected chain:DEPTH"),
    (["RECIPE", "target=/nowhere/at-all"], "/nowhere/at-all"),
    (["RECIPE", "target=bundled:targets/none"], "no such bundled model"),
    (["RECIPE", "head.draft_vocab_size=301"], "head.draft_vocab_size: found 301, expected at most the target's 300"),
    (
        ["RECIPE", "data.max_length=9999", "optimization.batch_tokens=9999"],
        "data.max_length: found 9999, expected at most the target's 256",
    ),
    (["RECIPE", "optimization.accumulation=999"], "found 24 rows,"),
    (["RECIPE", "head.start_from=/none"], "/none: no such directory"),
    (["RECIPE", "engine.config=none.json"], "none.json: no such file; expected a DeepSpeed JSON file"),
]

DATA = [
    (None, "rows.jsonl", "rows.jsonl: no such file"),
    ("x", "rows.txt", "found suffix '.txt', expected .jsonl, .json (either with .gz) or .parquet"),
    ("", "rows.jsonl", "found no rows, expected at least one"),
    ("{", "rows.jsonl", "row 1: not valid JSON"),
    ("[1, 2", "rows.json", "rows.json: not valid JSON"),
    ("not parquet", "rows.parquet", "rows.parquet: cannot be read"),
    ("7", "rows.jsonl", "row 1: found int, expected an object"),
    ('{"a": 1}', "rows.jsonl", "row 1: found keys ['a'], expected tokens, messages, conversations or text"),
    (
        '{"messages": [{"role": "user"}]}',
        "rows.jsonl",
        "row 1: messages[0].content: missing, expected text",
    ),
    ('{"messages": []}', "rows.jsonl", "row 1: messages: found [], expected a list of objects"),
    ('{"conversations": [{"from": "robot", "value": "x"}]}', "rows.jsonl", "row 1: conversations: expected"),
    (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "rows.jsonl",
        "row 1: found no answer in it, expected a turn of the assistant",
    ),
    ('{"tokens": [1, 900], "prompt_length": 1}', "rows.jsonl", "row 1: found token id 900, expected 0..299"),
    ('{"tokens": [1, 9], "prompt_length": 5}', "rows.jsonl", "row 1: prompt_length: found 5, expected 1..2"),
    ('{"tokens": "abc", "prompt_length": 5}', "rows.jsonl", "row 1: tokens: expected a list of integers"),
    (
        '{"tokens": [1, 9], "prompt_length": 1}',
        "rows.jsonl",
        "found no row with two or more tokens written by the target within 64 tokens",
    ),
]


def refused(capsys, arguments) -> str:
    """Runs the program; its last line of errors, which must be the only one that says error."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(("arguments", "message"), RECIPE, ids=[" ".join(a) or "nothing" for a, _ in RECIPE])
def test_bad_recipes(folder, tmp_path, capsys, arguments, message):
    arguments = [str(folder / "recipe.yaml") if a == "RECIPE" else a for a in arguments]
    assert message in refused(capsys, [*arguments, *([f"output={tmp_path}/never"] if len(arguments) > 1 else [])])
    assert not (tmp_path / "never" / "drafter").exists() and not (tmp_path / "never" / "log.jsonl").exists()


@pytest.mark.parametrize("command", ["train", "--dry-run", "--dry-run without files", "inspect"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=257", "data.max_length: found 257, expected at most the target's 256"),
        ("head.draft_vocab_size=301", "head.draft_vocab_size: found 301, expected at most the target's 300"),
    ],
)
def test_what_the_target_cannot_take_is_refused_before_rows_are_read(
    folder, tmp_path, capsys, override, message, command
):
    """The only row is bad: whoever reads it first says so."""
    file = tmp_path / "rows.jsonl"
    if command != "--dry-run without files":
        file.write_text("{")
    arguments = [str(folder / "recipe.yaml"), f"data.files=[{file}]", override, "optimization.batch_tokens=300"]
    if command == "inspect":
        with pytest.raises(UserError, match=message):
            inspect(read_recipe(arguments[0], DrafterRecipe, arguments[1:]), 1, Console(file=io.StringIO()))
        return
    dry = ["--dry-run"] if command.startswith("--dry-run") else []
    assert message in refused(capsys, [*arguments, f"output={tmp_path}/never", *dry])
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(("content", "name", "message"), DATA, ids=[m[-40:] for _, _, m in DATA])
def test_bad_data(folder, tmp_path, capsys, content, name, message):
    if content is not None:
        (tmp_path / name).write_text(content + "\n")
    assert message in refused(
        capsys, [str(folder / "recipe.yaml"), f"data.files=[{tmp_path}/{name}]", f"output={tmp_path}/never"]
    )
    assert not list((tmp_path / "never" / "rows").glob("*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1", "found list, expected a mapping"), ("seed: 0", "target: missing")],
)
def test_bad_recipe_files(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in refused(capsys, [str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"optimizer": {}}', "found optimizer, expected only what the recipe does not decide"),
        ('{"zero_optimization": {"stage": 2}}', "found zero_optimization.stage"),
    ],
)
def test_bad_engine_files(folder, tmp_path, capsys, text, message):
    (tmp_path / "engine.json").write_text(text)
    assert message in refused(
        capsys, [str(folder / "recipe.yaml"), f"engine.config={tmp_path}/engine.json", f"output={tmp_path}/never"]
    )


def test_half_precision_where_the_accelerator_has_none(folder, tmp_path, capsys, monkeypatch):
    accelerator = get_accelerator()  # of DeepSpeed, for which some CPUs have it
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
    arguments = [str(folder / "recipe.yaml"), "engine.dtype=fp16", f"output={tmp_path}/never"]
    assert "engine.dtype: found fp16, which cpu does not support; expected fp32 or bf16" in refused(capsys, arguments)


def test_a_drafter_of_another_recipe_is_not_overwritten(folder, tmp_path, capsys):
    arguments = [str(folder / "recipe.yaml"), f"output={tmp_path}/out", "optimization.epochs=1"]
    assert main(arguments) == 0
    before = (tmp_path / "out" / "drafter" / "model.safetensors").read_bytes()
    assert main(arguments) == 0 and "is there already" in capsys.readouterr().out
    assert "was trained by another recipe or on other rows (seed differ)" in refused(capsys, [*arguments, "seed=9"])
    assert (tmp_path / "out" / "drafter" / "model.safetensors").read_bytes() == before


def test_a_drafter_to_start_from_must_fit(folder, tmp_path, capsys):
    arguments = [str(folder / "recipe.yaml"), "optimization.epochs=1"]
    assert main([*arguments, f"output={tmp_path}/first"]) == 0
    start = f"head.start_from={tmp_path}/first/drafter"
    assert "head.draft_vocab_size: found 100, expected 200" in refused(
        capsys, [*arguments, start, "head.draft_vocab_size=100", f"output={tmp_path}/n"]
    )
    assert main([*arguments, start, f"output={tmp_path}/second"]) == 0
    losses = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["loss"] for name in ("first", "second")
    ]
    assert losses[1] < losses[0]


def test_weights_that_stay_not_finite_end_the_run(folder, tmp_path, capsys):
    arguments = [
        str(folder / "recipe.yaml"),
        f"output={tmp_path}/out",
        "optimization.lr=1.0e+30",
        "optimization.muon_lr=1.0e+30",
        "optimization.epochs=9",
    ]
    assert "gradients that are not finite in 20 steps in a row" in refused(capsys, arguments)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped"] == 20


def test_an_output_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in refused(capsys, [str(folder / "recipe.yaml"), f"output={tmp_path}/file/out"])


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("deepspeed", [], "training needs the package deepspeed, found none"),
        ("wandb", ["wandb=project"], "but the package wandb is not installed"),
        ("datasets", ["data.files=[rows.parquet]"], "needs the package datasets, found none"),
    ],
)
def test_missing_packages(folder, tmp_path, monkeypatch, capsys, missing, arguments, message):
    """An environment without the package: importing it raises ImportError. (tests/launch/test_program.py hides all
    packages from a process of its own.)
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").write_text("")
    monkeypatch.setitem(sys.modules, missing, None)
    assert message in refused(capsys, [str(folder / "recipe.yaml"), *arguments, f"output={tmp_path}/never"])
