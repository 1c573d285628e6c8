"""95 % intervals by the percentile bootstrap (Efron and Tibshirani, 1993, chapter 13), resampling prompts (or batches
of prompts).

Figures here are ratios of sums (tokens over passes, seconds over seconds). A draw takes the same units in every sum of
a figure, so that comparisons of methods on the same prompts are paired.
"""

import torch

LEVEL, DRAWS = 0.95, 2000


def _sums(values: list[list[float]], seed: int) -> torch.Tensor:
    """values: K lists over the same U units -> [K, DRAWS] sums over U units drawn with replacement."""
    table = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(table.size(1), (DRAWS, table.size(1)), generator=torch.Generator().manual_seed(seed))
    return table[:, draws].sum(-1)


def _bounds(draws: torch.Tensor) -> list[float]:
    margin, draws = (1 - LEVEL) / 2, draws[draws.isfinite()]
    if not len(draws):
        return [0.0, 0.0]  # nothing was counted at all
    return torch.quantile(draws, torch.tensor([margin, 1 - margin], dtype=torch.float64)).tolist()


def ratio_interval(above: list[float], below: list[float], seed: int = 0) -> list[float]:
    """[low, high] of sum(above) / sum(below), one entry a unit. A single unit gives no width."""
    top, bottom = _sums([above, below], seed)
    return _bounds(top / bottom)


def difference_interval(
    first: tuple[list[float], list[float]], second: tuple[list[float], list[float]], seed: int = 0
) -> list[float]:
    """[low, high] of first ratio - second ratio; both are (above, below) over the same units."""
    sums = _sums([*first, *second], seed)
    return _bounds(sums[0] / sums[1] - sums[2] / sums[3])


def quotient_interval(
    first: tuple[list[float], list[float]], second: tuple[list[float], list[float]], seed: int = 0
) -> list[float]:
    """[low, high] of first ratio / second ratio, as in `difference_interval`."""
    sums = _sums([*first, *second], seed)
    return _bounds(sums[0] / sums[1] / (sums[2] / sums[3]))
