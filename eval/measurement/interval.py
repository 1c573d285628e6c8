"""95 % intervals by the percentile bootstrap (Efron and Tibshirani, 1993, chapter 13), resampling prompts (or batches
of prompts).

Figures here are ratios of sums (tokens over passes, seconds over seconds). A draw takes the same units in every sum of
a figure, so that comparisons of methods on the same prompts are paired.
"""

import torch

LEVEL, DRAWS = 0.95, 2000


def resampled(units: int, seed: int, times: int = DRAWS) -> torch.Tensor:
    """[times, units] how often each unit is drawn when as many are drawn with replacement."""
    draws = torch.randint(units, (times, units), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(times, units, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())


def _sums(values: list[list[float]], seed: int) -> torch.Tensor:
    """values: K lists over the same U units -> [K, DRAWS] sums over U units drawn with replacement."""
    return torch.tensor(values, dtype=torch.float64) @ resampled(len(values[0]), seed).T


def bounds(draws: torch.Tensor) -> list[float]:
    """[low, high] of what the draws gave."""
    margin, draws = (1 - LEVEL) / 2, draws[draws.isfinite()]
    if not len(draws):
        return [0.0, 0.0]  # nothing was counted at all
    return torch.quantile(draws, torch.tensor([margin, 1 - margin], dtype=torch.float64)).tolist()


def ratio_interval(above: list[float], below: list[float], seed: int = 0) -> list[float]:
    """[low, high] of sum(above) / sum(below), one entry a unit. A single unit gives no width."""
    top, bottom = _sums([above, below], seed)
    return bounds(top / bottom)


def difference_interval(
    first: tuple[list[float], list[float]], second: tuple[list[float], list[float]], seed: int = 0
) -> list[float]:
    """[low, high] of first ratio - second ratio; both are (above, below) over the same units."""
    sums = _sums([*first, *second], seed)
    return bounds(sums[0] / sums[1] - sums[2] / sums[3])


def quotient_interval(
    first: tuple[list[float], list[float]], second: tuple[list[float], list[float]], seed: int = 0
) -> list[float]:
    """[low, high] of first ratio / second ratio, as in `difference_interval`."""
    sums = _sums([*first, *second], seed)
    return bounds(sums[0] / sums[1] / (sums[2] / sums[3]))
