"""Where answers end: every source counts, a value that is no id is told, and so is a disagreement, in one line."""

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from draftsmith.models.chat import stop_ids
from draftsmith.models.stops import Stops, template_end

PLAIN = "{% for m in messages %}{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}"
TEMPLATES = {  # what follows an answer -> the id that closes it (0 pad, 1 bos, 2 end)
    "its end": (PLAIN + "{{ '<|end|>' }}{% endfor %}", 2),
    "a newline behind the end": (PLAIN + "{{ '<|end|>' }}{{ '\\n' }}{% endfor %}", 2),
    "a blank before the end": (PLAIN + " {{ '<|end|>' }}{% endfor %}", 2),
    "another end in the history": (PLAIN + "{{ '<|end|>' if loop.last else '<|pad|>' }}{% endfor %}", 2),
    "another end for users": (PLAIN + "{{ '<|pad|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}", 0),
    "text": (PLAIN + "{{ ' bye' }}{% endfor %}", None),
    "nothing": (PLAIN + "{% endfor %}", None),
    "an end before the next user alone": (PLAIN + "{{ '<|end|>' if not loop.last }}{% endfor %}", None),
    "answers that are not shown": ("{% for m in messages %}{{ m.role }}{% endfor %}<|end|>", None),
    "a template that refuses": ("{{ raise_exception('no') }}", None),
    "a template that does not parse": ("{% for %}", None),
    "none": (None, None),
}


def target(generation=None, config=None, vocab=300):
    generation = None if generation is None else GenerationConfig(**generation)
    return SimpleNamespace(generation_config=generation, config=SimpleNamespace(eos_token_id=config), vocab_size=vocab)


@pytest.fixture
def reader(tokenizer):
    before = tokenizer.chat_template
    yield tokenizer
    tokenizer.chat_template = before


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_with_which_a_template_closes_the_last_answer(name, reader):
    reader.chat_template, expected = TEMPLATES[name]
    assert template_end(reader) == expected


def test_stop_ids_are_the_union_and_a_disagreement_is_one_line(reader):
    found = Stops.of(target({"eos_token_id": 0}, 2), reader)
    assert found.ids == stop_ids(target({"eos_token_id": 0}, 2), reader) == {0, 2}
    assert found.notes() == [
        "stop ids differ: generation_config.json says 0, config.json says 2, the tokenizer says 2, the chat template "
        "says 2; an answer ends at any of 0 or 2"
    ]
    only_config = Stops.of(target(None, [0, 5]), reader)
    assert only_config.ids == {0, 2, 5} and "config.json says 0 or 5, the tokenizer says 2" in only_config.notes()[0]
    reader.chat_template = TEMPLATES["another end for users"][0]
    closing = Stops.of(target({"eos_token_id": 2}, 2), reader)
    assert closing.ids == {0, 2} and "the chat template says 0" in closing.notes()[0]


@pytest.mark.parametrize("generation, config", [({"eos_token_id": 2}, 2), (None, 2), (None, None), ({}, None)])
def test_sources_that_agree_are_not_told(generation, config, reader):
    assert Stops.of(target(generation, config), reader).notes() == []
    assert Stops.of(target(generation, config), reader).ids == {2}


def test_the_first_source_may_name_more_than_the_others(reader):
    """Most chat models list their ends there."""
    found = Stops.of(target({"eos_token_id": [2, 7, 9]}, 2), reader)
    assert found.ids == {2, 7, 9} and found.notes() == []


@pytest.mark.parametrize(
    "value, kept",
    [("2", set()), ([], set()), (["<|end|>"], set()), ([2, "3"], set()), (300, set()), (-1, set()), ([[5]], set())]
    + [(2.0, set()), (True, set()), ([7, 300], {7}), ({"a": 1}, set())],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_value_that_is_no_id_is_told_and_left_out(value, kept, name, reader):
    given = ({"eos_token_id": value}, 2) if name == "generation_config.json" else ({"eos_token_id": 2}, value)
    found = Stops.of(target(*given), reader)
    assert found.ids == {2} | kept
    line = found.notes()[0]
    assert line.startswith(f"{name}: eos_token_id: found {value!r}, expected ids from 0 to 299") and "\n" not in line


def test_a_target_without_any_end_is_told(reader):
    reader.chat_template, before = None, reader.eos_token
    try:
        reader.eos_token = None
        found = Stops.of(target({"eos_token_id": []}), reader)
    finally:
        reader.eos_token = before
    assert found.ids == set() and "no stop id is known" in found.notes()[-1] and len(found.notes()) == 2
