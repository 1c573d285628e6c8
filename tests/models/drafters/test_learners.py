"""Learners over drafters: the numbers of methods/hedge.md, their regrets beside those of bandits."""

import numpy as np
import pytest

from draftsmith.models.drafters.learners import (
    AdaNormalHedge,
    Exp3,
    Hedge,
    NormalHedge,
    Ucb1,
    learner,
    length_of_product,
    length_of_rao_blackwell,
    length_of_realised,
    loss_of,
)
from draftsmith.models.errors import UserError


@pytest.mark.parametrize(
    ("regrets", "c", "weights"),
    [
        ([1, 0.5, -1], 0.289767, [0.879456, 0.120544, 0]),
        ([3, 2, 1, -4], 2.430762, [0.767656, 0.182983, 0.049361, 0]),
    ],
)
def test_normal_hedge_by_its_numbers(regrets, c, weights):
    found = NormalHedge(len(regrets))
    found.regrets = np.array(regrets, float)
    assert NormalHedge.scale(np.maximum(found.regrets, 0)) == pytest.approx(c, abs=1e-6)
    assert found.weights() == pytest.approx(weights, abs=1e-6)
    found.regrets = -np.array(regrets, float).clip(0)
    assert found.weights() == pytest.approx([1 / len(regrets)] * len(regrets))


def test_ada_normal_hedge_by_its_numbers():
    found = AdaNormalHedge(3)
    found.regrets, found.moved = np.array([1, 0.5, -1]), np.array([1.2, 0.9, 1.5])
    assert found.weights() == pytest.approx([0.632556, 0.367444, 0], abs=1e-6)
    found.regrets = np.array([-3.0, -2, -5])
    assert found.weights() == pytest.approx([1 / 3] * 3)


def test_losses_by_their_numbers():
    assert length_of_product(np.array([0.9, 0.5])) == pytest.approx(2.35)
    assert loss_of(2.35, 2) == pytest.approx(0.216667, abs=1e-6)
    assert loss_of(length_of_product(np.ones(5)), 5) == 0
    assert length_of_product(np.zeros(5)) == 1 and loss_of(1, 5) == pytest.approx(5 / 6)
    # sum_k k (1 - gamma_k) prod_{j < k} gamma_j, gamma_{K+1} = 0, is the same
    gammas = np.random.default_rng(0).random(6)
    reach = np.concatenate([[1], np.cumprod(gammas)])
    direct = sum((k + 1) * reach[k] * (1 - (gammas[k] if k < 6 else 0)) for k in range(7))
    assert length_of_product(gammas) == pytest.approx(direct)


def test_which_estimators_are_unbiased():
    """methods/hedge.md 2.1: V = 2, K = 2, p depends on the first token; 221/100 is the truth."""
    root, p, q = [0.5, 0.5], {0: [0.9, 0.1], 1: [0.1, 0.9]}, [0.8, 0.2]
    gamma = lambda row: sum(min(a, b) for a, b in zip(row, q))  # noqa: E731
    ratio = lambda row, x: min(1, q[x] / row[x])  # noqa: E731
    means, seconds = np.zeros(3), np.zeros(3)
    for first in (0, 1):
        for second in (0, 1):
            chance = root[first] * p[first][second]
            gammas = np.array([gamma(root), gamma(p[first])])
            hits = np.array([ratio(root, first), ratio(p[first], second)])
            found = [length_of_product(gammas), length_of_rao_blackwell(gammas, hits), length_of_realised(hits)]
            means, seconds = means + chance * np.array(found), seconds + chance * np.array(found) ** 2
    assert means == pytest.approx([53 / 25, 221 / 100, 221 / 100])
    assert list(np.argsort(seconds - means**2)) == [0, 1, 2]
    first_zero = length_of_rao_blackwell(np.array([0.7, 0.9]), np.array([1.0, 0.0]))
    assert first_zero == pytest.approx(2.6) and length_of_product(np.array([0.7, 0.9])) == pytest.approx(2.33)
    first_one = length_of_rao_blackwell(np.array([0.7, 0.3]), np.array([0.4, 0.0]))
    assert first_one == pytest.approx(1.82) and length_of_product(np.array([0.7, 0.3])) == pytest.approx(1.91)


def play(kind, count: int, seed: int, delay: int = 0, steps: int = 500) -> float:
    """Expected regret of a learner on Bernoulli losses of mean 0.3 (the first) and 0.5, fed `delay` steps late."""
    generator, found, waiting, regret = np.random.default_rng(seed), kind(count), [], 0.0
    means = np.array([0.3] + [0.5] * (count - 1))
    for _ in range(steps):
        weights = found.weights()
        regret += float(weights @ means) - 0.3
        chosen = int(generator.choice(count, p=weights))
        waiting.append(((generator.random(count) < means).astype(float), chosen))
        if len(waiting) > delay:
            found.feed(*waiting.pop(0))
    return regret


@pytest.mark.parametrize("count", [4, 16])
def test_full_information_beats_bandits(count):
    """Simulation of methods/hedge.md section 4: regrets of a few, where a bandit's grows with N."""
    mean = lambda kind, delay=0: np.mean([play(kind, count, seed, delay) for seed in range(2)])  # noqa: E731
    hedges = {kind: mean(kind) for kind in (Hedge, NormalHedge, AdaNormalHedge)}
    bandits = {kind: mean(kind) for kind in (Ucb1, Exp3)}
    assert max(hedges.values()) < 25 and min(bandits.values()) > 5 * hedges[NormalHedge], (hedges, bandits)
    assert mean(NormalHedge, 10) < 25


def test_a_clearly_better_drafter_is_found_within_a_few_dozen_positions():
    for kind in (NormalHedge, AdaNormalHedge, Hedge):
        found = kind(3)
        for _ in range(48):
            found.feed(np.array([0.1, 0.5, 0.5]))
        assert found.weights()[0] > 0.9, kind


def test_bandits_read_the_chosen_loss_alone():
    for kind in (Ucb1, Exp3):
        one, other = kind(3), kind(3)
        for step in range(9):
            losses = np.array([0.2, 0.4, 0.9])
            one.feed(losses, step % 3)
            other.feed(np.where(np.arange(3) == step % 3, losses, 0.7), step % 3)
            assert one.weights() == pytest.approx(other.weights())


def test_names():
    assert learner("fixed=1", 2).weights().tolist() == [0, 1]
    with pytest.raises(UserError, match="select: found the rule best, expected hedge, normalhedge"):
        learner("best", 2)
    with pytest.raises(UserError, match="found the rule fixed=2"):
        learner("fixed=2", 2)
