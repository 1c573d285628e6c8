"""Trees rooted at inner positions of one packed row: the attention of a one-layer head that drafts at many places of a
text at once.

The row's own keys and values are computed once and shared by all roots; a root sees its document's rows before its own,
a node sees those and its ancestors. Roots are taken a few neighbours at a time, so that scores are [roots, heads,
nodes, prefix] of one document and never of the whole row. Plain operations, differentiable in everything.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from draftsmith.models.features import Packing

NEIGHBOURS = 8  # roots whose scores are computed together


class Span(NamedTuple):
    """Roots first .. last - 1 of P, which all see some of the rows start .. stop - 1."""

    first: int
    last: int
    start: int
    stop: int


def spans_of(packing: Packing, at: torch.Tensor) -> list[Span]:
    """at [P]: packed indices of the roots, on the CPU. Roots of one document that follow one another share a span."""
    starts, places = (at - packing.positions[at]).tolist(), at.tolist()
    borders = [0, *(i for i in range(1, len(places)) if starts[i] != starts[i - 1]), len(places)]
    cuts = [
        (i, min(i + NEIGHBOURS, last))
        for first, last in zip(borders, borders[1:])
        for i in range(first, last, NEIGHBOURS)
    ]
    return [Span(i, j, starts[i], max(places[i:j]) - 1) for i, j in cuts]


@dataclass(frozen=True)
class RootedTrees:
    """A beam of P trees. row: (keys, values) [T, H_kv, D] of the packed row, row t consuming x_t's features and
    x_{t+1}; limit [P]: a root sees rows before this one; hidden [P, k, h]: what the next nodes go on from; own: (keys,
    values) [P, n, H_kv, D] of the nodes expanded so far, and seen [P, k, n], which of them each row of `hidden` sees;
    positions [P] and depth: of the next level; window: how many rows a node sees, its own and its ancestors included
    (None: all); levels [n]: the depths of the nodes expanded so far.
    """

    row: tuple[torch.Tensor, torch.Tensor]
    spans: list[Span]
    limit: torch.Tensor
    hidden: torch.Tensor
    own: tuple[torch.Tensor, torch.Tensor]
    seen: torch.Tensor
    positions: torch.Tensor
    depth: int = 0
    window: int | None = None
    levels: tuple[int, ...] = ()

    @classmethod
    def at(
        cls,
        packing: Packing,
        at: torch.Tensor,
        row: tuple[torch.Tensor, torch.Tensor],
        hidden: torch.Tensor,
        window: int | None = None,
    ) -> "RootedTrees":
        """Roots at packed indices at [P] (CPU or the row's device), each at least 1 inside its document; hidden [T, h]
        of the packed row.
        """
        places = at.to(hidden.device)
        none = row[0].new_zeros(len(at), 0, *row[0].shape[1:])
        return cls(
            row,
            spans_of(packing, at.cpu()),
            places - 1,
            hidden[places - 1][:, None],
            (none, none),
            torch.zeros(len(at), 1, 0, dtype=torch.bool, device=hidden.device),
            packing.positions.to(hidden.device)[places] - 1,
            window=window,
        )

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parents: torch.Tensor, scale: float):
        """New nodes query [P, k, H, D], key and value [P, k, H_kv, D] under the rows parents [P, k] of the last level
        -> (attended [P, k, H, D], what the next level finds: own, seen and levels with them)."""
        trees, new = parents.shape
        numbers = torch.arange(trees, device=parents.device)[:, None]
        itself = torch.eye(new, dtype=torch.bool, device=parents.device).expand(trees, -1, -1)
        seen = torch.cat([self.seen[numbers, parents], itself], -1)
        keys, values = torch.cat([self.own[0], key], 1), torch.cat([self.own[1], value], 1)
        grouped, levels = query.unflatten(2, (key.size(2), -1)), (*self.levels, *(self.depth,) * new)
        visible = seen
        if self.window is not None:
            visible = seen & (torch.tensor(levels, device=seen.device) > self.depth - self.window)
        hidden = [self._span(grouped, keys, values, visible, span, scale) for span in self.spans]
        return torch.cat(hidden).flatten(2, 3), {"own": (keys, values), "seen": seen, "levels": levels}

    def _span(self, query, keys, values, seen, span: Span, scale: float):
        """One softmax over the prefix and the nodes of each tree; query [P, k, H_kv, H / H_kv, D] -> the same of the
        span's roots.
        """
        mine, prefix = slice(span.first, span.last), slice(span.start, span.stop)
        query, seen = query[mine], seen[mine]
        rows, limit = torch.arange(span.start, span.stop, device=query.device), self.limit[mine, None]
        before = rows < limit
        if self.window is not None:
            before &= rows > limit + self.depth - self.window
        scores = torch.cat(
            [
                torch.einsum("pkgrd,sgd->pkgrs", query, self.row[0][prefix]),
                torch.einsum("pkgrd,pngd->pkgrn", query, keys[mine]),
            ],
            -1,
        )
        visible = torch.cat([before[:, None].expand(-1, seen.size(1), -1), seen], -1)[:, :, None, None]
        weights = (scores.float() * scale).masked_fill(~visible, float("-inf")).softmax(-1).to(values.dtype)
        whole, own = weights.split([span.stop - span.start, seen.size(-1)], -1)
        return torch.einsum("pkgrs,sgd->pkgrd", whole, self.row[1][prefix]) + torch.einsum(
            "pkgrn,pngd->pkgrd", own, values[mine]
        )
