"""Several processes make the same rows as one, in the same order, and a process that dies is told of."""

import json
import os
import subprocess
import sys
from itertools import count, islice, takewhile

import numpy as np
import pytest

from draftsmith.models.errors import UserError
from draftsmith.models.rendering import Renderer
from draftsmith.train import data, encoding
from draftsmith.train.encoding import Encoder, Outcome, encoded, temperature_of

COUNT = 700


def record(number: int) -> dict:
    if number % 97 == 5:
        return {"messages": []}
    talk = [{"role": "user", "content": f"add {number}"}, {"role": "assistant", "content": f"return {number}"}]
    return {"messages": talk * (1 + number % 3), "temperature": number % 2, "row": number // 2, "turn": number % 2}


def test_two_processes_make_the_rows_of_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "ALONE", 100)
    monkeypatch.setattr(encoding, "MEANWHILE", 50)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in range(COUNT)))
    made = []
    for processes in (1, 2):
        said, folder = [], tmp_path / f"rows{processes}"
        arguments = [str(tmp_path / "rows.jsonl")], 64, 0.1, tokenizer, {2}, 300, folder, said.append
        rows = data.prepare(*arguments, processes=processes)
        made.append((rows, [line for line in said if "rows read" not in line]))  # without progress
    (one, told), (two, other) = made
    assert told == other and len(told) == 1 and "8 of 700 rows cannot be used" in told[0]
    files = sorted(p.name for p in one.folder.iterdir())
    assert len(files) >= 7 and files == sorted(p.name for p in two.folder.iterdir()) and one.key == two.key
    assert all((one.folder / name).read_bytes() == (two.folder / name).read_bytes() for name in files)
    assert one.temperatures == [0.0, 1.0] and np.array_equal(one.borders, two.borders)


def test_records_are_read_as_they_are_needed(tokenizer, monkeypatch):
    """Whatever the length of a file, a few chunks of it are in memory."""
    monkeypatch.setattr(encoding, "ALONE", 10)
    read = []

    def records():
        for number in range(10**9):
            read.append(number)
            yield number, record(number)

    found = encoded(records(), "rows.jsonl", Encoder(Renderer(tokenizer), {2}, 300, 64), 2)
    assert [next(found)[0] for _ in range(30)] == list(range(30))
    assert len(read) <= 10 + (2 * 2 + 2) * encoding.CHUNK
    found.close()


class Telling(Encoder):
    def __call__(self, record, file):
        return Outcome(origin=(os.getpid(), record))


def test_the_first_process_goes_on_until_another_has_started(tokenizer, monkeypatch):
    """And from there on leaves all to the others, in the order of the records."""
    monkeypatch.setattr(encoding, "ALONE", 10)
    found = encoded(((n, n) for n in count()), "rows.jsonl", Telling(Renderer(tokenizer), {2}, 300, 64), 2)
    own = list(takewhile(lambda outcome: outcome.origin[0] == os.getpid(), (outcome for _, outcome in found)))
    later = [outcome.origin for _, outcome in islice(found, 500)]
    assert len(own) > 100 and [outcome.origin[1] for outcome in own] == list(range(len(own)))
    assert [number for _, number in later] == list(range(len(own) + 1, len(own) + 501))
    assert os.getpid() not in {process for process, _ in later}
    found.close()


class Dying(Encoder):
    def __call__(self, record, file):
        return os._exit(9) if record.get("row") == 100 else super().__call__(record, file)


def test_a_process_that_dies_is_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "ALONE", 10)
    monkeypatch.setattr(encoding, "MEANWHILE", 0)
    records = ((number, record(number)) for number in range(COUNT))
    with pytest.raises(UserError, match="rows.jsonl: a process that prepared rows died .*data.processes=1"):
        list(encoded(records, "rows.jsonl", Dying(Renderer(tokenizer), {2}, 300, 64), 2))


UNGUARDED = """
from transformers import AutoTokenizer
from draftsmith.models.errors import UserError
from draftsmith.models.rendering import Renderer
from draftsmith.train import encoding
encoding.ALONE, encoding.MEANWHILE = 10, 0
records = ((n, {"prompt": "add", "response": f"return {n}"}) for n in range(700))
encoder = encoding.Encoder(Renderer(AutoTokenizer.from_pretrained("TOKENIZER")), set(range(200_000)), 300, 64)
try:
    list(encoding.encoded(records, "rows.jsonl", encoder, 2))
except UserError as error:
    print(f"told: {error}")
"""


def test_a_process_that_dies_at_its_start_is_told_of(tokenizer, tmp_path):
    """As every one of a script without a guard does, which runs it once more: that script ends, however much the
    processes were to be given.
    """
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(UNGUARDED.replace("TOKENIZER", str(tmp_path / "tokenizer")))
    ran = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert "told: rows.jsonl: a process that prepared rows died" in ran.stdout, ran.stderr[-2000:]
    assert "script without `if __name__" in ran.stdout


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), 10**400, -1, [1]])
def test_a_temperature_is_a_number_that_can_be_one(value):
    assert temperature_of({"temperature": value}) is None and temperature_of({"temperature": 1}) == 1.0
