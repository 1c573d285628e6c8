"""Several problems in one batch, each with a drafter of its own, which learns from one sample of it to the next."""

import torch

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.features import Features
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree, rows_of


class Abreast:
    """drafters: of like kind, the n-th for the n-th request of every batch that begins; requests do not join."""

    idle = None

    def __init__(self, drafters: list[Drafter]):
        self.drafters, self.feature_spec = drafters, drafters[0].feature_spec
        self.size = max(drafter.size for drafter in drafters)

    @property
    def nbytes(self) -> int:
        """Of the largest one."""
        return max(drafter.nbytes for drafter in self.drafters)

    def begin(self, features: Features, root: torch.Tensor) -> None:
        if len(root) != len(self.drafters):
            raise ValueError(f"found {len(root)} requests, expected one for each of {len(self.drafters)} drafters")
        self.going = self.drafters
        for row, drafter in enumerate(self.going):
            drafter.begin(features.of(row), root[row : row + 1])

    def propose(self, draw: Draw) -> DraftTree:
        return rows_of(drafter.propose(draw.of(row)) for row, drafter in enumerate(self.going))

    def observe(self, features: Features, root: torch.Tensor) -> None:
        for row, drafter in enumerate(self.going):
            drafter.observe(features.of(row), root[row : row + 1])

    def select(self, rows: torch.Tensor) -> None:
        self.going = [self.going[row] for row in rows.tolist()]

    def join(self, features: Features, root: torch.Tensor) -> None:
        raise ValueError("found requests that join, expected those of the beginning alone")
