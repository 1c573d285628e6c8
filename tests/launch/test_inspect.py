"""`draftsmith inspect` warns of what data should not have, and `--template-arg` reaches every command."""

import io
import json
import re

import pytest
from rich.console import Console

from draftsmith.launch.inspect import inspect, spans
from draftsmith.launch.program import template_variables
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.errors import UserError
from draftsmith.train.recipe import DrafterRecipe, read_recipe

TALK = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "return"}]


def inspected(folder, tmp_path, records, *overrides) -> str:
    file, console = tmp_path / "rows.jsonl", Console(width=500, file=io.StringIO())
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = read_recipe(folder / "recipe.yaml", DrafterRecipe, [f"data.files=[{file}]", *overrides])
    inspect(recipe, 1, console)
    return console.file.getvalue()


def answer(text: str) -> dict:
    return {"messages": [TALK[0], TALK[1] | {"content": text}]}


@pytest.mark.parametrize(
    ("record", "warning"),
    [
        ({"text": "<|user|>add<|assistant|>return<|end|>"}, r"have markers \(<\|user\|>, <\|assistant\|>\) among what"),
        (answer("<|user|>add"), r"have markers \(<\|user\|>\) among what is supervised"),
        (answer("None"), "have None or null as the answer"),
        (answer("null\n"), "have None or null as the answer"),
        (answer("[{'type': 'text', 'text': 'a'}]"), "have the source of messages or parts"),
        (answer("[{'text': 'a', 'type': 'text'}]"), "have the source of messages or parts"),
        (answer('{"role": "user", "content": "add"}'), "have the source of messages or parts"),
        ({"messages": [TALK[0] | {"content": '[{"type": "text", "text": "a"}]'}, TALK[1]]}, "have the source of"),
        ({"text": "import os"}, "have no prompt: they are supervised from the first token to the last"),
    ],
)
def test_what_looks_wrong_is_told(folder, tmp_path, record, warning):
    said = inspected(folder, tmp_path, [{"messages": TALK}, {"messages": TALK}, record])
    assert re.search(f"warning: 1 of 3 rows {warning}", said), said
    assert "warning" not in inspected(folder, tmp_path, [{"messages": TALK}])


CALC = {"name": "calc", "parameters": {"type": "object", "properties": {"role": {"type": "string"}}}}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"type": "function", "function": CALC}]),
        '{"name": "write", "arguments": {"content": "a", "text": "b", "role": "clerk"}}',
        "{'type': 'object', 'text': 'b'}",
    ],
)
def test_functions_and_calls_in_json_look_right(folder, tmp_path, text):
    row, long = {"messages": [turn | {"content": text} for turn in TALK]}, "data.max_length=256"
    said = inspected(folder, tmp_path, [row], long, "optimization.batch_tokens=256")
    assert text[-20:] + "<|end|>" in said and "warning" not in said, said


def test_empty_answers_are_told_by_their_name(folder, tmp_path):
    said = inspected(folder, tmp_path, [{"messages": TALK}, answer(""), answer(" ")])
    assert "2 answers say nothing: they are not supervised" in said and "1 rows," in said


def test_variables_of_the_recipe_reach_the_template(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "target")
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ style | default('short') }}" + kept
        tokenizer.save_pretrained(folder / "target")
        assert "short" in inspected(folder, tmp_path, [{"messages": TALK}])
        assert "terse" in inspected(folder, tmp_path, [{"messages": TALK}], "data.chat_template_kwargs.style=terse")
        with pytest.raises(UserError, match="chat template: reads no variable stile, expected style"):
            inspected(folder, tmp_path, [{"messages": TALK}], "data.chat_template_kwargs.stile=terse")
    finally:
        tokenizer.chat_template = kept
        tokenizer.save_pretrained(folder / "target")


def test_arguments_of_templates_are_read_as_json_or_text():
    given = ["enable_thinking=false", "budget=12", "share=0.5", "style=terse", "none=null", "list=[1]", "at=2026-01-31"]
    assert template_variables([*given, "empty="]) == {
        "enable_thinking": False,
        "budget": 12,
        "share": 0.5,
        "style": "terse",
        "none": None,
        "list": [1],
        "at": "2026-01-31",
        "empty": "",
    }
    for wrong in ("style", "=terse", "a b=1"):
        with pytest.raises(UserError, match="--template-arg: found .*, expected NAME=VALUE"):
            template_variables([wrong])
    with pytest.raises(UserError, match="--template-arg: found a twice, expected each once"):
        template_variables(["a=1", "a=2"])


def test_brackets_in_what_is_told_are_no_markup(folder, tmp_path):
    """Keys and templates of Mistral's kind hold `[/INST]`, which rich would take for the end of a style."""
    rows = [{"[/x]": 1}] + [{"messages": TALK}] * 9
    assert "row 1: found keys ['[/x]']" in inspected(folder, tmp_path, rows, "data.max_bad_rows=0.5")


def test_inspect_shows_the_mask(folder):
    console = Console(record=True, width=200, file=io.StringIO())
    inspect(read_recipe(folder / "recipe.yaml", DrafterRecipe), 1, console)
    text, html = console.export_text(clear=False), console.export_html()
    assert text.startswith("24 rows") and "a draft vocabulary of 200 covers 100.00%" in text
    assert "return" in re.search(r"<span class=\"r\d\">(\s*return[^<]*)</span>", html).group(1)


def test_spans_cut_where_the_mask_changes():
    assert spans([1, 1, 0, 1]) == [(0, 2, 1), (2, 3, 0), (3, 4, 1)] and spans([0]) == [(0, 1, 0)]
