"""Files and Hub sets of rows: every form gives the rows that it holds, and what is another form is named."""

import gzip
import json
import threading
from http.server import ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from draftsmith.models.errors import UserError
from draftsmith.train import data, files
from draftsmith.train.files import HubSet, pinned, read_records
from draftsmith.train.records import encode_record
from tests.hub_server import Hub, Store, revision_id

ROWS = [{"text": "a"}, {"text": "b"}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
ARRAY, BOM = json.dumps(ROWS).encode(), b"\xef\xbb\xbf"
FORMS = {
    "rows.jsonl": LINES,
    "bom.jsonl": BOM + LINES,
    "put-together.jsonl": BOM + LINES[:14] + BOM + LINES[14:],
    "crlf.jsonl": BOM + LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n \r\n" + LINES,
    "rows.jsonl.gz": gzip.compress(LINES),
    "bom.jsonl.gz": gzip.compress(BOM + b"\n" + LINES),
    "rows.json": ARRAY,
    "bom.json": BOM + ARRAY,
    "blank.json": b"\n\n  " + ARRAY,
    "bom-blank.json": BOM + b"\r\n\r\n" + ARRAY,
    "indented.json": BOM + json.dumps(ROWS, indent=1).encode(),
    "rows.json.gz": gzip.compress(ARRAY),
    "lines.json": LINES,
}


@pytest.mark.parametrize(("name", "content"), FORMS.items(), ids=FORMS)
def test_every_form_gives_its_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [record for _, record in read_records(str(tmp_path / name))] == ROWS


def test_rows_of_jsonl_are_numbered_by_their_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n\n" + LINES + b"{\n")
    numbers, found = zip(*read_records(str(tmp_path / "rows.jsonl")))
    assert numbers == (3, 4, 5) and isinstance(found[-1], UserError)


BAD = {
    "utf-16.jsonl": ("\n".join(map(json.dumps, ROWS)).encode("utf-16"), "found UTF-16, expected UTF-8"),
    "utf-16.json": (json.dumps(ROWS).encode("utf-16"), "found UTF-16, expected UTF-8"),
    "torn.jsonl.gz": (gzip.compress(LINES)[:-9], "cannot be read"),
    "torn.json.gz": (gzip.compress(ARRAY)[:20], "cannot be read"),
    "no.jsonl.gz": (LINES, "cannot be read"),
    "torn.json": (ARRAY[:-1], "not valid JSON"),
    "deep.json": (b"[" * 100_000, "not valid JSON"),
    "rows.jsonl.zst": (LINES, "found suffix '.zst', expected .jsonl, .json (either with .gz) or .parquet"),
    "rows.csv.gz": (gzip.compress(LINES), "found suffix '.gz', expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_records(str(tmp_path / name)))
    assert str(error.value).startswith(f"{tmp_path}/{name}: ") and message in str(error.value)


def test_answers_of_two_models_side_by_side_are_named(tokenizer):
    for key in ("conversation_a", "chosen"):
        with pytest.raises(UserError, match=f"found {key}: answers of other models, expected tokens, messages"):
            encode_record({"question_id": 1, key: [{"role": "user", "content": "a"}]}, tokenizer, {2}, 300)


PARSED = {
    "hub:a/b": ("a/b", None, None, "train"),
    "hub:a/b:test": ("a/b", None, None, "test"),
    "hub:a/b:code:train": ("a/b", None, "code", "train"),
    "hub:a/b:code:": ("a/b", None, "code", "train"),
    "hub:a/b::test": ("a/b", None, None, "test"),
    "hub:a/b@v1:code:test": ("a/b", "v1", "code", "test"),
}


@pytest.mark.parametrize(("text", "parts"), PARSED.items())
def test_names_of_hub_sets(text, parts):
    found = HubSet.parse(text)
    assert (found.name, found.revision, found.config, found.split) == parts and HubSet.parse(str(found)) == found


@pytest.mark.parametrize("text", ["hub:", "hub:a/b:c:d:e", "hub:a/b:train[:10]"])
def test_names_that_are_none(text):
    with pytest.raises(UserError, match="expected hub:NAME"):
        HubSet.parse(text)


@pytest.fixture
def two(tmp_path):
    """A set of two configurations, as a folder."""
    folder = tmp_path / "two"
    folder.mkdir()
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("chat", "code"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name in ("chat", "code"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    return folder


def test_one_configuration_of_several(two):
    pytest.importorskip("datasets")
    for name in ("chat", "code"):
        assert [r for _, r in read_records(f"hub:{two}:{name}:train")] == [{"text": name}]
    for wrong in (f"hub:{two}", f"hub:{two}:train", f"hub:{two}:none:train"):
        with pytest.raises(UserError, match="found the configurations 'chat', 'code', expected one of them"):
            list(read_records(wrong))
    with pytest.raises(UserError, match="Bad split: test"):
        list(read_records(f"hub:{two}:chat:test"))


def test_a_set_that_grew_is_prepared_anew(two, tmp_path, tokenizer):
    pytest.importorskip("datasets")
    read = lambda: data.prepare([f"hub:{two}:chat:train"], 64, 0.0, tokenizer, {2}, 300, tmp_path / "rows")  # noqa: E731
    first = read()
    assert read().key == first.key and len(first) == 1
    with (two / "chat.jsonl").open("a") as file:
        file.write(json.dumps({"text": "more of it"}) + "\n")
    assert read().key != first.key and len(read()) == 2


@pytest.fixture
def hub(monkeypatch):
    """The repositories of a Hub that this process asks."""
    monkeypatch.setattr(Hub, "store", Store())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub.store.repos
    server.shutdown()
    server.server_close()


def test_the_commit_of_a_hub_set_is_part_of_the_key(hub):
    old, new = {"a.jsonl": b"1"}, {"a.jsonl": b"2"}
    hub["some/set"] = {"private": False, "branches": {"main": old, "v1": old}, "history": [old, new]}
    before = pinned(["hub:some/set:code:train", "rows.jsonl"])
    assert before == [f"hub:some/set@{revision_id(old)}:code:train", "rows.jsonl"]
    hub["some/set"]["branches"]["main"] = new
    (after,) = pinned(["hub:some/set:code:train"])
    assert after == f"hub:some/set@{revision_id(new)}:code:train" and files.identity(after) != files.identity(before[0])
    assert pinned(["hub:some/set@v1:code:train"]) == before[:1] and pinned(before) == before


def test_a_set_that_the_hub_does_not_have(hub):
    for name, reason in (("some/none", "no such repository"), ("some/set@v9", "no such revision")):
        hub["some/set"] = {"private": False, "branches": {"main": {}}, "history": [{}]}
        with pytest.raises(UserError, match=f"data set {name.split('@')[0]}: the Hub: {reason}"):
            pinned([f"hub:{name}"])
