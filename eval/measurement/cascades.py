"""What a cascade costs a token, and whether one more model pays (Polybasic Speculative Decoding, ICML 2025, section 3).

A stage that verifies buffers of m tokens, each accepted with chance a, at T(m + 1) seconds a pass, below it a stage
that gives a token in c seconds:

    (T(m + 1) + m c) / (1 + a + ... + a^m)        seconds a token

and at the bottom, a drafter under a model: c = (T + t_draft) / L, L tokens a pass. So a chain is counted from its end,
stage by stage. T, t_draft, L and a are measured, each pair of models by itself: a by depth, since a text whose first
token is accepted is more often an easy one, and m on average, since the last pass below may give more than a buffer has
room for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil

import numpy as np

LARGEST_BUFFER = 24


def tokens_a_pass(chances: float | Sequence[float], buffer: float) -> float:
    """1 + a + ... + a^buffer; for chances that differ by depth, of which the last holds for all deeper ones, 1 + a_1 +
    a_1 a_2 + ...; in between for a buffer that is an average.
    """
    chances = [chances] if isinstance(chances, float) else chances
    tokens = reached = 1.0
    for depth in range(ceil(buffer)):
        reached *= chances[min(depth, len(chances) - 1)]
        tokens += min(1.0, buffer - depth) * reached
    return tokens


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


def time_per_token(t: Callable[[float], float], below: float, chances, buffer: float) -> float:
    """t(rows): seconds of a pass; below: seconds a token of the stage that fills the buffer; chances as of
    `tokens_a_pass`.
    """
    return (t(buffer + 1) + buffer * below) / tokens_a_pass(chances, buffer)


def best_buffer(t: Callable[[float], float], below: float, chances, more: float = 0.0) -> tuple[int, float]:
    """(buffer, seconds a token) of the least time. more: tokens that the last pass below gives beyond the buffer."""
    found = ((m, time_per_token(t, below, chances, m + more)) for m in range(1, LARGEST_BUFFER + 1))
    return min(found, key=lambda pair: pair[1])


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
class Pair:
    """A model under another, as measured while it filled buffers for it. chances: that a token of the lower one is
    accepted, by its depth, the last for all deeper ones; seconds: a token of the lower one with the drafter below it;
    more: tokens beyond the buffer's size that its last pass gives on average.
    """

    chances: tuple[float, ...]
    seconds: float
    more: float


@dataclass(frozen=True)
class Chain:
    """models: middle models from the target down; buffers: one for each; seconds: predicted, a token."""

    models: tuple[str, ...]
    buffers: tuple[int, ...]
    seconds: float
    length: float  # tokens a pass of the target


def row_seconds(widths: Sequence[int], seconds: Sequence[float]) -> Callable[[float], float]:
    """Seconds of a pass of any number of rows, straight between those that were measured and behind the last two."""

    def at(rows: float) -> float:
        if rows > widths[-1]:
            slope = (seconds[-1] - seconds[-2]) / (widths[-1] - widths[-2])
            return seconds[-1] + max(0.0, slope) * (rows - widths[-1])
        return float(np.interp(rows, widths, seconds))

    return at


def predict(
    chain: Sequence[str],
    target: str,
    passes: dict[str, Callable[[float], float]],
    alone: Bottom,
    pairs: dict[tuple[str, str], Pair],
    buffers: Sequence[int] = (),
) -> Chain:
    """A chain of middle models under a target, with the best buffers or the given ones. passes {model: seconds of its
    passes by rows}; alone: the drafter under the target; pairs {(above, below)}.
    """
    models, found = (target, *chain), []
    seconds, length = pairs[models[-2:]].seconds if chain else alone.per_token, alone.length
    for number in reversed(range(len(chain))):
        above, pair = passes[models[number]], pairs[models[number], models[number + 1]]
        buffer = buffers[number] if buffers else best_buffer(above, seconds, pair.chances, pair.more)[0]
        mean = buffer + pair.more
        seconds, length = time_per_token(above, seconds, pair.chances, mean), tokens_a_pass(pair.chances, mean)
        found.insert(0, buffer)
    return Chain(tuple(chain), tuple(found), seconds, length)


def all_chains(candidates: Sequence[str], pairs: dict) -> list[tuple[str, ...]]:
    """Every selection of candidates, the slowest first as they are given, whose pairs were measured; none included."""
    found = [some for n in range(len(candidates) + 1) for some in combinations(candidates, n)]
    return [some for some in found if all(pair in pairs for pair in zip(some, some[1:]))]


def accepted_share(accepted: list[int], drafted: list[int]) -> float:
    """The chance that a drafted token is accepted once those before it are: accepted over tried, a pass that accepts
    all of its tokens having tried no further one.
    """
    tried = sum(n + (n < most) for n, most in zip(accepted, drafted))
    return sum(accepted) / max(1, tried)
