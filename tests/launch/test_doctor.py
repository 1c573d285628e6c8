"""What the doctor says is what is there."""

import importlib.metadata
import io
import re
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__files": ["none.jsonl"]}, "none.jsonl (draftsmith regenerate writes it)"),
        ({"target": "bundled:targets/none"}, "bundled:targets/none: no such bundled model"),
        ({"target": "nobody/nothing"}, "target nobody/nothing: not on this machine"),  # the tests run offline
        ({"target": "/none"}, "target /none: not on this machine"),
        ({"seed": "x"}, "recipe.yaml: seed: found 'x'"),
        ({"engine__config": "none.json"}, "none.json"),
    ],
)
def test_what_a_recipe_misses_is_named(changed, changes, message):
    found = doctor.missing(changed(**changes))
    assert any(message in gap.said for gap in found), found


def test_versions_are_those_of_the_packages():
    rows = {name: (found, wanted, enough) for name, found, wanted, _, enough in doctor.packages()}
    assert rows["torch"] == (importlib.metadata.version("torch"), ">=2.6", True)
    assert rows["transformers"][0] == importlib.metadata.version("transformers") and rows["transformers"][2]
    assert doctor.Findings(packages=[("torch", "2.1", ">=2.6", "everything", False)]).broken == [
        "torch 2.1 (expected >=2.6)"
    ]
    assert doctor.version("no-such-package") == ""


def screen() -> Console:
    return Console(width=120, record=True, file=io.StringIO())


def test_everything_fits_one_screen_and_no_token_is_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    console = screen()
    assert doctor.doctor([], console)
    shown = console.export_text()
    assert len(shown.splitlines()) <= 44 and "signed in" in shown and TOKEN not in shown, shown
    assert all(shown.count(f" {file.name}") == 1 for file in RECIPE.parent.glob("*.yaml")), shown


def test_forty_recipes_fit_one_screen(changed, tmp_path):
    """Eight ways of lacking something, five recipes each, with names as long as the longest that come along; every one
    is named once.
    """
    pytest.importorskip("deepspeed")
    more = [{}, {"data__files": ["none.jsonl"]}, {"target": "/none"}, {"engine__target": "sharded"}]
    ways = [*more, *({**change, "engine__dtype": "fp16"} for change in more[1:]), {"seed": "x"}]
    length = max(len(file.stem) for file in RECIPE.parent.glob("*.yaml"))
    files = [tmp_path / f"{f'{way}{copy}':x<{length}}.yaml" for way in range(len(ways)) for copy in range(5)]
    for file in files:
        changed(**ways[int(file.name[0])]).rename(file)
    found, console = doctor.examine(files), screen()
    doctor.show(found, console, doctor.in_groups(found.recipes))
    shown = console.export_text()
    assert len(files) == 40 and len(shown.splitlines()) <= 44, shown
    assert all(shown.count(f" {file.name}") == 1 for file in files), shown


def test_recipes_that_lack_the_same_kinds_of_things_share_a_row_and_the_ready_ones_come_first():
    data, target = (
        [doctor.Gap("data to regenerate", name) for name in ("a.jsonl", "b.jsonl")],
        doctor.Gap("target", "x"),
    )
    recipes = [
        ("none.yaml", [data[0], target]),
        ("a.yaml", [data[0]]),
        ("ready.yaml", []),
        ("b.yaml", [data[1], data[0]]),
        ("go.yaml", []),
    ]
    console = screen()
    console.print(doctor.in_groups(recipes))
    assert [re.split(" {2,}", line.strip()) for line in console.export_text().splitlines()[1:]] == [
        ["nothing: ready", "ready.yaml, go.yaml"],
        ["data to regenerate", "a.yaml, b.yaml"],
        ["data to regenerate, target", "none.yaml"],
    ]


def test_a_recipe_that_is_asked_for_is_told_all_it_lacks(changed):
    console = screen()
    doctor.doctor(
        [str(changed(data__files=["none.jsonl", "more.jsonl"], target="/none", engine__target="sharded"))], console
    )
    shown = " ".join(console.export_text().split())
    for said in (
        "target /none: not on this machine",
        "none.jsonl (draftsmith regenerate writes it)",
        "more.jsonl (draftsmith regenerate writes it)",
        "several GPUs (engine.target sharded)",
    ):
        assert said in shown, shown
