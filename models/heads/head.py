"""What all draft heads have; `draftsmith.models.heads` lists the rest of their contract."""

import torch
from torch import nn


class DraftHead(nn.Module):
    """A head says what it can beyond the contract by having it: `regress`, `grow` and `follow` are None where not."""

    tables: tuple[str, ...] = ()
    regress = grow = follow = None

    def nothing(self) -> torch.Tensor:
        """The loss of a batch without supervised rows: 0, with a gradient of 0 for every parameter."""
        return sum(p.sum() * 0.0 for p in self.parameters())
