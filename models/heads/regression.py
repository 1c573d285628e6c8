"""Starts of heads in closed form: before the first step a head predicts the target's next state as well as a linear map
of what it sees can. Ridge regressions over some thousand rows of the training data, read by the target once.

Training then begins where hundreds of steps of a random start end; see recipes/README.md for what that gives.
"""

import torch

from draftsmith.models.features import TrainingFeatures

STRENGTH = 0.01  # of the ridge, in units of the regressors' mean square
FEWEST = 2  # rows for each regressor below which a head keeps its other start
ROWS = (8, 40)  # wanted for each: fewer for wide targets, so that a matrix of the regressors keeps within `SIZE`
SIZE = 2**29  # elements


def wanted_rows(regressors: int) -> int:
    """Rows of training data for so many inputs of a regression."""
    least, most = ROWS
    return regressors * min(most, max(least, SIZE // regressors**2))


def ridge(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """inputs [N, d], outputs [N, m] fp32 -> [d, m], the map of least squared error with a penalty on large weights,
    in units in which all inputs have one size.
    """
    size = inputs.square().mean(0).sqrt().clamp_min(1e-6)
    scaled = inputs / size
    gram = (scaled.T @ scaled).double()
    gram.diagonal().add_(STRENGTH * len(inputs))
    return torch.linalg.solve(gram, (scaled.T @ outputs).double()).to(outputs.dtype) / size[:, None]


def principal(outputs: torch.Tensor, rank: int) -> torch.Tensor:
    """outputs [N, m] -> [m, rank], the orthonormal directions that keep most of them."""
    return torch.linalg.eigh((outputs.T @ outputs).double())[1][:, -rank:].flip(1).to(outputs.dtype)


def joined(parts: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """The rows of all parts whose numbers are finite, fp32, each kind behind one another."""
    kinds = [torch.cat([x.float() for x in kind]) for kind in zip(*parts)]
    good = torch.stack([kind.reshape(len(kind), -1).isfinite().all(1) for kind in kinds]).all(0)
    return [kind[good] for kind in kinds]


def every_row(features: TrainingFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows t [N] whose next token lies in the same document, and t + 1."""
    inner = torch.ones(len(features.tokens), dtype=torch.bool)
    inner[torch.tensor(features.packing.borders[1:]) - 1] = False
    here = inner.nonzero().flatten().to(features.tokens.device)
    return here, here + 1


def supervised_pairs(features: TrainingFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows t [N], places in `packing.rows` [N]) of rows whose own final state is known too: those right behind another
    supervised row of their document.
    """
    rows, positions = features.packing.rows, features.packing.positions
    follows = (rows.diff() == 1) & (positions[rows[1:]] > 0)
    places = follows.nonzero().flatten() + 1
    return rows[places].to(features.tokens.device), places.to(features.tokens.device)
