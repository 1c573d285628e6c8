"""What is supervised is what the target would write behind its real prompt, whatever a chat template does."""

import copy
import json
import re
import time
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby

import pytest
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.rendering import EMPTY_ANSWER, END_INSIDE, Renderer
from draftsmith.models.shown import CALLS
from tests import templates
from tests.conftest import tiny_target

END = 2  # <|end|>
NOW = datetime(2026, 1, 31, 9, 30)
PLAIN = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}"
    "{{ m.content }}{{ '<|end|>' }}{% endfor %}" + templates.ASKED
)
TOOLS = [{"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": '{"e": "6*7"}'}}


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def of(tokenizer, template, **variables) -> Renderer:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return Renderer(tokenizer, variables, NOW)


def shown(renderer, messages, tools=None) -> list[str]:
    """Rows with what is supervised in [[ ]]."""
    rows = []
    for ids, mask in renderer.encode(messages, tools, {END}).rows:
        runs = groupby(zip(ids, mask), key=lambda pair: pair[1])
        texts = [(mark, renderer.tokenizer.decode([token for token, _ in run])) for mark, run in runs]
        rows.append("".join(f"[[{text}]]" if mark else text for mark, text in texts))
    return rows


# ------------------------------------------------------------------------------------------------- the matrix


@pytest.fixture(scope="module")
def target():
    return tiny_target(vocab=300)


def decoded(target, tokenizer, prompt: list[int], count: int) -> str:
    """The words that a model writes greedily; ids that encoding the text again would not give are left out, and so are
    those that are no words: nobody could compare them with what a record holds.
    """
    ids = []
    for number in range(count):
        word = re.compile(" ?[a-z]+" if number else "[a-z]+")
        with torch.no_grad():
            order = target.model(torch.tensor([[*prompt, *ids]])).logits[0, -1].argsort(descending=True).tolist()
        ids.append(
            next(
                token
                for token in order
                if word.fullmatch(tokenizer.decode([token]))
                and tokenizer(tokenizer.decode([*ids, token]), add_special_tokens=False)["input_ids"] == [*ids, token]
            )
        )
    return tokenizer.decode(ids)


@dataclass(frozen=True)
class Behaviour:
    """A template, its variables, and how the target writes an answer: raw text with {thought} and {answer}. parts: the
    record keeps thought and answer apart, not the raw text.
    """

    template: str
    raw: str = "{answer}"
    parts: bool = False
    variables: tuple = ()
    tools: bool = False
    rows: int = 1  # of a conversation of three answers


MATRIX = {
    "Llama 3": Behaviour(templates.LLAMA3),
    "Llama 3 with tools": Behaviour(templates.LLAMA3, tools=True),
    "Qwen3 thinks": Behaviour(
        templates.QWEN3 + templates.QWEN3_ASKED, "<think>\n{thought}\n</think>\n\n{answer}", rows=3
    ),
    "Qwen3 thinks, in parts": Behaviour(
        templates.QWEN3 + templates.QWEN3_ASKED, "<think>\n{thought}\n</think>\n\n{answer}", parts=True, rows=3
    ),
    "Qwen3 without": Behaviour(
        templates.QWEN3 + templates.QWEN3_ASKED, variables=(("enable_thinking", False),), rows=3
    ),
    "Qwen3.5 thinks": Behaviour(templates.QWEN3 + templates.QWEN35_ASKED, "{thought}\n</think>\n\n{answer}", rows=3),
    "Qwen3.5 thinks, in parts": Behaviour(
        templates.QWEN3 + templates.QWEN35_ASKED, "{thought}\n</think>\n\n{answer}", parts=True, rows=3
    ),
    "Qwen3.5 without": Behaviour(
        templates.QWEN3 + templates.QWEN35_ASKED, variables=(("enable_thinking", False),), rows=3
    ),
    "gpt-oss": Behaviour(
        templates.GPT_OSS,
        "<|channel|>analysis<|message|>{thought}<|close|><|assistant|><|channel|>final<|message|>{answer}",
        parts=True,
        rows=3,
    ),
    "gpt-oss without analysis": Behaviour(templates.GPT_OSS, "<|channel|>final<|message|>{answer}", True, rows=3),
    "Gemma 3": Behaviour(templates.GEMMA3),
    "Mistral": Behaviour(templates.MISTRAL, " {answer}"),
    "Mistral with tools": Behaviour(templates.MISTRAL, " {answer}", tools=True, rows=3),
    "SmolLM2": Behaviour(templates.SMOLLM2),
    "DeepSeek-R1": Behaviour(templates.DEEPSEEK_R1, "{thought}\n</think>\n\n{answer}", rows=3),
}


@pytest.mark.parametrize("kind", MATRIX.values(), ids=MATRIX)
def test_what_is_supervised_is_what_the_target_writes_behind_its_prompt(tokenizer, target, kind):
    renderer = of(tokenizer, kind.template, **dict(kind.variables))
    tools, messages, turns = TOOLS if kind.tools else None, [], []
    for question in ("add", "the quick fox", "import sys"):
        messages.append(user(question))
        prompt = renderer.prompt(messages, tools)
        thought, answer = (decoded(target, tokenizer, [*prompt, seed], 4) for seed in (7, 8))
        thinks = "{thought}" in kind.raw
        raw = kind.raw.format(thought=thought, answer=answer)
        written = [*tokenizer(raw, add_special_tokens=False)["input_ids"], END]
        turns.append((prompt, written))
        own = said(answer, **({"reasoning_content": thought} if thinks else {}))
        messages.append(own if kind.parts else said(raw.removeprefix(" ")))
    found = renderer.encode(messages, tools, {END})
    assert len(found.rows) == kind.rows and not found.notes
    supervised = []
    for ids, mask in found.rows:
        at = 0
        for mark, run in groupby(mask):
            length = len(list(run))
            if mark:
                supervised.append((ids[:at], ids[at : at + length]))
            at += length
    assert supervised == turns


def test_a_call_is_supervised_and_its_result_is_not(tokenizer):
    talk = [user("6*7"), said(None, tool_calls=[CALL]), {"role": "tool", "tool_call_id": "c1", "content": "42"}]
    talk = [m if m["content"] is not None else m | {"content": ""} for m in [*talk, said("It is 42.")]]
    parsed = json.loads(json.dumps(talk).replace('"{\\"e\\": \\"6*7\\"}"', '{"e": "6*7"}'))
    assert parsed != talk
    for messages in (talk, parsed):
        first = shown(of(tokenizer, templates.MISTRAL), messages, TOOLS)[0]
        assert '[INST]6*7[/INST][[[CALLS]calc{"e": "6*7"}<|end|>]]' in first
    last = shown(of(tokenizer, templates.LLAMA3), parsed, TOOLS)[-1]
    assert last.startswith("<|bos|>31 Jan 2026<|user|>user\n\n[{") and last.endswith(
        '<|assistant|>[[{"name": "calc", "parameters": {"e": "6*7"}}<|end|>]]<|user|>tool\n\n42<|end|><|assistant|>'
        "[[It is 42.<|end|>]]"
    )
    with pytest.raises(UserError, match="chat template: does not show the call of calc in turn 1"):
        shown(of(tokenizer, PLAIN), parsed)


def test_a_call_without_a_name_is_missed_as_well(tokenizer):
    nameless = CALL | {"function": CALL["function"] | {"name": ""}}
    talk, renderer = [user("6*7"), said("os", tool_calls=[nameless]), user("b")], of(tokenizer, PLAIN)
    with pytest.raises(UserError, match="chat template: does not show the call of  in turn 1"):
        renderer.encode(talk[:2], None, {2})
    renderer.prompt(talk)
    assert renderer.passed_over() == [f"1 {CALLS}"]


# ---------------------------------------------------------------------------------- templates that put something


@pytest.mark.parametrize(
    "block",
    [
        "<think>\n\n</think>\n\n",
        "<think></think>",
        "<|thought|><|/thought|>\n",
        "[THINK][/THINK]",
        "<reason>\n</reason>",
    ],
)
def test_an_empty_block_that_a_template_puts_before_answers_is_given(tokenizer, block):
    template = PLAIN.replace("{{ m.content }}", f"{{{{ ({block!r} if m.role == 'assistant' else '') + m.content }}}}")
    renderer = of(tokenizer, template)
    assert shown(renderer, [user("add"), said("return")]) == [
        f"<|bos|><|user|>add<|end|><|assistant|>{block}[[return<|end|>]]"
    ]
    # what the target wrote itself is its own, and so is what every answer must begin with
    own = of(tokenizer, PLAIN)
    assert shown(own, [user("add"), said(f"{block}return")])[0].endswith(f"<|assistant|>[[{block}return<|end|>]]")
    channel = of(tokenizer, templates.GPT_OSS)
    assert shown(channel, [user("add"), said("os")])[0].endswith("[[<|channel|>final<|message|>os<|end|>]]")


def test_an_empty_block_by_what_the_template_shows_of_reasoning(tokenizer):
    """No tags that anybody could know."""
    template = PLAIN.replace(
        "{{ m.content }}",
        "{{ ('((' + (m.reasoning_content or '') + '))' if m.role == 'assistant' else '') + m.content }}",
    )
    renderer = of(tokenizer, template)
    assert shown(renderer, [user("a"), said("os")])[0].endswith("<|assistant|>(())[[os<|end|>]]")
    assert shown(renderer, [user("a"), said("os", reasoning="sys")])[0].endswith("[[((sys))os<|end|>]]")


def test_a_prompt_that_opens_a_thought_wants_one_in_the_answer(tokenizer):
    renderer = of(tokenizer, templates.DEEPSEEK_R1)
    for raw in ("sys</think>os", "<think>\nsys</think>os", "<think>sys</think>os"):
        assert shown(renderer, [user("a"), said(raw)]) == [
            "<|bos|><|user|>a<|assistant|><think>\n[[sys</think>os<|end|>]]"
        ]
    for answer in (said("os"), said("os", reasoning_content="sys")):
        with pytest.raises(UserError, match=r"turn 1: found an answer without </think>.*`draftsmith regenerate`"):
            shown(renderer, [user("a"), answer])
    with pytest.raises(UserError, match="turn 1: found an answer without </think>"):  # one that shows all it gets
        shown(of(tokenizer, PLAIN.replace("'<|assistant|>'", "'<|assistant|><think>'")), [user("a"), said("os")])


@pytest.mark.parametrize("blank", [" ", "\n", "  ", "\n\n"])
@pytest.mark.parametrize("lead", ["", " ", "  ", "\n", "\n\n"])
def test_prompt_ids_then_answer_ids_where_both_would_merge(tokenizer, blank, lead):
    template = PLAIN.replace("'<|assistant|>'", repr(f"Answer:{blank}"))
    renderer = of(tokenizer, template)
    messages = [user("add"), said(f"{lead}return os")]
    prompt = renderer.prompt(messages[:1])
    ((ids, mask),) = renderer.encode(messages, None, {END}).rows
    assert ids[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids[len(prompt) :]) == f"{lead}return os<|end|>"


# -------------------------------------------------------------------------------------------- conversations


def test_leading_answers_are_context(tokenizer):
    renderer = of(tokenizer, PLAIN)
    talk = [said("Ask me."), user("add"), said("os")]
    for lead in ([], [{"role": "system", "content": "sys"}]):
        (row,) = shown(renderer, [*lead, *talk])
        assert row.endswith("<|assistant|>Ask me.<|end|><|user|>add<|end|><|assistant|>[[os<|end|>]]")
    for talk in ([said("Ask me.")], [user("add")], [said("a"), user("b")]):
        with pytest.raises(UserError, match="found no answer in it"):
            shown(renderer, talk)


def test_answers_that_say_nothing_are_counted_and_those_with_an_end_inside_are_cut(tokenizer):
    renderer = of(tokenizer, PLAIN)
    for nothing in ("", "  ", "\n"):
        found = renderer.encode([user("a"), said(nothing)], None, {END})
        assert found.rows == [] and found.notes == {EMPTY_ANSWER: 1}
    found = renderer.encode([user("a"), said(""), user("b"), said("os")], None, {END})
    assert len(found.rows) == 1 and found.notes == {EMPTY_ANSWER: 1}
    inside = [user("a"), said("The <|end|> ends."), user("b"), said("os")]
    assert renderer.encode(inside, None, {END}).notes == {END_INSIDE: 1}
    assert shown(renderer, inside) == [
        "<|bos|><|user|>a<|end|><|assistant|>[[The <|end|>]] ends.<|end|><|user|>b<|end|><|assistant|>[[os<|end|>]]"
    ]


def test_parts_of_text_are_joined_and_others_named(tokenizer):
    renderer = of(tokenizer, PLAIN)
    parts = [{"type": "text", "text": "return a"}, {"type": "text", "text": " + b"}]
    whole = shown(renderer, [user("add"), said("return a + b")])
    assert shown(renderer, [user([{"type": "text", "text": "add"}]), said(parts)]) == whole
    for content, words in (
        ([{"type": "image_url", "image_url": {"url": "x"}}], "a part of type image_url"),
        ([{"type": "input_audio"}], "a part of type input_audio"),
        ([{"type": "text"}], "a part of type text"),
        (7, "found 7, expected text or a list of parts"),
        ({"q": "a"}, "expected text or a list of parts"),
        (["a"], "expected text or a list of parts"),
    ):
        with pytest.raises(UserError, match=words):
            shown(renderer, [user(content), said("os")])
        with pytest.raises(UserError, match=words):
            renderer.prompt([user(content)])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ '<|end|>' }}"
        "{% endgeneration %}{% else %}{{ '<|user|>' + m.content + '<|end|><|assistant|>' }}{% endif %}{% endfor %}",
        "{{ '<|bos|>' }}{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{ '<|assistant|>' }}"
        "{%- generation -%}{{ m.content }}{%- endgeneration -%}{{ '<|end|>' }}"
        "{%- else -%}{{ '<|user|>' + m.content + '<|end|>' }}{%- endif -%}{%- endfor -%}" + templates.ASKED,
        "{{ '<|bos|>' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
        "{{ m.content }}{{ '<|end|>' }}{% endgeneration %}"
        "{% else %}{{ '<|user|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}",
    ],
    ids=["at the beginning", "stripped, without the end", "no generation prompt"],
)
def test_generation_blocks_of_every_kind_mark_answers_alone(tokenizer, template):
    renderer = of(tokenizer, template)
    talk = [said("k"), user("add"), said("os"), user("fox"), said("s")]
    (row,) = shown(renderer, talk)
    assert re.findall(r"\[\[(.*?)\]\]", row) == ["os<|end|>", "s<|end|>"]


# ---------------------------------------------------------------------------------- variables, tools, the clock


def test_variables_reach_the_template_and_unknown_ones_are_refused(tokenizer):
    template = templates.QWEN3 + templates.QWEN3_ASKED
    without = of(tokenizer, template, enable_thinking=False)
    assert tokenizer.decode(without.prompt([user("a")])).endswith("<|assistant|><think>\n\n</think>\n\n")
    assert without.told() == {"enable_thinking": False} and of(tokenizer, template).told() == {"enable_thinking": None}
    assert without.key != of(tokenizer, template).key
    with pytest.raises(UserError, match="chat template: reads no variable enable_thinkng, expected enable_thinking"):
        of(tokenizer, template, enable_thinkng=False)


def test_the_clock_is_read_once_or_given(tokenizer):
    template = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}" + PLAIN
    renderer = of(tokenizer, template)
    talk = [user("a"), said("os"), user("b"), said("sys")]
    (row,) = shown(renderer, talk)
    assert row.startswith("2026-01-31 09:30:00<|bos|>") and renderer.clock == "2026-01-31T09:30:00"
    given = of(tokenizer, template, strftime_now="1999-12-31")
    assert shown(given, talk)[0].startswith("1999-12-31 00:00:00") and given.key != renderer.key
    assert given.at(renderer.clock) is given
    assert renderer.at(given.clock).prompt([user("a")]) == given.prompt([user("a")])
    assert of(tokenizer, PLAIN).clock is None and of(tokenizer, PLAIN).key == Renderer(of(tokenizer, PLAIN).reader).key
    with pytest.raises(UserError, match="strftime_now: found 'soon', expected a date"):
        of(tokenizer, template, strftime_now="soon")


def test_ids_behind_the_embedding_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"found token id 3 \('<\|user\|>'\), expected 0..2"):
        Renderer(of(tokenizer, PLAIN).reader, vocab_size=3).prompt([user("a")])


@pytest.mark.parametrize("template", [PLAIN, templates.SMOLLM2])
def test_the_time_of_a_conversation_grows_with_its_length_alone(tokenizer, template):
    renderer = of(tokenizer, template)
    talk = [m for number in range(200) for m in (user(f"What is shown, {number}?"), said(f"a red square {number}"))]
    encoded = []
    renderer.tokenizer = Counting(renderer.tokenizer, encoded)
    renderer.reader = renderer.tokenizer
    started = time.time()
    ((ids, mask),) = renderer.encode(talk, None, {END}).rows
    assert sum(encoded) < 6 * len(renderer.tokenizer.decode(ids)) and time.time() - started < 30
    assert sum(b > a for a, b in zip([0, *mask], mask)) == 200


class Counting:
    """A tokenizer that notes how many characters it is given."""

    def __init__(self, tokenizer, encoded: list[int]):
        self.tokenizer, self.encoded = tokenizer, encoded

    def __call__(self, text, **options):
        self.encoded.append(len(text))
        return self.tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)
