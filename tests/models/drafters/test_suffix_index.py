"""Suffix indexes: the vectors of methods/owl.md section 5.3, and counts against a walk over all positions."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.models.drafters.suffix_index import Draft, SuffixIndex, SuffixRule

REPEATED = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]


BRANCHING = [1, 2, 3, 4, 5, 8, 1, 2, 3, 6, 7, 8, 1, 2, 3, 4, 5, 8]


def draft_of(texts, context, limit=60, **rule):
    index = SuffixIndex()
    for number, text in enumerate(texts):
        index.append(number, text)
    return index.speculate(context, SuffixRule(**rule), limit)


@pytest.mark.parametrize(
    "factor, tokens, score", [(1, (4, 5, 6), 1.5), (2, (4, 5, 6, 7, 1, 2), 3.0), (4, (4, 5, 6, 7, 1, 2, 3), 3.5)]
)
def test_a_text_is_its_own_context(factor, tokens, score):
    """Its own end counts as an occurrence: what followed once before gets 1/2."""
    draft = draft_of([REPEATED], REPEATED, factor=factor)
    assert (draft.tokens, draft.score, draft.match) == (tokens, score, 3) and set(draft.probs) == {0.5}


def test_what_followed_in_another_text_alone_is_certain():
    draft = draft_of([[1, 2, 3, 4, 5, 6, 7]], [9, 1, 2, 3], factor=2)
    assert (
        draft.tokens == (4, 5, 6, 7)
        and draft.probs == (1.0,) * 4
        and draft.score == 4
        and draft.parents == (-1, 0, 1, 2)
    )


def test_tree_takes_the_most_probable_nodes():
    draft = draft_of([BRANCHING], [9, 1, 2, 3], 5, factor=4, form="tree")
    assert draft.tokens == (4, 5, 8, 6, 1) and draft.parents == (-1, 0, 1, -1, 2)
    assert draft.probs == pytest.approx((2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3)) and draft.score == pytest.approx(8 / 3)


def test_the_depth_limit_lets_a_shorter_match_draft_further():
    draft = draft_of([list(range(30))], [5, 6, 7, 8], depth=8, factor=4)
    assert (draft.match, draft.tokens, draft.score) == (2, tuple(range(9, 15)), 6.0)


def test_siblings_norm_leaves_ends_out():
    assert draft_of([REPEATED], REPEATED, factor=2, norm="siblings").score == 6.0
    halves = draft_of([[1, 2, 3, 1, 2, 4, 1, 2]], [9, 1, 2], norm="siblings", form="tree")
    assert halves.tokens == (4, 3) and halves.probs == (0.5, 0.5)  # the later of two equals first


def test_least_probability_and_budget_end_a_path():
    assert draft_of([REPEATED], REPEATED, factor=2, min_prob=0.6).tokens == ()
    assert draft_of([REPEATED], REPEATED, 2, factor=2).tokens == (4, 5)
    assert draft_of([REPEATED], REPEATED, factor=0, offset=1).tokens == (4,)


@pytest.mark.parametrize("texts, context", [([[1, 2, 3]], [7, 8]), ([[1, 2, 3]], [2]), ([], [1, 2]), ([[1]], [])])
def test_no_match_drafts_nothing(texts, context):
    assert draft_of(texts, context) == Draft()


def count(texts, word):
    return sum(text[i : i + len(word)] == word for text in texts for i in range(len(text) - len(word) + 1))


def brute_path(texts, context, rule, limit):
    """Section 5.3 word for word, by counting over all positions in exact fractions. (score, match) of the best path."""
    context, best = context[-rule.depth :], (Fraction(0), 0)
    for match in range(1, len(context)):
        word = context[-match:]
        if not count(texts, word):
            break
        prob, score, length = Fraction(1), Fraction(0), 0
        while length < rule.budget(match, limit) and len(word) < rule.depth:
            after = {
                text[i + len(word)]
                for text in texts
                for i in range(len(text) - len(word))
                if text[i : i + len(word)] == word
            }
            if not after:
                break
            most = max(count(texts, [*word, token]) for token in after)
            tied = [token for token in after if count(texts, [*word, token]) == most]
            prob *= Fraction(most, count(texts, word))
            if len(tied) > 1 or prob < Fraction(rule.min_prob):
                return None if len(tied) > 1 else max(best, (score, match))  # equals may be taken in any order
            score, length, word = score + prob, length + 1, [*word, tied[0]]
        if score >= best[0] and score:
            best = (score, match)
    return best


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([4, 7, 64]))
def test_paths_are_those_of_a_count_over_all_positions(seed, factor, depth):
    rng = random.Random(seed)
    texts = [[rng.randrange(4) for _ in range(rng.randrange(1, 40))] for _ in range(rng.randrange(1, 4))]
    context = texts[0] if rng.random() < 0.5 else [rng.randrange(4) for _ in range(rng.randrange(2, 9))]
    rule = SuffixRule(depth=depth, factor=factor, min_prob=0.0)
    expected = brute_path(texts, context, rule, 12)
    if expected is not None:
        draft = draft_of(texts, context, 12, depth=depth, factor=factor, min_prob=0.0)
        assert draft.score == pytest.approx(float(expected[0])) and draft.match == expected[1], (texts, context)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_tree_probabilities_are_counts(seed):
    """Each node's probability is C(path) / C(suffix); nodes come best first; no unlisted child is more probable than
    the last one.
    """
    rng = random.Random(seed)
    texts = [[rng.randrange(3) for _ in range(rng.randrange(2, 40))] for _ in range(2)]
    draft = draft_of(texts, texts[0], 8, factor=4, form="tree", min_prob=0.0)
    word, paths = texts[0][-draft.match :], []
    for token, parent in zip(draft.tokens, draft.parents):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    chances = [count(texts, word + path) / count(texts, word) for path in paths] if paths else []
    assert draft.probs == pytest.approx(chances) and list(draft.probs) == sorted(draft.probs, reverse=True)
    if len(paths) == 8:
        others = [[*path, token] for path in [[], *paths] for token in range(3) if [*path, token] not in paths]
        assert max(count(texts, word + path) for path in others) / count(texts, word) <= draft.probs[-1] + 1e-9


def test_appending_in_pieces_is_appending_at_once():
    rng = random.Random(1)
    texts = [[rng.randrange(5) for _ in range(300)] for _ in range(3)]
    pieces, whole = SuffixIndex(), SuffixIndex()
    for number, text in enumerate(texts):
        whole.append(number, text)
    for start in range(0, 300, 7):  # texts grow side by side
        for number, text in enumerate(texts):
            pieces.append(number, text[start : start + 7])
    for at in range(20, 300, 40):
        context = texts[at % 3][:at]
        assert (
            pieces.speculate(context, SuffixRule(factor=2), 30).score
            == whole.speculate(context, SuffixRule(factor=2), 30).score
        )
        assert sorted(map(len, pieces.places(context))) == sorted(map(len, whole.places(context)))


def test_a_dropped_text_is_forgotten_and_memory_is_bounded():
    index = SuffixIndex(max_tokens=200)
    index.append(0, [1, 2, 3, 4, 5] * 2)
    index.append(1, [1, 2, 3, 9])
    index.drop(0)
    assert index.speculate([8, 1, 2, 3], SuffixRule(), 10).tokens == (9,) and len(index) == 4
    for number in range(2, 60):
        index.append(number, [number] * 10 + [1, 2, 3, number])
        assert len(index) <= 200 and sum(map(len, index.twos.values())) <= 200
    assert index.speculate([1, 2, 3, 59], SuffixRule(), 10).score >= 0 and index.speculate(
        [0, 1, 2, 3], SuffixRule(), 4
    ).tokens == (59,)
    index.append(99, list(range(1000)))
    assert len(index) == 200 and index.speculate([7, 900, 901], SuffixRule(), 4).tokens == (902, 903)
