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
    accepted, by its depth, the last for all deeper ones. By sizes of buffers, rising: seconds: a token of the lower one
    with the drafter below it; more: tokens that its last pass gives beyond the buffer on average. Both are taken to be
    straight between the sizes, and those of the nearest outside.
    """

    chances: tuple[float, ...]
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    more: tuple[float, ...]

    def at(self, size: int) -> tuple[float, float]:
        """(seconds a token, tokens of a buffer on average) for buffers of this size."""
        more = float(np.interp(size, self.sizes, self.more))
        return float(np.interp(size, self.sizes, self.seconds)), size + more


def best_buffer(t: Callable[[float], float], pair: Pair, below: float | None = None) -> tuple[int, float]:
    """(buffer, seconds a token) of the least time. below: seconds a token of the lower model, where they are not those
    of the pair.
    """

    def taken(size: int) -> float:
        seconds, tokens = pair.at(size)
        return time_per_token(t, seconds if below is None else below, pair.chances, tokens)

    return min(((size, taken(size)) for size in range(1, LARGEST_BUFFER + 1)), key=lambda found: found[1])


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
    seconds, length = alone.per_token, alone.length
    for number in reversed(range(len(chain))):
        above, pair = passes[models[number]], pairs[models[number], models[number + 1]]
        lowest = number == len(chain) - 1
        buffer = buffers[number] if buffers else best_buffer(above, pair, None if lowest else seconds)[0]
        own, mean = pair.at(buffer)
        seconds = time_per_token(above, own if lowest else seconds, pair.chances, mean)
        length = tokens_a_pass(pair.chances, mean)
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
