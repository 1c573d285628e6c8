"""Online learners that weigh N drafters (Not-a-Bandit, ICLR 2026, sections 4 and 7 of its baselines), one a request.

All feed on losses in [0, 1]. Hedge, NormalHedge and AdaNormalHedge take the losses of all drafters, which may come
late: they are fed as soon as they are known, one position after the other (the queue form of Joulani et al., 2013). The
bandits UCB1 and EXP3 take the loss of the drafter that was chosen, and nothing else.
"""

from collections.abc import Callable
from math import e, exp, log, sqrt
from typing import Protocol

import numpy as np

from draftsmith.models.errors import UserError

LARGEST = 700.0  # exponent


class Learner(Protocol):
    bandit: bool  # feeds on the chosen drafter's loss alone

    def feed(self, losses: np.ndarray, chosen: int = 0) -> None:
        """losses [N]; bandits read losses[chosen]."""

    def weights(self) -> np.ndarray:
        """[N], of sum 1: the probabilities with which the next drafter is chosen."""


class Hedge:
    """w ~ exp(-eta L), L the losses so far, eta = sqrt(8 ln N / t): anytime (Cesa-Bianchi and Lugosi, 2006)."""

    bandit = False

    def __init__(self, count: int):
        self.losses, self.fed = np.zeros(count), 0

    def feed(self, losses, chosen=0):
        self.losses, self.fed = self.losses + losses, self.fed + 1

    def weights(self):
        eta = sqrt(8 * log(max(2, len(self.losses))) / max(1, self.fed))
        return normalised(np.exp(-eta * (self.losses - self.losses.min())))


class NormalHedge:
    """Parameter-free (Chaudhuri, Freund and Hsu, 2009): w_i ~ [R_i]_+ / c exp([R_i]_+^2 / 2c), R the regrets to each
    drafter and c such that the mean of exp([R_i]_+^2 / 2c) is e; uniform while no regret is positive.
    """

    bandit = False

    def __init__(self, count: int):
        self.regrets = np.zeros(count)

    def feed(self, losses, chosen=0):
        self.regrets = self.regrets + self.weights() @ losses - losses

    def weights(self):
        positive = np.maximum(self.regrets, 0)
        if positive.max() <= 0:
            return np.full(len(positive), 1 / len(positive))
        c = self.scale(positive)
        return normalised(positive / c * np.exp(np.minimum(positive**2 / (2 * c), LARGEST)))

    @staticmethod
    def scale(positive: np.ndarray) -> float:
        """c, by bisection."""
        squares = [r * r / 2 for r in positive.tolist()]  # few numbers: plain floats are faster than arrays
        mean = lambda c: sum(exp(min(square / c, LARGEST)) for square in squares) / len(squares)  # noqa: E731
        low = high = max(squares)
        while mean(low) <= e:
            low /= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) > e else (low, middle)
        return (low + high) / 2


class AdaNormalHedge:
    """Luo and Schapire (2015): w_i ~ prior_i (Phi(R_i + 1, C_i + 1) - Phi(R_i - 1, C_i + 1)) / 2, where Phi(R, C) is
    exp([R]_+^2 / 3C), C the sums of absolute regrets; the prior where all vanish.
    """

    bandit = False

    def __init__(self, count: int, prior: np.ndarray | None = None):
        self.regrets, self.moved = np.zeros(count), np.zeros(count)
        self.prior = np.full(count, 1 / count) if prior is None else normalised(prior)

    def feed(self, losses, chosen=0):
        regret = self.weights() @ losses - losses
        self.regrets, self.moved = self.regrets + regret, self.moved + abs(regret)

    def weights(self):
        phi = lambda r: np.exp(np.minimum(np.maximum(r, 0) ** 2 / (3 * (self.moved + 1)), LARGEST))  # noqa: E731
        found = self.prior * (phi(self.regrets + 1) - phi(self.regrets - 1)) / 2
        return normalised(found) if found.sum() > 0 else self.prior


class Ucb1:
    """Each drafter once, then the one of least mean loss minus sqrt(2 ln t / n_i) (Auer et al., 2002)."""

    bandit = True

    def __init__(self, count: int):
        self.sums, self.counts = np.zeros(count), np.zeros(count, int)

    def feed(self, losses, chosen=0):
        self.sums[chosen] += losses[chosen]
        self.counts[chosen] += 1

    def weights(self):
        if (self.counts == 0).any():
            best = int((self.counts == 0).argmax())
        else:
            bonus = np.sqrt(2 * log(self.counts.sum()) / self.counts)
            best = int((self.sums / self.counts - bonus).argmin())
        return np.eye(len(self.counts))[best]


class Exp3:
    """Importance-weighted losses of the chosen drafter, w ~ exp(-eta L), eta = sqrt(ln N / (t N))."""

    bandit = True

    def __init__(self, count: int):
        self.losses, self.fed = np.zeros(count), 0

    def feed(self, losses, chosen=0):
        self.losses[chosen] += losses[chosen] / self.weights()[chosen]
        self.fed += 1

    def weights(self):
        count = len(self.losses)
        eta = sqrt(log(max(2, count)) / (max(1, self.fed) * count))
        return normalised(np.exp(-eta * (self.losses - self.losses.min())))


class Fixed:
    """Always the drafter of one number."""

    bandit = True

    def __init__(self, count: int, number: int):
        self.chosen = np.eye(count)[number]

    def feed(self, losses, chosen=0):
        pass

    def weights(self):
        return self.chosen


class Uniform:
    """Every drafter as often as any other."""

    bandit = True

    def __init__(self, count: int):
        self.count = count

    def feed(self, losses, chosen=0):
        pass

    def weights(self):
        return np.full(self.count, 1 / self.count)


LEARNERS: dict[str, Callable[[int], Learner]] = {
    "hedge": Hedge,
    "normalhedge": NormalHedge,
    "adanormalhedge": AdaNormalHedge,
    "ucb1": Ucb1,
    "exp3": Exp3,
    "uniform": Uniform,
}


def learner(name: str, count: int) -> Learner:
    """One of `LEARNERS` by its name, or `fixed:NUMBER`. Raises UserError."""
    word, _, number = name.partition("=")
    if word == "fixed" and number.isdigit() and int(number) < count:
        return Fixed(count, int(number))
    if name not in LEARNERS:
        raise UserError(
            f"select: found the rule {name}, expected {', '.join(LEARNERS)} or fixed=NUMBER (0 to {count - 1})"
        )
    return LEARNERS[name](count)


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


# Acceptance lengths


def length_of_product(gammas: np.ndarray) -> float:
    """gammas [K]: the chances that a drafter's proposal is accepted at K consecutive positions -> the expected tokens
    of a pass, 1 + sum_k prod_{j <= k} gamma_j (Theorem 3).
    """
    return 1 + float(np.cumprod(gammas).sum())


def length_of_realised(hits: np.ndarray) -> float:
    """hits [K]: whether the text's own tokens (or with which chance) would have been accepted -> an unbiased estimate,
    1 + sum_k prod_{j <= k} a_j.
    """
    return length_of_product(hits)


def length_of_rao_blackwell(gammas: np.ndarray, hits: np.ndarray) -> float:
    """As `length_of_realised`, with less variance: 1 + sum_k gamma_k prod_{j < k} a_j."""
    before = np.concatenate([[1.0], np.cumprod(hits)[:-1]])[: len(gammas)]
    return 1 + float((gammas * before).sum())


def loss_of(length: float, most: int) -> float:
    """In [0, 1]; most: drafted tokens of the deepest drafter."""
    return 1 - length / (most + 1)
