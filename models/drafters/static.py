"""Trees of a static shape whose nodes are looked up on the host, level by level and for a whole batch at once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.models.grow import StaticTree
from draftsmith.models.tree import DraftTree, Form, Kind


@dataclass(frozen=True)
class Offer:
    """What may stand behind n nodes. ids [n, K] int, in draw order, the first counts [n] of which are there; support
    and q [n, S]: the ids and the distribution that they were drawn from without replacement, None where nothing was
    drawn.
    """

    ids: np.ndarray
    counts: np.ndarray
    support: np.ndarray | None = None
    q: np.ndarray | None = None


def fill(
    shape: StaticTree,
    texts: np.ndarray,
    offer: Callable[[np.ndarray, np.ndarray, np.ndarray], Offer],
    device: torch.device,
) -> DraftTree:
    """texts [B, n]: the last tokens of each request, the root last. offer(rows [m], slots [m], texts [m, n]) is asked
    for the children of nodes of one level: their requests, their numbers in the shape (0 = root) and what each ends.
    A node gets as many children as its slot has and the offer holds, which must not depend on what was drawn.
    """
    widths, first = shape.children
    batch = len(texts)
    rows, slots, nodes, ends = np.arange(batch), np.zeros(batch, int), np.zeros(batch, int), texts
    sizes, levels, drawn = np.ones(batch, int), [], []
    while (inner := widths[slots] > 0).any():
        rows, slots, nodes, ends = rows[inner], slots[inner], nodes[inner], ends[inner]
        offered = offer(rows, slots, ends)
        counts = np.minimum(widths[slots], offered.counts)
        if offered.q is not None:
            some = counts > 0
            drawn.append((rows[some], offered.support[some], offered.q[some]))
        above, ranks = np.nonzero(np.arange(offered.ids.shape[1]) < counts[:, None])
        tokens, parents = offered.ids[above, ranks], nodes[above]
        rows, slots = rows[above], first[slots[above]] + ranks
        ends = np.concatenate([ends[above, 1:], tokens[:, None]], 1)
        new = np.bincount(rows, minlength=batch)
        nodes = np.arange(len(rows)) + (sizes - (new.cumsum() - new))[rows]
        sizes = sizes + new
        levels.append((rows, nodes, tokens, parents))
    return packed(texts[:, -1], levels, drawn, int(sizes.max()), device)


def packed(roots: np.ndarray, levels: list, drawn: list, size: int, device: torch.device) -> DraftTree:
    """levels: (rows, nodes, tokens, parents) of each; drawn: (rows, ids, q) of the nodes with sampled children, in the
    order of their numbers.
    """
    tokens, parents = np.zeros((len(roots), size), np.int64), np.full((len(roots), size), -1)
    tokens[:, 0] = roots
    for rows, nodes, token, parent in levels:
        tokens[rows, nodes], parents[rows, nodes] = token, parent
    kinds = np.where((parents >= 0) & bool(drawn), int(Kind.WITHOUT_REPLACEMENT), int(Kind.ONE_HOT)).astype(np.int8)
    known = Form(tuple(map(tuple, parents.tolist())), tuple(map(tuple, kinds.tolist())))
    on = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    if not drawn or size == 1:
        return DraftTree(on(tokens), on(parents), on(kinds), known=known)
    rows, ids, q = (np.concatenate(values) for values in zip(*drawn))
    order = np.argsort(rows, kind="stable")
    rows, counts = rows[order], np.bincount(rows, minlength=len(roots))
    places = np.arange(len(rows)) - (counts.cumsum() - counts)[rows]
    all_ids = np.zeros((len(roots), counts.max(), ids.shape[1]), np.int64)
    all_q = np.zeros(all_ids.shape)
    all_ids[rows, places], all_q[rows, places] = np.where(q > 0, ids, 0)[order], q[order]
    return DraftTree(on(tokens), on(parents), on(kinds), on(all_q), on(all_ids), known)
