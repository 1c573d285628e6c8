"""Suites: every file format gives the conversations it holds, and later turns follow the target's own answers."""

import gzip
import json
import os
from pathlib import Path

import pytest

from draftsmith.eval.measurement.prompts import all_turns, read_prompts
from draftsmith.eval.measurement.suites import read_suite
from draftsmith.models.errors import UserError
from draftsmith.train.reference.pretrain import train_tokenizer

SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = {
    "messages with an answer": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [],
        ["a"],
    ),
    "messages in the middle": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        [],
        ["a", "c"],
    ),
    "one turn of messages": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "turn": 2,
        },
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        ["c"],
    ),
    "Spec-Bench": ({"question_id": 81, "category": "writing", "turns": ["a", "b"]}, [], ["a", "b"]),
    "EAGLE": ({"question_id": 0, "category": "", "turns": ["a"], "reference": ["x"]}, [], ["a"]),
    "HumanEval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""},
        [],
        ["def f():\n"],
    ),
    "GSM8K": ({"question": "how many?", "answer": "#### 4"}, [], ["how many?"]),
    "Alpaca": ({"instruction": "add", "input": "1 2", "output": "3"}, [], ["add\n\n1 2"]),
    "Alpaca without input": ({"instruction": "add", "input": "", "output": "3"}, [], ["add"]),
    "a system's message beside": (
        {"system_prompt": "be terse", "question": "how many?", "response": "4"},
        [{"role": "system", "content": "be terse"}],
        ["how many?"],
    ),
    "a system's message beside turns": (
        {"system": "be terse", "turns": ["a", "b"]},
        [{"role": "system", "content": "be terse"}],
        ["a", "b"],
    ),
    "CNN/DM": ({"article": "news", "highlights": "n", "id": "f0"}, [], ["Summarize: news"]),
    "Chatbot Arena": ({"question_id": "q", "conversation_a": SAID, "conversation_b": SAID}, [], ["a"]),
    "WildChat": ({"conversation": [*SAID, *SAID], "language": "English", "turn": 2}, [], ["a", "a"]),
    "preferences with messages as prompt": ({"prompt": SAID[:1], "chosen": SAID[1:], "rejected": SAID[1:]}, [], ["a"]),
    "preferences without a prompt": ({"chosen": SAID, "rejected": SAID}, [], ["a"]),
}


def texts(turns: list[list[dict]]) -> list[str]:
    """What the user says in turns of one message."""
    assert all(len(turn) == 1 and turn[0]["role"] == "user" for turn in turns)
    return [turn[0]["content"] for turn in turns]


def write(path: Path, rows: list) -> Path:
    """In the form that the name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else lines)
    return path


@pytest.mark.parametrize("key", ["conversation", "conversation_a", "prompt"])
def test_what_is_no_conversation_is_named_by_its_key(tmp_path, key):
    write(tmp_path / "a.jsonl", [{key: [{"role": "user"}]}])
    with pytest.raises(UserError, match=rf"a.jsonl row 1: {key}\[0\].content: missing, expected text"):
        read_suite(tmp_path / "a.jsonl")


def test_marks_and_blank_lines_before_rows_do_not_count(tmp_path):
    bom, rows = b"\xef\xbb\xbf", [b'{"prompt": "a"}\r\n', b'{"prompt": "b"}\n']
    for name, content in {
        "a.jsonl": bom + b"\n" + rows[0] + bom + rows[1],
        "a.json": bom + b"\n [" + b",".join(rows) + b"]",
        "a.jsonl.gz": gzip.compress(b"\n" + bom + b"".join(rows)),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [texts(c.turns) for c in read_suite(tmp_path / name)] == [["a"], ["b"]], name


@pytest.mark.parametrize("form", ["jsonl", "json", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(("row", "before", "turns"), ROWS.values(), ids=ROWS)
def test_every_format_in_every_form(tmp_path, row, before, turns, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    found = read_suite(write(tmp_path / f"suite.{form}", [row, row]))
    assert [(c.row, c.before, texts(c.turns)) for c in found] == [(1, before, turns), (2, before, turns)]
    assert len(read_suite(tmp_path / f"suite.{form}", 1)) == 1


def test_names_and_categories(tmp_path):
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["a"]},
        {"task_id": "HumanEval/0", "prompt": "a"},
        {"question": "a"},
    ]
    assert [(c.name, c.category) for c in read_suite(write(tmp_path / "s.jsonl", rows))] == [
        ("81", "writing"),
        ("HumanEval/0", ""),
        ("3", ""),
    ]


def test_a_turn_follows_the_targets_own_answer(tmp_path):
    tokenizer = train_tokenizer(["a b c"], 280)
    file = write(
        tmp_path / "s.jsonl", [{"question_id": "x", "turns": ["a", "b", "c"]}, {"question_id": "y", "turns": ["d"]}]
    )
    asked = []

    def answer(prompts):
        asked.append([p.name for p in prompts])
        return [f"<{p.messages[-1]['content']}>" for p in prompts]

    prompts = {p.name: p for p in all_turns(read_suite(file), tokenizer, file, answer)}
    assert list(prompts) == ["x", "y", "x/2", "x/3"] and asked == [["x"], ["x/2"]]
    assert [m["content"] for m in prompts["x/3"].messages] == ["a", "<a>", "b", "<b>", "c"]
    assert (
        tokenizer.decode(prompts["x/2"].tokens)
        == "<|bos|><|user|>a<|end|><|assistant|><a><|end|><|user|>b<|end|><|assistant|>"
    )
    assert [p.name for p in read_prompts(file, tokenizer)] == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no prompts, expected at least one"),
        ("{", "row 1: not valid JSON"),
        ("3", "row 1: found int, expected messages, conversations, turns"),
        (
            '{"x": 1}',
            r"row 1: found \['x'\], expected messages, conversations, turns, prompt, instruction, question, article",
        ),
        ('{"prompt": "a"}\n{"turns": []}', r"row 2: turns: found \[\], expected text"),
        ('{"turns": ["a", 3]}', "row 1: turns"),
        ('{"messages": [{"role": "user"}]}', "row 1: messages\\[0\\].content: missing, expected text"),
        ('{"prompt": ""}', "row 1: prompt"),
        ("[1", "not valid JSON"),
    ],
)
def test_bad_suites_name_the_row(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        read_suite(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("p.jsonl.gz", b"no gzip", "cannot be read"),
        ("p.parquet", b"none", "not valid Parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_suite(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_suite(tmp_path / "absent.jsonl")


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "calc", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be terse"}


@pytest.mark.parametrize(
    ("messages", "before", "turns"),
    [
        ([user("a"), said("x"), user("b"), said("y")], [], [["a"], ["b"]]),
        ([SYSTEM, said("Ask me."), user("a"), said("x"), user("b")], ["be terse", "Ask me."], [["a"], ["b"]]),
        ([user("a"), user("b")], [], [["a"], ["b"]]),  # nothing is recorded: each is answered
        ([user("a"), user("b"), said("x"), user("c")], [], [["a", "b"], ["c"]]),
        ([user("a"), CALL, RESULT, said("x"), user("b")], [], [["a", "", "42"], ["b"]]),
        ([user("a"), CALL, RESULT, RESULT, CALL, RESULT], [], [["a", "", "42", "42", "", "42"]]),
        ([user("a"), CALL], [], [["a"]]),  # the call is an answer, which the target gives itself
        ([user("a"), said("x"), RESULT], [], [["a"], ["42"]]),
        ([user("a"), said("x"), SYSTEM, user("b")], [], [["a"], ["be terse", "b"]]),
    ],
)
def test_every_turn_of_a_conversation_whatever_its_keys(tmp_path, messages, before, turns):
    tools = [{"type": "function", "function": {"name": "calc"}}]
    for key in ("messages", "conversation", "prompt", "conversations"):
        rows = [{key: messages, "tools": json.dumps(tools)}]
        (found,) = read_suite(write(tmp_path / "s.jsonl", rows), every=True)
        assert [m["content"] for m in found.before] == before and found.tools == tools
        assert [[m["content"] for m in turn] for turn in found.turns] == turns, key
        roles = [m["role"] for m in messages if m["role"] == "tool"]
        assert [m["role"] for turn in found.turns for m in turn if m["role"] == "tool"] == roles
        assert read_suite(tmp_path / "s.jsonl") == [found]
        if key == "messages":  # a row that is one turn of a conversation is asked behind what is recorded
            write(tmp_path / "s.jsonl", [row | {"turn": 1} for row in rows])
            (last,) = read_suite(tmp_path / "s.jsonl")
            assert [[m["content"] for m in turn] for turn in last.turns] == turns[-1:]
            count = len(last.before) + len(last.turns[0])
            assert all(m["role"] == "assistant" for m in messages[count:])
            assert read_suite(tmp_path / "s.jsonl", every=True) == [found]


def test_a_conversation_ends_before_the_first_prompt_that_does_not_fit(tmp_path):
    tokenizer, asked = train_tokenizer(["a b c"], 280), []
    file = write(tmp_path / "s.jsonl", [{"messages": [user("a"), said("x"), user("b"), said("y"), user("c")]}])

    def answer(prompts):
        asked.append([p.name for p in prompts])
        return ["answer" for _ in prompts]

    found = all_turns(read_suite(file), tokenizer, file, answer, lambda p: len(p.messages) < 3)
    assert [p.name for p in found] == ["1"] and asked == [["1"]]
    found = all_turns(read_suite(file), tokenizer, file, answer, lambda p: len(p.messages) < 5)
    assert [[m["content"] for m in p.messages] for p in found] == [["a"], ["a", "answer", "b"]]
    assert all_turns(read_suite(file), tokenizer, file, answer, lambda p: False) == []


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([SYSTEM], "messages: found the last one of the system, expected one that the target answers"),
        ([user("a"), said("x"), SYSTEM], "found the last one of the system"),
        ([{"role": "developer", "content": "x"}], "found the last one of the developer"),
        ([said("x")], "found the last one of the assistant"),
        ([user("ok \ud800")], r"content: found U\+D800, half of a surrogate pair"),
        ([user([{"type": "image_url"}])], "found a part of type image_url"),
    ],
)
def test_conversations_that_nobody_can_answer_are_refused(tmp_path, messages, reason):
    tokenizer = train_tokenizer(["a b c"], 280)
    for key in ("messages", "conversations"):
        file = write(tmp_path / "s.jsonl", [{"prompt": "a"}, {key: messages}])
        with pytest.raises(UserError, match=f"s.jsonl row 2: .*{reason}"):
            read_prompts(file, tokenizer)


def test_half_a_surrogate_in_any_form_is_named_with_its_row(tmp_path):
    for row in ({"prompt": "ok \ud800"}, {"turns": ["a", "ok \ud800"]}, {"question": "\udc00"}):
        with pytest.raises(UserError, match="s.jsonl row 1: .*half of a surrogate pair"):
            read_suite(write(tmp_path / "s.jsonl", [row]))


SUITES = Path(os.environ.get("DRAFTSMITH_SUITES") or Path(__file__).parents[3] / "../shared/data").resolve()
SUITES = SUITES / "suites" if (SUITES / "suites").is_dir() else SUITES
SHIPPED = {
    "eagle_mt_bench": (80, 160),
    "eagle_humaneval": (80, 80),
    "eagle_gsm8k": (80, 80),
    "eagle_alpaca": (80, 80),
    "eagle_sum": (80, 80),
    "eagle_qa": (80, 80),
    "spec_bench": (480, 560),
    "deepspec_humaneval": (164, 164),
    "deepspec_gsm8k": (1319, 1319),
    "deepspec_math500": (500, 500),
    "deepspec_mt-bench": (80, 160),
}


@pytest.mark.skipif(not SUITES.is_dir(), reason="the public suites are absent; DRAFTSMITH_SUITES names their folder")
@pytest.mark.parametrize(("name", "counts"), SHIPPED.items(), ids=SHIPPED)
def test_the_files_of_public_suites(name, counts):
    found = read_suite(SUITES / f"{name}.jsonl")
    assert (len(found), sum(len(c.turns) for c in found)) == counts
