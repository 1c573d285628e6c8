"""The model card says what an engine must be told, or should not exceed."""

import json
from pathlib import Path

import pytest

from draftsmith.launch.card import drafts, model_card
from draftsmith.launch.hub import stage
from draftsmith.models.formats import layout_of, read_files, save_drafter
from tests.conftest import tiny_head

CELL = {"tree": "dynamic:10x7x60", "temperature": 0.0}


@pytest.fixture
def card(tmp_path, target):
    """The card of a drafter with this draftsmith.json."""

    def write(**about) -> str:
        stored = read_files(
            save_drafter(tiny_head(target), tmp_path / "drafter", {"target": "someone/target", **about})
        )
        return model_card("me/drafter", stored, layout_of(stored), [], {}, None)

    return write


def section(card: str, name: str) -> list[str]:
    return card.split(f"## {name}\n\n")[1].split("\n\n")[0].splitlines()


def test_what_a_drafter_was_trained_for(card):
    trained = {
        "steps": 7,
        "context": 1380,
        "temperatures": [0.0, 0.8, None],
        "template_variables": {"enable_thinking": None, "style": "short"},
    }
    assert section(card(trained=trained), "Trained for") == [
        "- drafted tokens: 7 (deeper ones were not trained)",
        "- context: rows of at most 1,380 tokens",
        "- answers of the target: greedy, sampled at T = 0.8, some with a temperature that is not recorded",
        "- variables of the chat template: `enable_thinking` left unset, `style` = short",
    ]
    plain = section(card(trained={**trained, "temperatures": [0.0], "template_variables": {}}), "Trained for")
    assert plain[2:] == ["- answers of the target: greedy", "- variables of the chat template: it has none"]
    laws = [{"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}, None]
    said = section(card(trained={**trained, "temperatures": [0.8], "laws": laws}), "Trained for")[2]
    assert said == (
        "- answers of the target: sampled at T = 0.8; with repetition penalty 1, top k 0, top p 1; some with cuts and "
        "penalties that are not recorded"
    )


def test_what_is_not_recorded_says_so(card):
    assert all(line.endswith(": not recorded") for line in section(card(steps=2248), "Trained for"))
    recipe = {"objective": {"steps": 3}, "data": {"max_length": 384}}
    assert [line.split(": ")[1] for line in section(card(recipe=recipe), "Trained for")] == [
        "3 (deeper ones were not trained)",
        "rows of at most 384 tokens",
        "not recorded",
        "not recorded",
    ]


def test_figures_of_the_run_are_words_not_dictionaries(card):
    found = card(
        settings={"seed": 0},
        trained={"steps": 2},
        measured={"tree": "chain:2", "temperature": 0.0, "drafts": "one-hot"},
        best={"tau": 2.5, "step": 1000},
        step=1000,
    )
    assert section(found, "Training") == [
        "- measured: tree chain:2, temperature 0.0, drafts one-hot",
        "- best: tau 2.5, step 1,000",
        "- step: 1,000",
    ]
    assert "num_speculative_tokens" in found and '"draft_sample_method": "probabilistic"' in found


def test_how_the_drafts_of_the_table_came_about():
    drawn = {"tree": "sampled:chain:5", "temperature": 1.0}
    assert drafts([CELL, {**CELL, "temperature": 1.0}, {**drawn, "temperature": 0.0}]).startswith(
        "Drafts were the drafter's most probable tokens (one-hot"
    )
    assert drafts([CELL, drawn]).startswith("In trees named `sampled` drafts were drawn from the drafter, else")


def test_what_an_engine_must_be_told_is_published(tmp_path, target):
    """`push` keeps it in draftsmith.json, with no path of this machine."""
    trained = {"steps": 7, "context": 64, "temperatures": [0.0], "template_variables": {"thinking": None}}
    folder = save_drafter(tiny_head(target), tmp_path / "drafter", {"target": "someone/target", "trained": trained})
    staged = stage(str(folder), "me/drafter", tmp_path / "staged", None, None, None)
    assert json.loads((staged / "draftsmith.json").read_text())["trained"] == trained
    assert "rows of at most 64 tokens" in (Path(staged) / "README.md").read_text()
