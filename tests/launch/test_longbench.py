"""The builder of long suites: what is kept, in which bin, cut where; every suite is read by the evaluation."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.launch import longbench as bench
from draftsmith.launch.cli import main
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import encode_prompt
from draftsmith.train.reference import corpus
from draftsmith.train.reference.pretrain import train_tokenizer
from draftsmith.train.reference.repository import RepositoryRows, open_file, question
from tests.eval.measurement.test_suites import write
from tests.train.reference.test_corpus import SOURCE

EDGES = (64, 128, 256)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([SOURCE], 300)


def turns(*contents, **flags):
    return [{"role": ("user", "assistant")[i % 2], "content": text, **flags} for i, text in enumerate(contents)]


def wildchat(number, *contents, **more):
    return {
        "conversation_hash": f"h{number}",
        "model": "m",
        "language": "English",
        "toxic": False,
        "redacted": False,
        "conversation": turns(*contents, toxic=False, redacted=False),
        **more,
    }


def build(tmp_path, tokenizer, rows, form="jsonl", sampler="natural", count=100, fill=False, edges=EDGES, seed=0):
    said, left_out, file = [], Counter(), str(write(tmp_path / f"log.{form}", rows))
    (tmp_path / "suite.jsonl").unlink(missing_ok=True)  # another suite is never written over
    place = bench.longbench(
        [bench.conversations(file, left_out)],
        str(tmp_path / "suite.jsonl"),
        tokenizer,
        edges,
        count,
        sampler,
        fill,
        seed,
        left_out,
        said.append,
    )
    return [json.loads(line) for line in place.read_text().splitlines()], said[0]


LONG = "words and more words " * 4


@pytest.mark.parametrize("form", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_wildchat_rows_are_cut_at_the_last_user_turn_and_put_into_bins(tmp_path, tokenizer, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    rows = [
        wildchat(1, LONG, "yes", LONG + "?", "an answer"),
        wildchat(2, LONG, LONG),
        wildchat(3, LONG + "a", "x", toxic=True),
        wildchat(4, LONG, "yes", LONG + "?", "another answer"),
        wildchat(5, "short"),
        wildchat(6, LONG * 9),
        wildchat(7, "", "?"),
        wildchat(8, "\x00\x01\x02" * 40),
    ]
    found, said = build(tmp_path, tokenizer, rows, form)
    assert [(r["name"], r["turn"], r["messages"]) for r in found] == [
        ("h2", 1, turns(LONG)),
        ("h1", 2, turns(LONG, "yes", LONG + "?")),
    ]
    for row, prompt in zip(found, read_prompts(tmp_path / "suite.jsonl", tokenizer)):
        assert (
            row["tokens"] == len(prompt.tokens)
            and row["category"] == prompt.category == bench.bin_of(row["tokens"], EDGES)
            and not row["synthetic"]
        )
    assert said.endswith(
        "left out: 1 flagged as toxic or redacted, 1 of no text, 1 too long, 1 too short, 1 twice, 1 without text"
    )


def test_text_of_every_script_survives(tmp_path, tokenizer):
    text = "größer ≥ 漢字 🙂 مرحبا\u2028" * 6
    found, _ = build(tmp_path, tokenizer, [wildchat(1, text)], edges=(64, 4096))
    assert (
        found[0]["messages"] == turns(text)
        and read_prompts(tmp_path / "suite.jsonl", tokenizer)[0].messages[0]["content"] == text
    )


def test_samplers(tmp_path, tokenizer):
    rows = [wildchat(n, LONG + str(n) * 3) for n in range(40)] + [
        wildchat(n, LONG + LONG + LONG + str(n)) for n in range(40, 50)
    ]
    natural, _ = build(tmp_path, tokenizer, rows, count=20)
    balanced, _ = build(tmp_path, tokenizer, rows, count=20, sampler="balanced")
    again, _ = build(tmp_path, tokenizer, rows, count=20, sampler="balanced")
    assert Counter(r["category"] for r in balanced) == {"64-128": 10, "128-256": 10} and balanced == again
    assert len(natural) == 20 and Counter(r["category"] for r in natural)["64-128"] > 12
    assert balanced != build(tmp_path, tokenizer, rows, count=20, sampler="balanced", seed=1)[0]


def test_filling_keeps_the_question_last_and_says_so(tmp_path, tokenizer):
    rows = [wildchat(n, f"question {n} " * 4, f"answer {n}") for n in range(12)] + [
        wildchat(n, f"open {n} " * 4) for n in range(12, 16)
    ]
    found, _ = build(tmp_path, tokenizer, rows, fill=True)
    assert found and all(r["synthetic"] and EDGES[0] <= r["tokens"] < EDGES[-1] for r in found)
    for row in found:
        own = next(r for r in rows if r["conversation_hash"] == row["name"])["conversation"][0]["content"]
        assert row["messages"][-1]["content"].endswith(own) and [m["role"] for m in row["messages"]] == [
            "user",
            "assistant",
        ] * (row["turn"] - 1) + ["user"]


def test_documents_bring_a_question_or_get_one(tmp_path, tokenizer):
    left_out = Counter()
    file = write(tmp_path / "d.jsonl", [{"text": LONG, "question": "Which?"}, {"text": LONG}, {"text": " "}])
    found = list(bench.documents(str(file), left_out))
    assert [c.messages[0]["content"] for c in found] == [
        LONG.rstrip() + "\n\nWhich?",
        LONG.rstrip() + "\n\n" + bench.QUESTION,
    ]
    assert left_out == {"without text": 1}


def test_a_function_is_asked_for_behind_its_package_and_its_body_is_not_shown(tokenizer):
    found = list(
        bench.repositories(["rich", "networkx", "fsspec", "jinja2"], True, 3000, tokenizer, 0, 1, 900, (1, 2000))
    )
    assert len(found) > 1
    for candidate in found:
        module, _, name = candidate.name.rpartition(":")
        assert (
            corpus.is_held_out(module)
            and f"# {module}\n" in candidate.messages[0]["content"]
            and f"def {name}(" in candidate.messages[0]["content"]
        )
        assert "".join(candidate.answer.split()) not in "".join(candidate.messages[0]["content"].split())
        assert len(tokenizer(candidate.messages[0]["content"])["input_ids"]) >= 3000


def test_cuts_end_alike(tmp_path, tokenizer):
    """Every cut is a suffix of the longer ones; the longest prompt of a document has just the length that was asked
    for, all of them start alike.
    """
    left_out, lengths = Counter(), (512, 1024, 2048)
    asked = bench.repositories(["rich"], False, 2048, tokenizer, 1, 3, 400, (1, 2000))
    candidates = bench.rendered(asked, tokenizer, 2048, left_out)
    rows = bench.cut(candidates, lengths, 5, tokenizer, left_out)
    prompts = {(row["name"].rpartition("@")[0], row["category"]): row for row in rows}
    assert len({row["document"] for row in rows}) == 5 and len(prompts) == len(rows) > 15
    for row in rows:
        assert row["tokens"] == len(encode_prompt(tokenizer, row["messages"])) and row["name"].startswith(
            row["document"]
        )
    for name in {name for name, _ in prompts}:
        texts = [prompts[name, category]["messages"][0]["content"] for category in ("512", "1K", "2K")]
        assert texts[1].endswith(texts[0]) and texts[2].endswith(texts[1])
    for document in {row["document"] for row in rows}:
        for length, category in zip(lengths, ("512", "1K", "2K")):
            alike = [row for row in rows if (row["document"], row["category"]) == (document, category)]
            assert length - 8 <= max(row["tokens"] for row in alike) <= length
            assert len({row["messages"][0]["content"][:60] for row in alike}) == 1


def test_a_cut_does_not_split_a_character(tokenizer):
    text = "漢字🙂ü" * 100
    rows = bench.cut(
        bench.rendered(iter([bench.Candidate("a", turns(text))]), tokenizer, 0, Counter()),
        (50, 51, 52, 53, 54),
        1,
        tokenizer,
        Counter(),
    )
    assert len(rows) == 5 and all(text.endswith(row["messages"][0]["content"]) for row in rows)


def test_an_open_file_lacks_exactly_the_lines_of_its_functions():
    source = corpus.SourceFile("p", "p/m.py", Path("m.py"), SOURCE)
    functions = {f.name: f for f in corpus.cut_functions(source)}
    shown = open_file(source, [functions["documented"], functions["wait"]])
    assert shown.text == (
        "# p/m.py\nimport os\n\nclass A:\n    def plain(self, x):\n        return x + 1\n\n\ndef only_doc():\n"
        '    """Nothing else."""\n\ndef one_line(): return 1\n'
    )
    assert shown.asked == [functions["documented"], functions["wait"]]
    assert question([shown], functions["plain"]).endswith("return 1\n\n\ndef plain(self, x):")
    again = open_file(source, [functions["plain"], functions["plain"]])
    assert again.asked == [functions["plain"]]  # overlapping spans are cut once


def test_training_rows_have_one_length_and_end_in_turns(tokenizer):
    files = corpus.find_sources(["rich"])
    rows, again = RepositoryRows(files, tokenizer, 3), RepositoryRows(files, tokenizer, 3)
    starts = tokenizer("<|bos|><|user|>")["input_ids"]
    for length in (100, 700):
        row = rows.row(length)
        assert len(row) == length and row[:2] == starts and row == again.row(length)


ERRORS = {
    "no source": ([], "longbench: found no source, expected --conversations, --documents or --package"),
    "no file": (["--conversations", "{place}/none.jsonl"], "{place}/none.jsonl: no such file"),
    "rows of another form": (
        ["--conversations", "{place}/text.jsonl"],
        "{place}/text.jsonl row 1: found ['text'], expected `conversation` or `messages`",
    ),
    "documents of another form": (
        ["--documents", "{place}/log.jsonl"],
        "{place}/log.jsonl row 1: found ['conversation'], expected `text`",
    ),
    "only empty prompts": (
        ["--conversations", "{place}/log.jsonl"],
        "sources: found no prompt that fits (1 without text), expected at least one",
    ),
    "nothing long enough": (["--documents", "{place}/text.jsonl"], "sources: found no prompt that fits (1 too short)"),
    "not UTF-8": (["--documents", "{place}/latin.jsonl"], "{place}/latin.jsonl: not UTF-8"),
    "edges that fall": (
        ["--documents", "{place}/text.jsonl", "--edge", "9", "--edge", "3"],
        "edges: found 9, 3, expected at least two ascending",
    ),
    "an unknown sampler": (
        ["--documents", "{place}/text.jsonl", "--sampler", "best"],
        "sampler: found best, expected natural or balanced",
    ),
    "nothing to cut": (
        ["--documents", "{place}/text.jsonl", "--cut", "4096"],
        "sources: found no prompt that fits (1 too short)",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_told_in_one_line(arguments, message, tmp_path, tokenizer, capsys, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "text.jsonl").write_text('{"text": "short"}\n')
    (tmp_path / "log.jsonl").write_text(json.dumps({"conversation": turns(" ")}) + "\n")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "größer"}\n'.encode("latin-1"))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "draftsmith",
            "longbench",
            str(tmp_path / "out.jsonl"),
            "--target",
            str(tmp_path / "target"),
            *(a.format(place=tmp_path) for a in arguments),
        ],
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert (
        end.value.code == 2
        and message.format(place=tmp_path) in capsys.readouterr().err
        and not (tmp_path / "out.jsonl").exists()
    )


def test_an_empty_file_is_refused(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="they are empty"):
        build(tmp_path, tokenizer, [])
