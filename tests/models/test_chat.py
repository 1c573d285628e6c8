"""What a chat template reads besides the conversation."""

import json
from types import SimpleNamespace

import pytest

from draftsmith.models.chat import load_tokenizer
from draftsmith.models.errors import UserError
from draftsmith.models.rendering import Renderer

TURNS = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (TURNS + "{% if add_generation_prompt %}{{ bos_token }}{% endif %}", []),
        (TURNS + "{% if enable_thinking is defined and enable_thinking is false %}x{% endif %}", ["enable_thinking"]),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% if tools %}{{ i }}{% endif %}{% endfor %}", []),
        (
            "{% if not date %}{% set date = strftime_now('%d') %}{% endif %}{{ date }}"
            "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}"
            "{%- generation -%}{{ m.content }}{% endgeneration %}{% endfor %}{{ effort | default('low') }}",
            ["date", "effort"],
        ),
        ({"default": TURNS + "{{ style }}", "rag": "{{ citations }}"}, ["style"]),
        (None, []),
    ],
)
def test_the_variables_of_a_chat_template(template, names):
    told = Renderer(SimpleNamespace(chat_template=template)).told()
    assert {name: value for name, value in told.items() if name != "strftime_now"} == dict.fromkeys(names)


def test_a_broken_template_is_one_line():
    with pytest.raises(UserError, match="chat template: "):
        Renderer(SimpleNamespace(chat_template="{% if %}")).told()


def test_the_tests_own_tokenizer_has_none(tokenizer):
    assert Renderer(tokenizer).told() == {}


@pytest.mark.parametrize("dropout", [0.5, 0.001, 1.0])
def test_a_tokenizer_that_cuts_at_random_is_refused(tokenizer, tmp_path, dropout):
    """Byte pair dropout: no text would have the same ids twice."""
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text())
    assert stored["model"]["type"] == "BPE" and not stored["model"]["dropout"]
    assert load_tokenizer(tmp_path)("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    stored["model"]["dropout"] = dropout
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=f"found model.dropout {dropout:g} in tokenizer.json, expected none"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_leaves_texts_out_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["post_processor"] = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="found no ids for the text 'a', expected some"):
        load_tokenizer(tmp_path)
