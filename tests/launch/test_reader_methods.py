"""`reader`, `reader:DRAFTER` and `reader:stand` in `eval`, `verify`, `sweep` and `generate`, with a datastore."""

import json

import pytest
from typer.testing import CliRunner

from draftsmith.launch.cli import app
from draftsmith.launch.datastore import build
from draftsmith.models.errors import UserError
from draftsmith.models.formats import save_drafter
from draftsmith.models.targets import TextTarget
from tests.conftest import tiny_head

PROMPTS = ["import os import os", "fox", "def f10(a):"]


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """A drafter, a suite, a datastore of the training rows, and one of another tokenizer."""
    place, target = tmp_path_factory.mktemp("reader"), TextTarget.load(folder / "target")
    save_drafter(tiny_head(target), place / "drafter", {"target": str(folder / "target")})
    (place / "suite.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    build([str(folder / "rows.jsonl")], str(folder / "target"), place / "store", 100, lambda line: None)
    about = json.loads((place / "store" / "datastore.json").read_text())
    (place / "other").mkdir()
    for file in (place / "store").iterdir():
        (place / "other" / file.name).write_bytes(file.read_bytes())
    (place / "other" / "datastore.json").write_text(json.dumps(about | {"vocabulary": "0" * 16}))
    return place


def run(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_verify(place, tmp_path):
    methods = ["reader", f"over={place}/drafter", f"wider=reader:{place}/drafter", "reader:stand"]
    found = run(
        "verify", *methods, "--suite", place / "suite.jsonl", "--datastore", place / "store", "--output", tmp_path,
        "--tree", "chain:2", "--tree", "dynamic:3x2x6", "--batch", 2, "--temperature", 0, "--temperature", 0.9,
        "--max-new-tokens", 12,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    document = json.loads((tmp_path / "lossless.json").read_text())
    names = {c["method"] for c in document["comparisons"]}
    assert document["lossless"] and names >= {"reader", "wider chain:2", "wider dynamic:3x2x6", "reader:stand chain:2"}


def test_eval_on_one_tree_and_by_trajectories(place, tmp_path):
    methods = [f"head={place}/drafter", f"wider=reader:{place}/drafter", "reader", "reader:stand"]
    options = (
        "--suite",
        place / "suite.jsonl",
        "--datastore",
        place / "store",
        "--max-new-tokens",
        8,
        "--tree",
        "chain:2",
    )
    assert run("eval", *methods, *options, "--output", tmp_path, "--temperature", 0).exit_code == 0
    document = json.loads((tmp_path / "result.json").read_text())
    cells = {c["method"]: c for c in document["cells"] if "speedup" in c}
    assert document["conditions"]["datastore"] == str(place / "store") and all(c["lossless"] for c in cells.values())
    assert cells["wider"]["tau"] >= cells["head"]["tau"]
    where = ("--output", tmp_path / "more", "--temperature", 1, "--trajectories", 2)
    assert run("eval", *methods, *options, *where).exit_code == 0
    document = json.loads((tmp_path / "more" / "trajectories.json").read_text())
    assert {c["method"] for c in document["cells"]} == {"plain", "head", "wider", "reader", "reader:stand"}


def test_sweep_and_generate(place, tmp_path):
    wider = f"reader:{place}/drafter"
    options = ("--datastore", place / "store", "--max-new-tokens", 8)
    where = ("--suite", place / "suite.jsonl", "--output", tmp_path, "--tree", "chain:2", "--threads", 1)
    assert run("sweep", wider, *where, *options).exit_code == 0
    assert "chain:2" in json.loads((tmp_path / "sweep.json").read_text())["trees"]
    assert run("generate", wider, PROMPTS[0], *options).exit_code == 0


@pytest.mark.parametrize(
    ("methods", "datastore", "message"),
    [
        (["stand"], "store", "expected none: none of stand retrieves"),
        (["reader"], "none", "no such directory with a datastore.json"),
        (["reader"], "other", "vocabulary 0000000000000000"),
        (["reader:suffix"], "store", "reader: found suffix behind it"),
    ],
)
def test_what_is_refused(place, folder, tmp_path, methods, datastore, message):
    with pytest.raises(UserError, match=message):
        run(
            "eval",
            *methods,
            "--target",
            folder / "target",
            "--datastore",
            place / datastore,
            "--output",
            tmp_path / "o",
        )
    assert not (tmp_path / "o").exists()


def test_trees_of_reader_are_not_tuned(place, folder):
    with pytest.raises(UserError, match="expected stand, recycling or a drafter"):
        run("tune-tree", "reader:stand", "--suite", place / "suite.jsonl", "--target", folder / "target")
    with pytest.raises(UserError, match="expected a drafter directory or reader:DRAFTER"):
        run("sweep", "reader:stand", "--target", folder / "target")
