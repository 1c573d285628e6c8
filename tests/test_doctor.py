"""What the doctor says is what is there."""

import importlib.metadata
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from draftsmith.launch import doctor
from draftsmith.models.targets import locate
from tests.hub_server import TOKEN

RECIPE = Path(locate("bundled:targets")).parent / "eagle3-code.yaml"


@pytest.fixture
def changed(tmp_path):
    """A recipe whose data is there, with changes in its sections."""
    def write(**changes):
        (tmp_path / "rows.jsonl").write_text("{}\n")
        recipe = yaml.safe_load(RECIPE.read_text())
        recipe["data"]["files"] = [str(tmp_path / "rows.jsonl")]
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                recipe[section][name] = value
            else:
                recipe[section] = value
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return tmp_path / "recipe.yaml"
    return write


def test_a_recipe_that_can_start_misses_nothing(changed):
    pytest.importorskip("deepspeed")
    assert doctor.missing(changed()) == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"data__files": ["none.jsonl"]}, "none.jsonl (draftsmith regenerate writes it)"),
    ({"target": "bundled:targets/none"}, "bundled:targets/none: no such bundled model"),
    ({"target": "nobody/nothing"}, "target nobody/nothing: not on this machine"),  # the tests run offline
    ({"target": "/none"}, "target /none: not on this machine"),
    ({"seed": "x"}, "recipe.yaml: seed: found 'x'"),
    ({"engine__config": "none.json"}, "none.json"),
])
def test_what_a_recipe_misses_is_named(changed, changes, message):
    found = doctor.missing(changed(**changes))
    assert any(message in line for line in found), found


def test_versions_are_those_of_the_packages():
    rows = {name: (found, wanted, enough) for name, found, wanted, _, enough in doctor.packages()}
    assert rows["torch"] == (importlib.metadata.version("torch"), ">=2.6", True)
    assert rows["transformers"][0] == importlib.metadata.version("transformers") and rows["transformers"][2]
    assert doctor.Findings(packages=[("torch", "2.1", ">=2.6", "everything", False)]).broken == ["torch 2.1 (expected >=2.6)"]
    assert doctor.version("no-such-package") == ""


def test_everything_fits_one_screen_and_no_token_is_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    assert doctor.doctor([], console)
    shown = console.export_text()
    assert len(shown.splitlines()) <= 44 and "signed in" in shown and TOKEN not in shown and "eagle3-code.yaml" in shown, shown
