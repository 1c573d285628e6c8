"""Which rows of training-time test go on to the next step: a round of drafting ends where its token is wrong, so that
most of the later steps' rows are never reached in decoding.

`Reached` keeps the rows that drafting would go on with; the loss is then exactly the one whose later steps weigh 0 on
all other rows. `Share` keeps a fixed share of them drawn at random, and weighs each by the inverse of the chance that
it was drawn: the expected loss and gradient are those of all rows.
"""

import math
from collections.abc import Callable

import torch

from draftsmith.models.features import Packing
from draftsmith.models.heads.distill import TeacherDistribution, chunk_rows

BEST = {"greedy": 1, "top": 10}  # the target's first choice must be among so many of the head's


class Reached:
    """Keeps the rows of a step at which the target's first choice is among the `best` most probable tokens of
    logits(outputs [n, h]) [n, Vd], and which take part in the next step.
    """

    def __init__(self, packing: Packing, distribution: TeacherDistribution, logits: Callable, best: int):
        self.packing, self.distribution, self.logits, self.best = packing, distribution, logits, best
        self.factors: list[torch.Tensor | float] = [1.0]

    @torch.no_grad()
    def __call__(self, step: int, here: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        going = self.packing.takes_part(step + 1).to(here.device)[here].nonzero().flatten()
        at, kept = here[going] + step, []
        size = chunk_rows(self.distribution.probs.size(-1), here.device)
        for rows, places in zip(outputs[going].split(size), at.split(size)):
            logits = self.logits(rows)
            wanted = logits.gather(-1, self.distribution.choice[places, None])
            kept.append(((logits > wanted).sum(-1) < self.best) & self.distribution.covered[places])
        self.factors.append(1.0)
        return going[torch.cat(kept)] if kept else going


class Share:
    """Keeps ceil(share n) of the n rows that take part in the next step, drawn without replacement by `generator` (on
    the CPU). factors: of each step's rows, the inverse of the chance that a row got there.
    """

    def __init__(self, packing: Packing, share: float, generator: torch.Generator):
        self.packing, self.share, self.generator = packing, share, generator
        self.factors: list[float] = [1.0]

    def __call__(self, step: int, here: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        going = self.packing.takes_part(step + 1).to(here.device)[here].nonzero().flatten()
        count = math.ceil(self.share * len(going))
        drawn = torch.randperm(len(going), generator=self.generator)[:count].sort().values.to(here.device)
        self.factors.append(self.factors[-1] * len(going) / max(1, count))
        return going[drawn]


def chooser(rows: str | float, packing: Packing, distribution: TeacherDistribution, logits: Callable, seed: int):
    """By the recipe's key; None for all rows."""
    if rows == "all":
        return None
    if isinstance(rows, str):
        return Reached(packing, distribution, logits, BEST[rows])
    return Share(packing, rows, torch.Generator().manual_seed(seed))
