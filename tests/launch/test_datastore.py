"""`draftsmith datastore build`: what it indexes, and what is refused in one line before anything is written."""

import json

import pytest
from typer.testing import CliRunner

from draftsmith.launch.cli import app
from draftsmith.launch.datastore import build
from draftsmith.launch.drafters import check_vocabulary
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.drafters.datastore import Datastore
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import encode_prompt
from draftsmith.models.rendering import Renderer
from draftsmith.train.reference.pretrain import train_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": "def f(a):"}, {"role": "assistant", "content": "    return a + 1\n"}]},
    {"text": "import os\nimport sys\n"},
    {"tokens": [5, 6, 7, 8], "prompt_length": 2},
]


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def test_it_holds_what_the_target_wrote(folder, rows, tmp_path):
    said = []
    build([rows], str(folder / "target"), tmp_path / "store", 1 << 20, said.append)
    tokenizer = load_tokenizer(folder / "target")
    store = Datastore(tmp_path / "store")
    check_vocabulary(store, "t", tokenizer)
    ((ids, mask),) = Renderer(tokenizer).encode(ROWS[0]["messages"], None, {2}).rows
    written = [token for token, own in zip(ids, mask) if own]
    text = tokenizer(ROWS[1]["text"])["input_ids"]
    assert len(store) == len(written) + len(text) + 2 + 3 and store.about["texts"] == 3
    for wanted in (written, text, [7, 8]):
        length, places = store.search(wanted[:2])
        assert length == 2
        for token in wanted[2:]:
            (after, places), *_ = store.following(places)
            assert after == token
    prompt = encode_prompt(tokenizer, ROWS[0]["messages"][:1])
    assert store.search([5, 6])[0] < 2 and store.search(prompt[-4:])[0] < 4  # prompts are not indexed
    assert said[-1].startswith("3 texts, ") and str(tmp_path / "store") in said[-1]
    assert store.about["files"].keys() == {rows} and store.about["target"] == str(folder / "target")


def test_one_of_another_tokenizer_is_refused(folder, rows, tmp_path):
    build([rows], str(folder / "target"), tmp_path / "store", 1 << 20, lambda line: None)
    with pytest.raises(UserError, match=r"found tokens of .*target \(vocabulary \w{16}\), expected those of other"):
        check_vocabulary(Datastore(tmp_path / "store"), "other", train_tokenizer(["another text"], 280))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tokens": [5, 600], "prompt_length": 1}', "row 4: found token id 600, expected 0..299"),
        ("{", "row 4: not valid JSON"),
        ('{"answer": "x"}', "row 4: found keys"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_left(folder, rows, tmp_path, line, message):
    with open(rows, "a") as file:
        file.write(line)
    result = CliRunner().invoke(
        app, ["datastore", "build", rows, "--target", str(folder / "target"), "--output", str(tmp_path / "store")]
    )
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert [place.name for place in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_exists_stays(folder, rows, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").write_text("x")
    with pytest.raises(UserError, match="store exists; expected a new place"):
        build([rows], str(folder / "target"), tmp_path / "store", 1 << 20)
    with pytest.raises(UserError, match="^/none.jsonl: no such file"):
        build([rows, "/none.jsonl"], str(folder / "target"), tmp_path / "other", 1 << 20)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["rows.jsonl", "store"]
    assert (tmp_path / "store" / "mine").read_text() == "x"
