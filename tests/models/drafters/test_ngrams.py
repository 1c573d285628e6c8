"""The n-gram memory: running averages, backoff, spaces, and bounds, against a dictionary that does the same."""

import numpy as np
import pytest

from draftsmith.models.drafters.ngrams import NONE, NgramMemory, averaged

BOB, MARY, TOM, SUE = 7, 8, 9, 10


def one(memory, text, ids, probs, space=0):
    """The text's last token was observed with this distribution behind it."""
    memory.update(*ends([text], memory.orders, [space]), np.array([ids]), np.array([probs]))


def ends(texts, orders, spaces):
    return np.array([[NONE] * (orders - len(t)) + list(t)[-orders:] for t in texts]), np.array(spaces)


def entry(memory, text, space=0):
    (found,) = memory.find(*ends([text], memory.orders, [space]))
    if found == NONE:
        return None
    kept = memory.probs[found] > 0
    return dict(zip(memory.ids[found][kept].tolist(), memory.probs[found][kept].tolist()))


def test_an_entry_is_the_running_average_over_the_ids_of_both():
    memory = NgramMemory(1, 4)
    one(memory, [5], [BOB, MARY, TOM], [0.7, 0.2, 0.05])
    one(memory, [5], [MARY, BOB, SUE], [0.6, 0.3, 0.05])
    found = entry(memory, [5])
    assert list(found) == [BOB, MARY, TOM, SUE] and list(found.values()) == pytest.approx([0.5, 0.4, 0.025, 0.025])
    one(memory, [5], [MARY], [1.0])
    found = entry(memory, [5])
    assert list(found)[0] == MARY and found[MARY] == pytest.approx((2 * 0.4 + 1) / 3) and memory.counts[0] == 3


def test_the_largest_stay_and_what_is_dropped_is_not_made_up_for():
    memory = NgramMemory(1, 2)
    one(memory, [5], [1, 2], [0.5, 0.4])
    one(memory, [5], [3, 4], [0.8, 0.1])
    found = entry(memory, [5])
    assert found == pytest.approx({3: 0.4, 1: 0.25}) and list(found) == [3, 1]


def test_the_longest_known_string_is_found():
    memory = NgramMemory()
    one(memory, [1, 2, 3, 4], [40], [1.0])
    one(memory, [9, 2, 3, 4], [41], [1.0])
    assert entry(memory, [1, 2, 3, 4]) == {40: 1.0} and entry(memory, [9, 2, 3, 4]) == {41: 1.0}
    assert entry(memory, [7, 2, 3, 4]) == {40: 0.5, 41: 0.5}  # three tokens are known
    assert entry(memory, [7, 7, 7, 4]) == {40: 0.5, 41: 0.5} and entry(memory, [4, 4, 4, 7]) is None
    one(memory, [8, 4], [42], [1.0])  # a short text has no longer strings
    assert entry(memory, [8, 4]) == {42: 1.0} and entry(memory, [3, 8, 4]) == {42: 1.0}
    assert entry(memory, [4]) == pytest.approx({40: 1 / 3, 41: 1 / 3, 42: 1 / 3})


def test_spaces_know_nothing_of_one_another():
    memory = NgramMemory()
    one(memory, [1, 2], [3], [1.0], space=0)
    one(memory, [1, 2], [4], [1.0], space=1)
    assert entry(memory, [1, 2], 0) == {3: 1.0} and entry(memory, [1, 2], 1) == {4: 1.0}
    assert entry(memory, [1, 2], 2) is None
    memory.clear()
    assert entry(memory, [1, 2], 0) is None and len(memory) == 0


def random_updates(seed, count, vocab=4, top=3):
    rng = np.random.default_rng(seed)
    texts = rng.integers(vocab, size=(count, 4))
    ids = np.stack([rng.permutation(vocab)[:top] for _ in range(count)])
    probs = np.sort(rng.dirichlet(np.ones(top), count), 1)[:, ::-1].astype(np.float32)
    probs[rng.random(count) < 0.2, -1] = 0
    return texts, ids, probs


def by_hand(texts, ids, probs, top=3):
    """String -> {id: average}, one update after the other."""
    known = {}
    for text, row, chances in zip(texts.tolist(), ids.tolist(), probs.tolist()):
        for order in range(1, 5):
            count, average = known.get(tuple(text[-order:]), (0, {}))
            new = {i: p for i, p in zip(row, chances) if p > 0}
            both = [*average, *(i for i in new if i not in average)]
            merged = {i: (count * average.get(i, 0) + new.get(i, 0)) / (count + 1) for i in both}
            best = sorted(both, key=lambda i: -merged[i])[:top]
            known[tuple(text[-order:])] = count + 1, {i: merged[i] for i in best}
    return known


@pytest.mark.parametrize("piece", [1, 7, 400])
def test_a_string_that_occurs_several_times_in_one_update_learns_all_of_them_in_order(piece):
    """In pieces or at once, against a dictionary; the arrays and the table grow on the way."""
    texts, ids, probs = random_updates(0, 400)
    memory = NgramMemory(4, 3, 10_000)
    for start in range(0, 400, piece):
        part = slice(start, start + piece)
        memory.update(texts[part], np.zeros(len(texts[part]), int), ids[part], probs[part])
    known = by_hand(texts, ids, probs)
    assert len(memory) == len(known)
    for string, (_, average) in known.items():
        assert entry(memory, string) == pytest.approx(average, abs=1e-6), string


def test_memory_is_bounded_and_keeps_what_was_updated_last():
    memory = NgramMemory(4, 10, 200)
    for token in range(100, 400):
        one(memory, [token + 2, token + 1, token + 3, token], [5], [1.0])
        one(memory, [7, 7, 7, 7], [6], [1.0])
    assert 100 <= len(memory) <= 200 and memory.nbytes < 120 * 200
    assert entry(memory, [7, 7, 7, 7]) == {6: 1.0} and memory.counts[memory.find(*ends([[7] * 4], 4, [0]))[0]] == 300
    assert entry(memory, [401, 400, 402, 399]) == {5: 1.0} and entry(memory, [110]) is None
    with pytest.raises(ValueError, match="max_entries: found 7"):
        NgramMemory(4, 10, 7)


def test_many_rows_in_one_update_fit_the_smallest_memory():
    texts, ids, probs = random_updates(1, 300, vocab=30)
    memory = NgramMemory(4, 3, 16)
    memory.update(texts, np.zeros(300, int), ids, probs)
    assert len(memory) <= 16 and entry(memory, texts[-1].tolist()) is not None


def test_entries_of_a_thousand_tokens_take_about_a_hundred_bytes_each():
    texts, ids, probs = random_updates(2, 2000, vocab=5000, top=3)
    memory = NgramMemory()
    memory.update(texts, np.zeros(2000, int), ids, probs)
    assert len(memory) > 6000 and 100 < memory.nbytes / len(memory.keys) < 120


def test_averaging_leaves_its_arguments_alone():
    ids, probs = np.array([[1, 2]], np.int32), np.array([[0.6, 0.4]], np.float32)
    before = ids.copy(), probs.copy()
    found = averaged(ids, probs, np.array([1]), np.array([[2, NONE]]), np.array([[1.0, 0.0]], np.float32))
    assert found[0].tolist() == [[2, 1]] and found[1].tolist() == [pytest.approx([0.7, 0.3])]
    assert np.array_equal(ids, before[0]) and np.array_equal(probs, before[1])
