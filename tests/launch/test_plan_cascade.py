"""`draftsmith plan-cascade`: one table, a file, and one line for what is refused."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from draftsmith.launch.cli import app
from draftsmith.models.errors import UserError


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_copy_of_the_target_agrees_with_it_and_does_not_pay(folder, tmp_path):
    """The target itself as middle model: every buffer is accepted, at no smaller price; both criteria refuse it."""
    (tmp_path / "suite.jsonl").write_text(json.dumps({"prompt": "import os import os"}) + "\n")
    target, same = folder / "target", tmp_path / "copy"
    shutil.copytree(target, same)
    found = run(
        "plan-cascade", target, "skip:2", same, "--suite", tmp_path / "suite.jsonl", "--max-new-tokens", 30,
        "--output", tmp_path / "out", "--drafter", "lookup",
    )  # fmt: skip
    assert found.exit_code == 0 and "recommended: " in found.output, found.output
    document = json.loads((tmp_path / "out" / "cascade.json").read_text())
    rows = {row["chain"]: row for row in document["rows"]}
    assert {"no middle model", "skip:2", str(same)} <= set(rows)
    copy = rows[str(same)]
    assert copy["agreement"] == 1 and not copy["paper"]
    assert rows["skip:2"]["agreement"] < 1 and rows["no middle model"]["tau"] >= 1
    assert set(document["agreement"]) == {f"{target} | skip:2", f"skip:2 | {same}", f"{target} | {same}"}


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="plan-cascade: found skip:2, skip:2, expected each candidate once"):
        run("plan-cascade", folder / "target", "skip:2", "skip:2", "--output", tmp_path)
