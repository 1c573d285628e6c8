"""Costs of cascades: the numbers of methods/polybasic.md."""

import random

import pytest

from draftsmith.eval.measurement.cascades import (
    Bottom,
    Pair,
    accepted_share,
    all_chains,
    best_buffer,
    exact_inserts,
    paper_inserts,
    paper_time,
    predict,
    row_seconds,
    time_per_token,
    tokens_a_pass,
)

T1, T2, T3, BETA, L2 = 25, 10, 1.2, 6, 4.2
BELOW = (T2 + BETA * T3) / L2


@pytest.mark.parametrize(("a", "buffer", "seconds"), [(0.90, 7, 9.42), (0.95, 12, 7.62), (0.98, 20, 6.18)])
def test_the_best_buffer(a, buffer, seconds):
    assert best_buffer(lambda rows: T1, Pair((a,), (8,), (BELOW,), (0.0,)))[0] == buffer
    assert time_per_token(lambda rows: T1, BELOW, a, buffer) == pytest.approx(seconds, abs=0.005)


def test_the_criteria():
    assert (T1 + BETA * T3) / 4 == pytest.approx(8.05)
    assert T2 / T1 < L2 * (1 / 4 - 1 / 9.5) == pytest.approx(0.608, abs=1e-3)
    assert paper_inserts(T2, T1, L2, 4, 9.5) and exact_inserts(T2, T1, BETA * T3, L2, 4, 9.5)
    assert L2 * ((T1 + BETA * T3) / 4 - T1 / 9.5) == pytest.approx(22.76, abs=5e-3)
    assert paper_time([T1], [4], BETA * T3) == pytest.approx(8.05)
    assert paper_time([T1, T2], [9.5, L2], BETA * T3) == pytest.approx(6.73, abs=5e-3)
    # A copy that costs as much as the target never pays, and one that agrees no better does not either
    assert not paper_inserts(T1, T1, L2, 4, 9.5) and not exact_inserts(T2, T1, BETA * T3, L2, 4, 4)


def test_the_exact_criterion_is_that_of_the_times():
    """It holds exactly where the chain of three takes less time a token than the two."""
    numbers = random.Random(0)
    for _ in range(200):
        t_new, drafting = numbers.uniform(1, 30), numbers.uniform(0, 10)
        l_new, l_old = numbers.uniform(1, 6), numbers.uniform(1, 6)
        l_with = numbers.uniform(l_old, 12)
        faster = paper_time([T1, t_new], [l_with, l_new], drafting) < paper_time([T1], [l_old], drafting)
        assert exact_inserts(t_new, T1, drafting, l_new, l_old, l_with) == faster


def test_capped_geometric_lengths():
    """Theorem 3.3, n = 10: the mean accepted length of alpha = .3, .1, .05, .01."""
    for alpha, mean in ((0.3, 2.2674), (0.1, 5.8619), (0.05, 7.6240), (0.01, 9.4662)):
        assert tokens_a_pass(1 - alpha, 10) - 1 == pytest.approx(mean, abs=5e-5)


def test_chains_are_counted_from_their_end():
    passes = {"target": lambda rows: 25.0, "middle": lambda rows: 10.0, "small": lambda rows: 3.0}
    alone = Bottom(32.2, 7.2, 4.0)
    pairs = {
        ("target", "middle"): Pair((0.95,), (8,), (17.2 / 4.2,), (0.0,)),
        ("target", "small"): Pair((0.6,), (8,), (2.0,), (0.0,)),
        ("middle", "small"): Pair((0.8,), (8,), (4 / 3,), (0.0,)),
    }
    assert predict((), "target", passes, alone, pairs).seconds == pytest.approx(8.05)
    one = predict(("middle",), "target", passes, alone, pairs)
    assert one.buffers == (12,) and one.seconds == pytest.approx(7.62, abs=5e-3)
    both = predict(("middle", "small"), "target", passes, alone, pairs, (12, 4))
    below = (10 + 4 * 4 / 3) / tokens_a_pass(0.8, 4)
    assert both.seconds == pytest.approx((25 + 12 * below) / tokens_a_pass(0.95, 12))
    assert all_chains(["middle", "small"], pairs) == [(), ("middle",), ("small",), ("middle", "small")]


def test_what_the_last_pass_gives_beyond_the_buffer_counts():
    """A buffer of 4 that holds 5.5 tokens on average: their drafting is paid, and they may be accepted."""
    passes, alone = {"target": lambda rows: 20.0 + rows, "middle": lambda rows: 10.0}, Bottom(32.2, 7.2, 4.0)
    pair = Pair((0.9,), (8,), (4.0,), (1.5,))
    found = predict(("middle",), "target", passes, alone, {("target", "middle"): pair}, (4,))
    assert found.length == pytest.approx((tokens_a_pass(0.9, 5) + tokens_a_pass(0.9, 6)) / 2)
    assert found.seconds == pytest.approx((20 + 6.5 + 5.5 * 4) / found.length)
    assert tokens_a_pass(1.0, 2.5) == 3.5
    assert tokens_a_pass((0.5, 0.9, 0.8), 4) == pytest.approx(1 + 0.5 + 0.45 + 0.36 + 0.288)
    longest = max(range(1, 25), key=lambda m: -time_per_token(passes["target"], 4.0, 0.9, m + 1.5))
    assert best_buffer(passes["target"], pair)[0] == longest


def test_a_longer_buffer_has_a_cost_of_its_own():
    """A drafter that gives less in long buffers: 2 seconds a token in 8, 4 in 24, so 3 in 16."""
    pair = Pair((0.98,), (8, 24), (2.0, 4.0), (0.0, 1.0))
    assert pair.at(16) == (3.0, 16.5) and pair.at(4) == (2.0, 4.0) and pair.at(30) == (4.0, 31.0)
    passes, alone = {"target": lambda rows: 25.0}, Bottom(32.2, 7.2, 4.0)
    found = predict(("middle",), "target", passes, alone, {("target", "middle"): pair}, (16,))
    assert found.seconds == pytest.approx((25 + 16.5 * 3) / tokens_a_pass(0.98, 16.5))
    assert best_buffer(passes["target"], pair)[0] < best_buffer(passes["target"], pair, below=2.0)[0]


def test_measured_costs_and_chances():
    cost = row_seconds([1, 4, 8], [10.0, 13.0, 21.0])
    assert [cost(n) for n in (1, 2, 4, 6, 8, 10)] == [10, 11, 13, 17, 21, 25]
    # Draws of 0.8 with at most 5 tokens: passes that accept all say nothing of a sixth
    numbers = random.Random(1)
    accepted = [next((k for k in range(5) if numbers.random() > 0.8), 5) for _ in range(20000)]
    assert accepted_share(accepted, [5] * 20000) == pytest.approx(0.8, abs=0.01)
