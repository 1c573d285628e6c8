"""Rules of the house that a machine can check."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    p for folder in ("models", "train", "eval", "launch", "recipes", "tests") for p in (ROOT / folder).rglob("*.py")
]
FLOORS = {
    "models": {"models"},
    "train": {"models", "train"},
    "eval": {"models", "eval"},
    "launch": {"models", "train", "eval", "launch", "recipes"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (
                [f"draftsmith.{alias.name}" for alias in node.names] if node.module == "draftsmith" else [node.module]
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_use_the_full_name_and_never_climb(path):
    floor = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        assert not re.match(r"^(train|models|eval|launch|recipes)\b", name), f"{path}: {name}"
        if floor in FLOORS and name.startswith("draftsmith.") and path.name != "__main__.py":
            part = name.split(".")[1]
            assert part in FLOORS[floor] | ({"recipes"} if path.parent.name == "targets" else set()), f"{path}: {name}"


def test_files_stay_rooms():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 480}
    assert not long, long


ERRORS = [
    (["eval", "/none"], "/none: no such directory"),
    (["train", "none.yaml"], "none.yaml: no such recipe"),
    (["dance"], "No such command"),
    (["regenerate", "/none", "p.jsonl", "o.jsonl"], "/none"),
    (["launch", "none.yaml", "--gpus", "2"], "none.yaml: no such recipe"),
    (["export", "/none", "out", "--to", "vllm"], "/none: no such directory"),
    (["eval"], "Missing argument"),
    (["pretrain", "none.yaml"], "no such recipe"),
]
COMMANDS = """
import json, sys
from draftsmith.launch import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["draftsmith", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        print("ended:", end.code, "transformers.modeling_utils" in sys.modules, file=sys.stderr, flush=True)
"""


def test_command_line_errors_are_one_line_and_exit_code_2(tmp_path):
    """In a process of its own, which has imported nothing that opens models when it says so: that takes seconds."""
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([arguments for arguments, _ in ERRORS])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    said = re.split(r"^ended: (\S+ \S+)\n", result.stderr, flags=re.MULTILINE)
    assert said[1::2] == ["2 False"] * len(ERRORS), result.stderr
    for (arguments, message), shown in zip(ERRORS, said[::2]):
        lines = [line for line in shown.strip().splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and message in lines[0], (arguments, shown)


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "benchmarks").glob("*.py")), ids=lambda file: file.name)
def test_a_benchmark_runs_as_its_first_lines_say(file):
    """`python tests/benchmarks/NAME.py` finds the package `tests` only where the script says where it is."""
    text = file.read_text()
    if f"python tests/benchmarks/{file.name}" in text and "\nfrom tests" in text:
        assert "sys.path.insert(0, " in text.split("\nfrom tests")[0]
