"""Speed that survives a machine that others use: what passes cost when nothing disturbs them.

The pieces are single passes, some milliseconds each, of methods that decode the same prompts in turn. What else runs
on the machine can only make a pass slower, so that the low end of many passes is what a pass costs. Only like passes
are compared: they are sorted by the rows of the batch that are left, by the size and depth of their tree and by the
length of the context, and cut into groups of neighbours. A group costs the number of its passes times their 10 %
quantile, phase by phase. The sum over all groups are the robust seconds of a run, and

    robust speedup = plain robust seconds / robust seconds
                   = tau * q(plain pass) / (q(draft) + q(verify) + q(overhead)), averaged over like passes

(per token, where a baseline samples other texts). On a quiet machine passes of a group take nearly the same time, so
that this agrees with the wall's speedup within a few per cent; what differs is the loop's own bookkeeping and passes
behind a change of methods, which only the wall counts. What slows all passes alike, all the time, is not seen.
"""

from collections import Counter
from math import floor, log

import torch

from draftsmith.eval.decode import Pass
from draftsmith.eval.measurement.interval import bounds, resampled

LOW = 0.1  # the quantile
LEAST = 20  # passes of a group
NEAR = 1.25  # contexts of one group differ by less than this factor, where there are enough passes
BUSY = 1.25  # plain passes that take this many times their best on average: others use the machine
DRAWS = 500  # for the interval: quantiles cost more than the sums of other figures
PARTS = ("draft", "verify", "overhead")


def groups(kinds: list[tuple]) -> list[list[int]]:
    """Indices of like entries, at least `LEAST` together. kinds: what an entry does, its context's length last. Where
    there are too few, lengths are mixed before anything else is.
    """
    keys = [(kind[:-1], (*kind[:-1], floor(log(kind[-1], NEAR)))) for kind in kinds]  # without the length, and with it
    left = Counter(key for both in keys for key in both)  # entries that are in no group yet
    found, group = [], []
    for i in sorted(range(len(kinds)), key=lambda i: kinds[i]):
        group.append(i)
        left.subtract(keys[i])
        if len(group) >= LEAST and all(left[key] == 0 or left[key] >= LEAST for key in keys[i]):
            found.append(group)
            group = []
    if group:
        found = [*found[:-1], (found[-1] if found else []) + group]
    return found


def low(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """values [N], weights [D, N] -> [D]: the value that a share `LOW` of the weight stays at or under."""
    order = values.argsort()
    reached = weights[:, order].cumsum(1)
    at = (reached < LOW * reached[:, -1:] - 1e-9).sum(1)
    return values[order][at]


def robust_seconds(units: list[dict], counts: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Seconds {draft, verify, overhead: [D]} of a run in which unit u stands counts[d, u] times (default: once). units:
    as in `measure.Run.seconds`, with `passes` and `begin`. The drafter's own prefill, one a unit, is drafting too: of
    it the quantile is taken per token of the prompt.
    """
    counts = torch.ones(1, len(units), dtype=torch.float64) if counts is None else counts
    passes = [(unit, Pass(*found)) for unit, seconds in enumerate(units) for found in seconds["passes"]]
    total = {part: torch.zeros(len(counts), dtype=torch.float64) for part in PARTS}

    def add(part: str, of: list[int], values: list[float], times: list[float]) -> None:
        weights = counts[:, of] * torch.tensor(times, dtype=torch.float64)
        total[part] += low(torch.tensor(values, dtype=torch.float64), weights) * weights.sum(1)

    for group in groups([found[:4] for _, found in passes]):
        for part in PARTS:
            add(part, [passes[i][0] for i in group], [getattr(passes[i][1], part) for i in group], [1.0] * len(group))
    prompts = [(unit, seconds["passes"][0][3]) for unit, seconds in enumerate(units) if seconds["passes"]]
    for group in groups([(length,) for _, length in prompts]):
        of, lengths = zip(*(prompts[i] for i in group))
        add("draft", list(of), [units[unit]["begin"] / length for unit, length in zip(of, lengths)], list(lengths))
    return total


def robust_ms(units: list[dict]) -> dict[str, float]:
    """Milliseconds of a pass over a batch, by part, the mean over a run."""
    passes = sum(len(seconds["passes"]) for seconds in units)
    return {part: 1e3 * seconds.item() / max(1, passes) for part, seconds in robust_seconds(units).items()}


def robust_figures(tokens: list[int], units: list[dict], plain: tuple[list[int], list[dict]], seed: int = 0) -> dict:
    """tokens emitted and seconds of each unit, of a method and of plain decoding over the same units -> the keys of
    `result.json`. `disturbance`: seconds that the passes took / their robust seconds, 1 where nothing disturbed them.
    """
    draws = resampled(len(units), seed, DRAWS)

    def rate(tokens, units, counts=torch.ones(1, len(units), dtype=torch.float64)):
        return counts @ torch.tensor(tokens, dtype=torch.float64) / sum(robust_seconds(units, counts).values())

    mine, took = rate(tokens, units).item(), sum(seconds[part] for seconds in units for part in PARTS)
    return {
        "robust_tokens_per_second": mine,
        "robust_speedup": mine / rate(*plain).item(),
        "robust_speedup_interval": bounds(rate(tokens, units, draws) / rate(*plain, draws)),
        "robust_ms_per_pass": robust_ms(units),
        "disturbance": took / sum(robust_seconds(units).values()).item(),
    }


def in_words(disturbance: float) -> str:
    """What a reader should make of the disturbance of the plain passes."""
    took = f"plain passes took {disturbance:.1f} times their best"
    if disturbance < BUSY:
        return f"the machine was quiet: {took} on average"
    return (
        f"the machine was busy: {took} on average; totals (wall, busy, accounted, ideal) are not to be trusted, the "
        f"robust figures are"
    )
