"""Records of every kind become rows, or bad rows with a reason; nothing that a file can hold ends a run."""

import json
import random
from datetime import datetime

import pytest

from draftsmith.models.errors import UserError
from draftsmith.models.messages import messages_of, tools_of
from draftsmith.models.rendering import EMPTY_ANSWER, END_INSIDE, Renderer
from draftsmith.train import data
from draftsmith.train.records import READY_MADE, encode_record

TALK = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "return"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": '{"e": null}'}}


def read(records, tokenizer, folder, max_bad_rows=0.0, report=lambda line: None, vocab=300, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return data.prepare([str(file)], 64, max_bad_rows, tokenizer, {2}, vocab, folder / "rows", report)


def half(text: str) -> list[dict]:
    return [{"role": "user", "content": text}, TALK[1]]


BAD = {
    "half a surrogate": ({"messages": half("ok \ud800 bad")}, r"messages\[0\].content: found U\+D800, half of a surr"),
    "half a surrogate, low": ({"text": "ok \udc00"}, r"text: found U\+DC00, half of a surrogate pair"),
    "half a surrogate in tools": ({"messages": TALK, "tools": [{"name": "\ud800"}]}, r"tools\[0\].name: found U\+D800"),
    "half a surrogate in a role": ({"messages": [{"role": "\ud800", "content": "a"}]}, r"role: found U\+D800"),
    "half a surrogate in a key": ({"messages": [TALK[0] | {"\ud800": 1}, TALK[1]]}, r"found U\+D800"),
    "NUL": ({"messages": half("a\x00b")}, r"messages\[0\].content: found U\+0000, a control character"),
    "a bell": ({"text": "ring \x07"}, r"text: found U\+0007, a control character"),
    "an escape": ({"text": "\x1b[31mred"}, r"text: found U\+001B, a control character"),
    "a noncharacter": ({"text": "\ufdd0"}, r"text: found U\+FDD0, a noncharacter"),
    "a number": ({"messages": half(7)}, "found 7, expected text or a list of parts"),
    "not a number": ('{"messages": [{"role": "user", "content": NaN}, {"role": "assistant"}]}', "found nan, expected"),
    "an object": ({"messages": half({"q": 1})}, "expected text or a list of parts"),
    "a part that is no text": ({"messages": half([{"type": "image_url"}])}, "found a part of type image_url"),
    "tokens that are true": ({"tokens": [1, 3, True, 5], "prompt_length": 1}, "tokens: expected a list of integers"),
    "a token that is no number": ('{"tokens": [1, 3, NaN], "prompt_length": 1}', "tokens: expected a list of integers"),
    "a length that is true": ({"tokens": [1, 3, 5], "prompt_length": True}, "prompt_length: found True"),
    "a huge token": ({"tokens": [1, 10**30, 5], "prompt_length": 1}, r"found token id 1000\d+, expected 0\.\."),
    "a token behind the embedding": ({"tokens": [1, 3, 300], "prompt_length": 1}, "found token id 300"),
    "tokens of another tokenizer": (
        {"tokens": [1, 3, 5, 6], "prompt_length": 1, "tokenizer": "0123456789abcdef"},
        "tokenizer: found ids of the tokenizer '0123456789abcdef', expected of the target's",
    ),
    "nesting": ('{{"messages": {}1{}}}'.format("[" * 60000, "]" * 60000), "not valid JSON"),
    "nesting that JSON takes": (
        '{{"messages": [{{"role": "user", "content": "a", "x": {}1{}}}]}}'.format('{"a":' * 400, "}" * 400),
        "found no answer in it",
    ),
    "null content": ({"messages": [{"role": "user", "content": None}, TALK[1]]}, r"messages\[0\].content: missing"),
    "a call that is not shown": (
        {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        "does not show the call of calc in turn 1",
    ),
    "a call of the ShareGPT form that is no JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "calc"}]},
        "function_call: found 'calc', expected JSON with a name",
    ),
    "calls that are text": (
        {"messages": [TALK[0], TALK[1] | {"tool_calls": "calc"}]},
        r"messages\[1\].tool_calls: found 'calc', expected a list",
    ),
    "tools that are no JSON": ({"messages": TALK, "tools": "[{"}, "tools: not valid JSON"),
    "tools that are a number": ({"messages": TALK, "tools": 3}, "tools: found 3, expected a list of objects"),
    "tools of text": ({"messages": TALK, "tools": ["calc"]}, "tools: found .*, expected a list of objects"),
    "nobody answers": ({"messages": TALK[:1]}, "found no answer in it"),
    "a role that is a number": ({"messages": [{"role": 3, "content": "a"}]}, r"messages\[0\].role: found 3"),
    "side by side": ({"chosen": TALK, "rejected": TALK}, "found chosen: answers of other models"),
}


@pytest.mark.parametrize(("record", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_has_its_reason_and_ends_nothing(tmp_path, tokenizer, record, reason):
    lines, said = [{"messages": TALK}] * 9, []
    rows = read([*lines, record], tokenizer, tmp_path, 0.1, said.append)
    assert len(rows) == 9 and len(said) == 1 and "1 of 10 rows cannot be used" in said[0]
    strict = tmp_path / "strict"
    strict.mkdir()
    with pytest.raises(UserError, match=f"row 10: .*{reason}") as error:
        read([*lines, record], tokenizer, strict)
    str(error.value).encode()  # can be printed


def test_whole_surrogate_pairs_and_white_space_are_text(tmp_path, tokenizer):
    rows = read(['{"text": "ok \\ud83d\\ude00 fine"}', {"text": "a\tb\r\n\x0c c"}], tokenizer, tmp_path)
    assert tokenizer.decode(rows.row(0)[0]) == "ok 😀 fine" and len(rows) == 2


def test_nulls_are_dropped_everywhere(tokenizer):
    nulls = {"tool_calls": None, "tool_call_id": None, "name": None}
    record = {"messages": [m | nulls for m in TALK], "tools": None}
    assert messages_of(record) == TALK and tools_of(record) is None
    call = {"id": "c1", "type": None, "function": {"name": "calc", "arguments": {"e": "1", "f": None}}}
    found = messages_of({"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert found[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "function": {"name": "calc", "arguments": {"e": "1"}}}],
    }
    written = messages_of({"messages": [TALK[0], {"role": "assistant", "tool_calls": [CALL]}]})[1]["tool_calls"]
    assert written[0]["function"]["arguments"] == {"e": None}  # null in what the target wrote is its own
    assert tools_of({"tools": [{"name": "calc", "parameters": {"properties": {"e": {}, "x": None}}}]}) == [
        {"name": "calc", "parameters": {"properties": {"e": {}}}}
    ]
    for text in ('[{"name": "calc"}]', [{"name": "calc"}]):
        assert tools_of({"tools": text}) == [{"name": "calc"}]
    assert tools_of({"tools": ""}) is tools_of({"tools": []}) is tools_of({"tools": "[]"}) is None


def test_every_form_of_a_conversation_is_the_same_rows(tokenizer):
    renderer = Renderer(tokenizer)
    want = encode_record({"messages": TALK}, renderer, {2}, 300)
    for record in (
        {"conversations": TALK},
        {"conversations": [{"from": "human", "value": "add"}, {"from": "gpt", "value": "return"}]},
        {"messages": [TALK[0], TALK[1] | {"content": [{"type": "text", "text": "return"}]}]},
        {"messages": [m | {"tool_calls": None} for m in TALK]},
        {"messages": None, "conversations": TALK},
    ):
        assert encode_record(record, renderer, {2}, 300) == want
    shared = [
        {"from": "human", "value": "6*7"},
        {"from": "function_call", "value": '{"name": "calc", "arguments": {}}'},
    ]
    shared += [{"from": "observation", "value": "42"}, {"from": "gpt", "value": "It is 42."}]
    assert [m["role"] for m in messages_of({"conversations": shared})] == ["user", "assistant", "tool", "assistant"]
    assert messages_of({"conversations": shared})[1]["tool_calls"][0]["function"]["name"] == "calc"


def test_the_older_form_of_calls_and_lists_written_as_json_are_the_same(tokenizer):
    call = {"name": "calc", "arguments": '{"e": "6*7"}'}
    modern = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}]
    want = messages_of({"messages": [*modern, {"role": "tool", "content": "42"}]})
    assert want[1]["tool_calls"][0]["function"]["arguments"] == {"e": "6*7"}
    older = [TALK[0], {"role": "assistant", "content": None, "function_call": call}]
    found = messages_of({"messages": [*older, {"role": "function", "name": "calc", "content": "42"}]})
    assert [m["role"] for m in found] == [m["role"] for m in want]
    assert found[1]["tool_calls"] == want[1]["tool_calls"] and "function_call" not in found[1]
    written = [TALK[0], modern[1] | {"tool_calls": json.dumps(modern[1]["tool_calls"])}]
    assert messages_of({"messages": json.dumps(written)}) == want[:2]
    for none in ([], "", None):
        assert messages_of({"messages": [TALK[0], TALK[1] | {"tool_calls": none, "function_call": none}]}) == TALK
    function = {"name": "calc", "parameters": {}}
    for functions in ([function], json.dumps([function])):
        assert tools_of({"functions": functions}) == [{"type": "function", "function": function}]
    assert tools_of({"functions": [], "tools": [{"name": "x"}]}) == [{"name": "x"}]


def test_what_stands_beside_a_conversation(tokenizer):
    """The system's message in a column of its own; times and bytes of logs."""
    system = {"role": "system", "content": "be terse"}
    shared = [{"from": "human", "value": "add"}, {"from": "gpt", "value": "return"}]
    for key in ("system", "system_prompt"):
        for record in ({"messages": TALK}, {"conversations": shared}):
            assert messages_of(record | {key: "be terse"}) == [system, *TALK]
            assert messages_of(record | {key: " "}) == messages_of(record | {key: None}) == TALK
        assert messages_of({"messages": [{"role": "developer", "content": "x"}, *TALK], key: "be terse"})[1:] == TALK
        with pytest.raises(UserError, match=f"{key}: found 3, expected text"):
            messages_of({"messages": TALK, key: 3})
    logged = [m | {"timestamp": datetime(2026, 1, 1), "digest": b"x", "turn": 3, "score": 0.5} for m in TALK]
    assert messages_of({"messages": logged}) == [m | {"turn": 3, "score": 0.5} for m in TALK]


def test_ids_behind_the_end_of_an_answer_are_left_out(tmp_path, tokenizer):
    """Padding with the end's id, and what runs past it."""
    want = encode_record({"tokens": [1, 3, 9, 8, 2], "prompt_length": 2}, tokenizer, {2}, 300)
    assert want.rows == [([1, 3, 9, 8, 2], [0, 0, 1, 1, 1])] and not want.notes
    for more in ([2, 2, 2], [0, 0], [3, 9, 4]):
        found = encode_record({"tokens": [1, 3, 9, 8, 2, *more], "prompt_length": 2}, tokenizer, {2}, 300)
        assert found.rows == want.rows and found.notes == {END_INSIDE: 1}
    found = encode_record({"tokens": [1, 3, 2, 9, 8], "prompt_length": 2}, tokenizer, {2}, 300)
    assert found.rows == [] and found.notes == {EMPTY_ANSWER: 1}
    prompt = encode_record({"tokens": [1, 2, 2, 9, 8], "prompt_length": 3}, tokenizer, {2}, 300)
    assert prompt.rows == [([1, 2, 2, 9, 8], [0, 0, 0, 1, 1])]  # ends of turns before it are no ends of the answer


def test_answers_that_say_nothing_are_counted_by_their_name(tmp_path, tokenizer):
    said = []
    empty = [TALK[0], {"role": "assistant", "content": " "}]
    records = [{"messages": TALK}, {"messages": empty}, {"tokens": [1, 3, 9, 4, 2], "prompt_length": 4}, {"text": "\n"}]
    rows = read(records, tokenizer, tmp_path, report=said.append)
    assert len(rows) == 1 and said == rows.notes == [f"3 {EMPTY_ANSWER}"]
    with pytest.raises(
        UserError, match=r"found no row with two or more tokens.*\(data.max_length\); 3 answers say noth"
    ):
        read(records[1:], tokenizer, tmp_path)
    said.clear()
    read([{"messages": TALK}, {"text": "b"}], tokenizer, tmp_path, report=said.append)
    assert said == ["1 rows are left out: the target wrote a single token of them"]


def test_ready_made_text_has_one_first_token_and_is_told_of(tmp_path, tokenizer):
    class Adding:
        """A tokenizer that puts its first token before every text."""

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [tokenizer.bos_token_id, *ids] if add_special_tokens else ids}

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    made, said = "<|bos|><|user|>add<|end|><|assistant|>os<|end|>", []
    for text, first in ((made, [1, 3]), (made.removeprefix("<|bos|>"), [1, 3]), ("os", [1])):
        ((ids, mask),) = encode_record({"text": text}, Adding(), {2}, 300).rows
        assert ids[: len(first)] == first and ids.count(1) == 1 and all(mask)

    class Closing(Adding):
        """And its last one behind."""

        def __call__(self, text, add_special_tokens=True):
            ids = super().__call__(text, add_special_tokens)["input_ids"]
            return {"input_ids": [*ids, tokenizer.eos_token_id] if add_special_tokens else ids}

    for text in ("os<|end|>", "os", "os<|end|>\n", made.removeprefix("<|bos|>")):
        ((ids, _),) = encode_record({"text": text}, Closing(), {2}, 300).rows
        assert ids[-2:] != [2, 2] and ids[-1] == 2 and ids[0] == 1
    read([{"text": made}, {"text": "import os"}], tokenizer, tmp_path, report=said.append)
    assert said == [f"1 {READY_MADE}"]


def test_rows_say_whose_answers_they_are(tmp_path, tokenizer):
    said, row = [], {"tokens": [1, 3, 9, 8, 7], "prompt_length": 2}
    renderer = Renderer(tokenizer, target="a")
    own = row | {"target": "a", "tokenizer": renderer.fingerprint}
    assert len(read([row, own, own | {"target": "b"}], renderer, tmp_path, report=said.append)) == 3
    assert said == ["1 rows are answers of b, the target here is a"]


def test_turns_that_were_regenerated_are_one_conversation(tmp_path, tokenizer):
    row, bad = {"tokens": [1, 3, 9, 8, 7], "prompt_length": 2}, {"tokens": [1, 3], "prompt_length": 0}
    records = [row | {"row": 0, "turn": turn} for turn in range(3)]
    records += [row | {"row": 1}, bad | {"row": 2, "turn": 0}, row | {"row": 2, "turn": 1}, row | {"row": 3}]
    assert read(records, tokenizer, tmp_path, 0.5).conversations.tolist() == [0, 0, 0, 1, 2, 3]


def test_a_clock_in_the_template_is_that_of_the_run(tmp_path, tokenizer):
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ strftime_now('%f') }}" + kept
        first = data.since(Renderer(tokenizer), tmp_path)
        again = data.since(Renderer(tokenizer), tmp_path)
        assert first.clock == again.clock and first.key == again.key
        given = data.since(Renderer(tokenizer, {"strftime_now": "2000-01-01"}), tmp_path)
        assert given.clock == "2000-01-01T00:00:00"
        tokenizer.chat_template = kept
        assert data.since(Renderer(tokenizer), tmp_path / "none").clock is None and not (tmp_path / "none").exists()
    finally:
        tokenizer.chat_template = kept


def test_mutated_records_are_rows_or_reasons(tokenizer):
    """Whatever a record holds, it is encoded or refused in one line."""
    draw, renderer = random.Random(0), Renderer(tokenizer)
    values = [
        None,
        True,
        0,
        -1,
        2**70,
        1.5,
        float("nan"),
        "",
        "a",
        "\ud800",
        "\x00",
        "<|end|>",
        [],
        {},
        [[]],
        [{}],
        TALK,
    ]
    values += [[{"type": "text", "text": "a"}], [{"type": "text"}], "[", '{"a": 1}', ["a"], {"role": "user"}]
    good = [
        {"messages": TALK * 2, "tools": [{"name": "calc"}]},
        {"messages": [TALK[0], TALK[1] | {"tool_calls": [CALL]}, {"role": "tool", "content": "1"}, TALK[1]]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"tokens": [1, 3, 9, 8], "prompt_length": 2, "tokenizer": None},
        {"text": "import os"},
    ]
    outcomes = {"row": 0, "reason": 0}
    for _ in range(3000):
        record = json.loads(json.dumps(draw.choice(good)))
        for _ in range(draw.randint(0, 2)):
            place = record
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                if not keys:
                    break
                key = draw.choice(keys)
                if isinstance(place[key], (dict, list)) and draw.random() < 0.7:
                    place = place[key]
                    continue
                if draw.random() < 0.3:
                    del place[key]
                else:
                    place[key] = draw.choice(values)
                break
        try:
            for ids, mask in encode_record(record, renderer, {2}, 300).rows:
                assert len(ids) == len(mask) and all(0 <= token < 300 for token in ids)
                assert "None" not in tokenizer.decode([token for token, mark in zip(ids, mask) if mark])
            outcomes["row"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            str(error).encode()
            outcomes["reason"] += 1
    assert min(outcomes.values()) > 300, outcomes
