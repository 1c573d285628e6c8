"""The datastore against a search of all places, token by token; what is refused; complete or invisible."""

import json

import numpy as np
import pytest

from draftsmith.models.drafters import datastore
from draftsmith.models.drafters.datastore import FILE, LONGEST, Datastore, backward_suffixes, write
from draftsmith.models.errors import UserError


def texts_of(seed: int, vocab: int, count: int = 30) -> list[np.ndarray]:
    """Random texts that share strings of every length up to more than `LONGEST`."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, vocab, 60)
    found = []
    for _ in range(count):
        start = rng.integers(0, 40)
        found.append(np.concatenate([rng.integers(0, vocab, rng.integers(1, 12)), common[start : start + 20]]))
    return found


def searched(texts: list[np.ndarray], context: list[int]) -> tuple[int, list[tuple[int, int]]]:
    """(length of the longest known end of the context, (text, index behind it) of all its places)."""
    for length in range(min(LONGEST, len(context)), 0, -1):
        wanted = context[-length:]
        places = [
            (number, at)
            for number, text in enumerate(texts)
            for at in range(length, len(text) + 1)
            if text[at - length : at].tolist() == wanted
        ]
        if places:
            return length, places
    return 0, []


def followed(texts, places) -> dict[int, list[tuple[int, int]]]:
    found = {}
    for number, at in places:
        if at < len(texts[number]):
            found.setdefault(int(texts[number][at]), []).append((number, at + 1))
    return found


@pytest.mark.parametrize("shard_tokens", [10_000, 97, 7], ids=["one shard", "several", "shards smaller than texts"])
@pytest.mark.parametrize("vocab", [3, 61, 70_000])
def test_it_finds_what_a_search_of_all_places_finds(tmp_path, shard_tokens, vocab):
    texts = texts_of(vocab, vocab)
    about = write(iter(texts), tmp_path / "d", vocab, {"more": 1}, shard_tokens)
    store = Datastore(tmp_path / "d")
    assert about["texts"] == 30 and store.about == about and len(store) == sum(map(len, texts)) + 30
    rng = np.random.default_rng(1)
    for number in range(60):
        text = texts[number % 30]
        cut = rng.integers(1, len(text) + 1)
        context = [*rng.integers(0, vocab, rng.integers(0, 4)).tolist(), *text[:cut].tolist()]
        if number % 3 == 0:
            context[rng.integers(0, len(context))] = int(rng.integers(0, vocab))
        found, want = store.search(context), searched(texts, context)
        if shard_tokens > 97:
            assert (found[0], len(found[1])) == (want[0], len(want[1])), context
        assert (found[0] > 0) == (want[0] > 0) and found[0] <= want[0]
        places = want[1] if found[0] == want[0] else searched(texts, context[-found[0] :])[1]
        level = [(found[1], places)] if shard_tokens > 97 else []
        for _ in range(3):  # what follows, and what follows that
            below = []
            for slots, listed in level:
                groups, behind = store.following(slots), followed(texts, listed)
                assert {t: len(s) for t, s in groups} == {t: len(s) for t, s in behind.items()}
                assert [len(s) for _, s in groups] == sorted((len(s) for _, s in groups), reverse=True)
                below += [(s, behind[t]) for t, s in groups]
            level = below


def test_a_text_that_is_cut_between_two_shards_goes_on_in_the_second(tmp_path):
    write([np.array([1, 2, 3, 4, 5, 6])], tmp_path / "d", 9, {}, 3)
    store = Datastore(tmp_path / "d")
    length, places = store.search([8, 2, 3])
    assert length == 2
    for wanted in (4, 5, 6):
        ((token, places),) = store.following(places)
        assert token == wanted
    assert store.following(places) == []
    assert store.search([7]) == (0, pytest.approx([])) and store.search([])[0] == 0


def test_of_very_many_places_an_even_choice_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(datastore, "OCCURRENCES", 10)
    write([np.array([i % 4, 5, 6 + i % 2]) for i in range(100)], tmp_path / "d", 9, {})
    length, places = Datastore(tmp_path / "d").search([5])
    groups = dict(Datastore(tmp_path / "d").following(places))
    assert length == 1 and len(places) == 10 and set(groups) == {6, 7}


def test_places_are_in_the_order_of_what_stands_before_them():
    tokens = np.random.default_rng(3).integers(0, 1 << 17, 500).astype(np.uint32) // 40_000
    before = [tokens[:place][::-1].tolist() for place in backward_suffixes(tokens)]
    assert before == sorted(before) and len(before) == 500


def test_complete_or_invisible(tmp_path):
    def dying():
        yield np.array([1, 2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(dying(), tmp_path / "d", 9, {}, 2)
    with pytest.raises(UserError, match="found no texts"):
        write([], tmp_path / "d", 9, {})
    assert list(tmp_path.iterdir()) == []


def damaged(folder, kind):
    if kind == "nothing":
        (folder / FILE).unlink()
    elif kind == "no JSON":
        (folder / FILE).write_text("{")
    elif kind == "format":
        (folder / FILE).write_text('{"format": 7}')
    elif kind == "keys":
        (folder / FILE).write_text('{"format": 1, "vocab_size": 9, "shards": []}')
    elif kind == "a missing array":
        (folder / "places-0.npy").unlink()
    elif kind == "a cut array":
        (folder / "tokens-0.npy").write_bytes((folder / "tokens-0.npy").read_bytes()[:-3])
    elif kind == "another array":
        np.save(folder / "tokens-0.npy", np.zeros(5, np.uint16))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "no such directory with a datastore.json"),
        ("no JSON", "datastore.json is not valid JSON"),
        ("format", "found format 7, expected 1"),
        ("keys", "datastore.json: found no vocab_size and shards"),
        ("a missing array", "places-0.npy cannot be read"),
        ("a cut array", "tokens-0.npy cannot be read"),
        ("another array", r"tokens-0.npy: found shape \(5,\), expected \(4,\)"),
    ],
)
def test_what_is_no_complete_datastore_is_refused(tmp_path, kind, message):
    write([np.array([1, 2, 3])], tmp_path / "d", 9, {})
    damaged(tmp_path / "d", kind)
    with pytest.raises(UserError, match=f"^datastore {tmp_path}/d: {message}"):
        Datastore(tmp_path / "d")


def test_what_it_says_of_itself(tmp_path):
    write([np.array([1, 2, 3])], tmp_path / "d", 9, {"target": "t"})
    assert json.loads((tmp_path / "d" / FILE).read_text()) == {
        "format": 1,
        "vocab_size": 9,
        "texts": 1,
        "shards": [4],
        "target": "t",
    }
