"""What a cascade costs a token, and whether one more model pays (Polybasic Speculative Decoding, ICML 2025, section 3).

A stage that verifies buffers of m tokens, each accepted with chance a, at T(m + 1) seconds a pass, below it a stage
that gives a token in c seconds:

    (T(m + 1) + m c) / (1 + a + ... + a^m)        seconds a token

and at the bottom, a drafter under a model: c = (T + t_draft) / L, L tokens a pass. So a chain is counted from its end,
stage by stage. T, t_draft, L and a are measured, each pair of models by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

LARGEST_BUFFER = 24


def tokens_a_pass(a: float, buffer: int) -> float:
    """1 + a + ... + a^buffer."""
    return float(sum(a**k for k in range(buffer + 1)))


def paper_inserts(t_new: float, t: float, l_new: float, l_old: float, l_with: float) -> bool:
    """Theorem 3.2: t_new / t < l_new (1 / l_old - 1 / l_with); l_new: tokens a pass of the new model with the drafter
    below, l_old and l_with: of the model above without and with the new one.
    """
    return t_new / t < l_new * (1 / l_old - 1 / l_with)


def exact_inserts(t_new: float, t: float, drafting: float, l_new: float, l_old: float, l_with: float) -> bool:
    """The same where the drafter's seconds a pass, which move to the new model, are counted:
    t_new + drafting < l_new ((t + drafting) / l_old - t / l_with).
    """
    return t_new + drafting < l_new * ((t + drafting) / l_old - t / l_with)


def paper_time(times: Sequence[float], lengths: Sequence[float], drafting: float) -> float:
    """Lemma 3.1: sum_i T_i / L_i + drafting / L_{n-1}, seconds a token. times, lengths: of the models that verify."""
    return sum(t / length for t, length in zip(times, lengths)) + drafting / lengths[-1]


def time_per_token(t: Callable[[int], float], below: float, a: float, buffer: int) -> float:
    """t(rows): seconds of a pass; below: seconds a token of the stage that fills the buffer."""
    return (t(buffer + 1) + buffer * below) / tokens_a_pass(a, buffer)


def best_buffer(t: Callable[[int], float], below: float, a: float) -> tuple[int, float]:
    """(buffer, seconds a token) of the least time."""
    return min(((m, time_per_token(t, below, a, m)) for m in range(1, LARGEST_BUFFER + 1)), key=lambda pair: pair[1])


@dataclass(frozen=True)
class Bottom:
    """A drafter under a model. seconds: of one of its passes, drafting included; drafting: of them, the drafter's;
    length: tokens a pass.
    """

    seconds: float
    drafting: float
    length: float

    @property
    def per_token(self) -> float:
        return self.seconds / self.length


@dataclass(frozen=True)
class Chain:
    """models: middle models from the target down; buffers: one for each; seconds: predicted, a token."""

    models: tuple[str, ...]
    buffers: tuple[int, ...]
    seconds: float
    length: float  # tokens a pass of the target


def row_seconds(widths: Sequence[int], seconds: Sequence[float]) -> Callable[[int], float]:
    """Seconds of a pass of any number of rows, straight between those that were measured and behind the last two."""

    def at(rows: int) -> float:
        if rows > widths[-1]:
            slope = (seconds[-1] - seconds[-2]) / (widths[-1] - widths[-2])
            return seconds[-1] + max(0.0, slope) * (rows - widths[-1])
        return float(np.interp(rows, widths, seconds))

    return at


def predict(
    chain: Sequence[str],
    target: str,
    passes: dict[str, Callable[[int], float]],
    alone: Bottom,
    stages: dict[tuple[str, str], float],
    agreement: dict[tuple[str, str], float],
    buffers: Sequence[int] = (),
) -> Chain:
    """A chain of middle models under a target, with the best buffers or the given ones. passes {model: seconds of its
    passes by rows}; alone: the drafter under the target; stages {(above, below): seconds a token of the lower one with
    the drafter below it, as they were while it filled buffers for the upper one}; agreement {(above, below): chance
    that a token of the lower one is accepted}.
    """
    models, found = (target, *chain), []
    seconds, length = stages[models[-2:]] if chain else alone.per_token, alone.length
    for number in reversed(range(len(chain))):
        above, a = passes[models[number]], agreement[models[number], models[number + 1]]
        buffer = buffers[number] if buffers else best_buffer(above, seconds, a)[0]
        seconds, length = time_per_token(above, seconds, a, buffer), tokens_a_pass(a, buffer)
        found.insert(0, buffer)
    return Chain(tuple(chain), tuple(found), seconds, length)


def all_chains(candidates: Sequence[str], agreement: dict) -> list[tuple[str, ...]]:
    """Every selection of candidates, the slowest first as they are given, whose pairs were measured; none included."""
    found = [some for n in range(len(candidates) + 1) for some in combinations(candidates, n)]
    return [some for some in found if all(pair in agreement for pair in zip(some, some[1:]))]


def accepted_share(accepted: list[int], drafted: list[int]) -> float:
    """The chance that a drafted token is accepted once those before it are: accepted over tried, a pass that accepts
    all of its tokens having tried no further one.
    """
    tried = sum(n + (n < most) for n, most in zip(accepted, drafted))
    return sum(accepted) / max(1, tried)
