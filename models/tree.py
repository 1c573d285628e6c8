"""DraftTree: what a drafter proposes and a target verifies in one pass.

A batch of trees, packed and topologically ordered (parents before children, node 0 = root = the last emitted token,
which the target has not processed yet). Everything else (ancestors, depths, positions) is derived here and stored
nowhere. Ragged batches are padded with nodes of parent -1 that see only themselves and are never walked. Size counts
the root; depth counts drafted levels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import torch
import torch.nn.functional as F


class Kind(IntEnum):
    """How the edge from its parent to a node was drawn; a verifier states for which kinds it is lossless."""

    ONE_HOT = 0  # any rule that does not sample from the draft distribution (top-k, lookup, ...)
    WITHOUT_REPLACEMENT = 1
    IID = 2


@dataclass(frozen=True)
class Form:
    """Parents and kinds of a batch of trees as the host knows them: one tuple for every row, or a single one that all
    rows share.

    Hashable, so that what a verifier derives from it is derived once and verification never waits for the device.
    """

    parents: tuple[tuple[int, ...], ...]
    kinds: tuple[tuple[int, ...], ...]

    @classmethod
    def shared(cls, parents: list[int], kind: Kind) -> "Form":
        """All rows alike, all edges of one kind."""
        return cls((tuple(parents),), ((int(kind),) * len(parents),))

    def row(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(parents, kinds) of one tree of the batch."""
        return self.parents[index % len(self.parents)], self.kinds[index % len(self.kinds)]

    def drawn(self, index: int) -> list[int]:
        """The nodes of one tree that have sampled children, ascending: the nodes that `DraftTree.q` has rows for."""
        parents, kinds = self.row(index)
        return sorted({p for p, kind in zip(parents, kinds) if p >= 0 and kind != Kind.ONE_HOT})


@dataclass(frozen=True)
class DraftTree:
    """tokens [B, N] int64 target ids, parents [B, N] int64 (-1 for the root and for padding), kind [B, N] int8.

    Siblings stand in draw order. Trees with sampled edges carry the draft distributions: q [B, R, Vd] fp32, row r being
    what the children of the r-th node with sampled children (ascending) were drawn from, before any sibling was taken
    out; ids [Vd] int64 are the target ids of its columns, or ids [B, R, Vd] those of each row (a column that is not
    needed has q = 0, whatever its id). known: the form, where the drafter knows it without asking
    the device. probes: whether the target also processes the drafter's probe (`FeatureSpec.probe`) behind every node,
    which doubles its rows.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    kind: torch.Tensor
    q: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    known: Form | None = None
    probes: bool = False

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
    def form(self) -> Form:
        """Read from the device (which waits for it) where it is not known."""
        if self.known is not None:
            return self.known
        return Form(*(tuple(map(tuple, x.tolist())) for x in (self.parents, self.kind)))

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
            if wider.device.type == "cpu" and torch.equal(wider, reach):
                break  # elsewhere waiting for the answer takes longer than the products that it saves
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

    def follow(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The path along the tokens that the target itself chooses: chosen [B, N], its token after each node -> (path
        [B, N] of nodes, root first, counts [B]; behind them other nodes stand). Siblings may be repeated.
        """
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        wrong = self.tokens != chosen.gather(1, self.parents.clamp(min=0))
        wrong[:, 0] = False
        reached = ~(self.ancestors & (wrong | ~self.real)[:, None]).any(-1)
        on_path = self.ancestors[rows, torch.where(reached, self.depths, -1).argmax(1)]
        counts = on_path.sum(1)
        return torch.sort((~on_path).to(torch.int8), dim=1, stable=True).indices, counts


def rows_of(trees: Iterable[DraftTree]) -> DraftTree:
    """A batch of trees, request b having row b of the b-th of `trees`, or its only row. Smaller ones are padded."""
    trees = list(trees)
    if all(tree is trees[0] for tree in trees):
        return trees[0]
    rows = [b % len(tree.tokens) for b, tree in enumerate(trees)]
    size = max(tree.size for tree in trees)
    pick = lambda name, fill: torch.stack(  # noqa: E731
        [F.pad(getattr(tree, name)[b], (0, size - tree.size), value=fill) for tree, b in zip(trees, rows)]
    )
    joined = DraftTree(pick("tokens", 0), pick("parents", -1), pick("kind", int(Kind.ONE_HOT)))
    joined = replace(joined, probes=any(tree.probes for tree in trees))
    drawn = [tree.q for tree in trees if tree.q is not None]
    if not drawn:
        return joined
    shape = len(trees), max(q.size(1) for q in drawn), max(q.size(2) for q in drawn)
    q = torch.zeros(shape, dtype=torch.float64, device=drawn[0].device)
    ids = torch.zeros(shape, dtype=torch.int64, device=drawn[0].device)
    for number, (tree, b) in enumerate(zip(trees, rows)):
        if tree.q is not None:
            q[number, : tree.q.size(1), : tree.q.size(2)] = tree.q[b]
            ids[number, : tree.q.size(1), : tree.q.size(2)] = tree.ids if tree.ids.dim() == 1 else tree.ids[b]
    return replace(joined, q=q, ids=ids)
