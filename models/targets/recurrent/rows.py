"""The rows of one forward, as layers with a state see them: which of the new rows stand before each."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Chain:
    """T rows behind one another, of which the first counts [B] are real: the state goes on behind these at once."""

    counts: torch.Tensor
    size: int

    @cached_property
    def real(self) -> torch.Tensor:
        """[B, T] bool."""
        return torch.arange(self.size, device=self.counts.device) < self.counts[:, None]


@dataclass(frozen=True)
class Branches:
    """Rows of a tree, probes included: own [B, T, T] bool, what each row sees of the new ones, itself included;
    ancestors stand before descendants. The state stays behind the kept rows until some are committed.
    """

    own: torch.Tensor

    @property
    def size(self) -> int:
        return self.own.size(1)

    @cached_property
    def reach(self) -> torch.Tensor:
        """[B, T, T] fp32, `own` to sum along paths with."""
        return self.own.float()

    @cached_property
    def levels(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each depth its rows: (of which request [R], which row [R], its parent [R], -1 = the kept rows)."""
        places = torch.arange(self.size, device=self.own.device)
        above = self.own & (places != places[:, None])
        parents, depths = torch.where(above, places, -1).amax(-1), above.sum(-1)
        found = []
        for depth in range(int(depths.max()) + 1):
            request, row = (depths == depth).nonzero(as_tuple=True)
            found.append((request, row, parents[request, row]))
        return found

    def windows(self, width: int) -> torch.Tensor:
        """[B, T, width] int64: the last `width` rows on the path to each row, itself the last, as indices into the
        width - 1 rows kept before and the T new ones behind them.
        """
        found = self._windows.get(width)
        if found is None:
            back, depth = torch.arange(width, device=self.own.device), self.own.sum(-1, keepdim=True)
            places = torch.where(self.own, torch.arange(self.size, device=self.own.device), -1)
            nearest = places.topk(min(width, self.size), -1).values
            nearest = F.pad(nearest, (0, width - nearest.size(-1)), value=-1)
            found = torch.where(back < depth, width - 1 + nearest, width - 2 - back + depth).flip(-1)
            self._windows[width] = found
        return found

    @cached_property
    def _windows(self) -> dict[int, torch.Tensor]:
        return {}


def path_mask(path: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, M] bool: the real nodes of path [B, M]."""
    return torch.arange(path.size(1), device=path.device) < counts[:, None]


def along(path: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """values [B, T, ...] of the nodes path [B, M] -> [B, M, ...]."""
    return values[torch.arange(len(path), device=path.device)[:, None], path]


def decay(sums: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """sums [B, H, T], log-decays summed along each row's path, own [B, T, T] bool -> [B, H, T, T]: what is left at row
    i of what row j wrote, 0 where j is not on the path to i. Masked before exp: other pairs may overflow.
    """
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(~own[:, None], -torch.inf).exp()
