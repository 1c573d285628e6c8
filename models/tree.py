"""DraftTree: what a drafter proposes and a target verifies in one pass.

A batch of trees, packed and topologically ordered (parents before children, node 0 = root = the last emitted token, which
the target has not processed yet). Everything else (ancestors, depths, positions) is derived here and stored nowhere.
Ragged batches are padded with nodes of parent -1 that see only themselves and are never walked.
Size counts the root; depth counts drafted levels.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch


class Kind(IntEnum):
    """How the edge from its parent to a node was drawn; a verifier states for which kinds it is lossless."""

    ONE_HOT = 0  # any rule that does not sample from the draft distribution (top-k, lookup, ...)
    WITHOUT_REPLACEMENT = 1
    IID = 2


@dataclass(frozen=True)
class DraftTree:
    """tokens [B, N] int64 target ids, parents [B, N] int64 (-1 for the root and for padding), kind [B, N] int8.

    Siblings stand in draw order.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    kind: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor, parents: torch.Tensor) -> "DraftTree":
        """A tree whose edges are all ONE_HOT."""
        return cls(tokens, parents, torch.zeros_like(tokens, dtype=torch.int8))

    @classmethod
    def root_only(cls, root: torch.Tensor) -> "DraftTree":
        """Trees of one node, root [B]: verifying them is plain decoding."""
        return cls.of(root[:, None], torch.full_like(root[:, None], -1))

    @property
    def size(self) -> int:
        return self.tokens.size(1)

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """[B, N, N] bool: [b, i, j] iff j is i or an ancestor of i."""
        batch, size = self.tokens.shape
        reach = torch.eye(size, device=self.tokens.device).expand(batch, size, size).clone()
        if size == 1:
            return reach.bool()
        child, parent = self.parents.clamp(min=0)[..., None], (self.parents >= 0).float()[..., None]
        reach.scatter_add_(2, child, parent)
        covered = 1  # reach holds all paths of up to `covered` edges
        while covered < size - 1:
            wider = (reach @ reach).clamp_(max=1)
            if torch.equal(wider, reach):
                break
            reach, covered = wider, covered * 2
        return reach.bool()

    @cached_property
    def depths(self) -> torch.Tensor:
        """[B, N] int64: number of edges to the root (0 for the root and for padding)."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def real(self) -> torch.Tensor:
        """[B, N] bool: not padding."""
        real = self.parents >= 0
        real[:, 0] = True
        return real
