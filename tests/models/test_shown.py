"""What a chat template leaves out of a conversation is told, and nothing is supervised that nobody wrote."""

import pytest

from draftsmith.models.messages import WEIGHT
from draftsmith.models.rendering import EMPTY_ANSWER, WEIGHTLESS
from draftsmith.models.shown import ANSWER, CALLS, GIVEN, TOOLS, roles_missing
from tests import templates
from tests.models.test_rendering import END, PLAIN, of, said, shown, user
from tests.models.test_rendering import TOOLS as CALC

SILENT = PLAIN.replace("for m in messages", "for m in messages if m.role != 'system'")
STRIPS = PLAIN.replace("m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)")
TALK = [user("add"), said("os")]


def notes(tokenizer, template, messages, tools=None):
    return dict(of(tokenizer, template).encode(messages, tools, {END}).notes)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "expected"),
    [
        (PLAIN, TALK, CALC, {TOOLS: 1}),
        (templates.LLAMA3, TALK, CALC, {}),
        (PLAIN, TALK, [{"name": "calc"}], {TOOLS: 1}),
        (PLAIN, TALK, [{"type": "code_interpreter"}], {}),  # nothing to look for
        (SILENT, [{"role": "system", "content": "sys"}, *TALK], None, {GIVEN.format("system"): 1}),
        (PLAIN, [{"role": "system", "content": "sys"}, *TALK], None, {}),
        (PLAIN.replace("m.content", "m.content | trim"), [user(" add\n\n one "), said("  os ")], None, {}),
        (PLAIN, [user("add"), said("os", reasoning_content="sys")], None, {ANSWER: 1}),
        (STRIPS, [user("add"), said("<think>sys</think>os")], None, {ANSWER: 1}),
        (PLAIN, [user("add"), said("<think>sys</think>os")], None, {}),
        (templates.QWEN3 + templates.QWEN3_ASKED, [user("a"), said("os", thinking="sys")], None, {}),
        (templates.DEEPSEEK_R1, [user("a"), said("<think>\nsys</think>os")], None, {}),
        (PLAIN.replace("m.content", "m.content[:5]"), [user("add"), said("os")], None, {}),
        (PLAIN.replace("m.content", "m.content[:5]"), [user("import sys"), said("import os")], None, "both"),
    ],
)
def test_what_is_not_shown_is_told(tokenizer, template, messages, tools, expected):
    expected = {ANSWER: 1, GIVEN.format("user"): 1} if expected == "both" else expected
    assert notes(tokenizer, template, messages, tools) == expected


def test_what_the_prompt_says_is_not_the_answer(tokenizer):
    """An answer of few letters often stands in the prompt, or in a marker of the template."""
    blind = PLAIN.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else 'fox' }}")
    assert blind != PLAIN
    assert notes(tokenizer, blind, [user("import os"), said("os")])[ANSWER] == 1
    assert notes(tokenizer, PLAIN, [user("import os"), said("os")]) == {}


@pytest.mark.parametrize(
    "answer",
    [said("", reasoning_content="sys"), said("<think>sys</think>"), said("<think>sys</think> \n")],
)
def test_an_answer_of_which_nothing_is_shown_is_not_supervised(tokenizer, answer):
    """Not even its end: the target would not have ended there."""
    talk = [user("a"), answer, user("b"), said("os")]
    assert notes(tokenizer, STRIPS, talk)[EMPTY_ANSWER] == 1
    (row,) = shown(of(tokenizer, STRIPS), talk)
    assert row.count("[[") == 1 and row.endswith("[[os<|end|>]]")
    assert of(tokenizer, STRIPS).encode(talk[:2], None, {END}).rows == []


def test_answers_of_weight_0_are_context(tokenizer):
    talk = [user("a"), said("fox", **{WEIGHT: 0}), user("b"), said("os", **{WEIGHT: 1})]
    assert notes(tokenizer, PLAIN, talk) == {WEIGHTLESS: 1}
    (row,) = shown(of(tokenizer, PLAIN), talk)
    assert row.endswith("<|assistant|>fox<|end|><|user|>b<|end|><|assistant|>[[os<|end|>]]") and row.count("[[") == 1


def test_what_prompts_have_that_is_not_shown_is_counted(tokenizer):
    """The target is asked all the same: behind the result of a tool, in the role of a tool."""
    renderer = of(tokenizer, PLAIN.replace("m.content", "m.role + ': ' + m.content"))
    called = said("", tool_calls=[{"function": {"name": "calc", "arguments": {}}}])
    ids = renderer.prompt([user("6*7"), called, {"role": "tool", "content": "42"}], CALC)
    assert tokenizer.decode(ids).endswith("<|assistant|>assistant: <|end|><|user|>tool: 42<|end|><|assistant|>")
    assert renderer.passed_over() == [f"1 {CALLS}", f"1 {TOOLS}"] and renderer.passed_over() == []
    renderer.prompt([user("6*7")])
    assert renderer.passed_over() == []
    silent = of(tokenizer, SILENT)
    for _ in range(2):
        silent.prompt([{"role": "system", "content": "be terse"}, user("a")])
    assert silent.passed_over() == [f"2 {GIVEN.format('system')}"]


def test_parts_are_looked_for_one_by_one():
    """A picture stands between them in what is shown."""
    message = {"role": "user", "content": [{"text": "what is "}, {"type": "image"}, {"text": "this?"}]}
    assert roles_missing([message], "<|user|>what is <image>this?<|end|>") == set()
    assert roles_missing([message], "<|user|>what is <image><|end|>") == {"user"}
    critic = message | {"role": "critic"}
    assert roles_missing([critic, said("never looked at")], "") == {"other roles"}
