"""In which order the nodes of a batch of trees are judged: index tensors derived once from what the host knows of the
trees' form.

Nodes are numbered flat, row b's node i being b * N + i. Everything here is static for a tree shape, so that a verifier
is a fixed sequence of gathers and row sums: no branch on values, no wait for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from draftsmith.models.tree import DraftTree, Form, Kind


@dataclass(frozen=True)
class Wave:
    """Children judged at once, of one kind: the k-th children of nodes of one depth, so that no parent occurs twice.
    [n] int64 each.

    child and parent are flat nodes, inner the parents' places in `Schedule.inner`, drawn their rows of q (flat, b * R +
    r; empty for ONE_HOT). more [m]: places in the wave whose parents have further children drawn without replacement.
    """

    kind: Kind
    child: torch.Tensor
    parent: torch.Tensor
    inner: torch.Tensor
    drawn: torch.Tensor
    more: torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """inner [I]: flat nodes that have children, and the roots;
    slot: a node's place in `inner`, -1 for other nodes. paths [B, N, D + 1]: the nodes from the root to each node, then
    zeros; depths [B, N]. order [B, N]: the nodes in post-order (children before their parent, earlier subtrees first),
    padding last. real [B, N]. children [B, N, K]: in draw order, then -1; drawn [B, N]: a node's row of q, 0 without
    one. widths: the most children of a node, by its depth.
    """

    inner: torch.Tensor
    slot: torch.Tensor
    paths: torch.Tensor
    depths: torch.Tensor
    order: torch.Tensor
    real: torch.Tensor
    children: torch.Tensor
    drawn: torch.Tensor
    widths: tuple[int, ...]
    make_waves: Callable[[], tuple[Wave, ...]]

    @cached_property
    def waves(self) -> tuple[Wave, ...]:
        """Parents before children, siblings in draw order. Made when first asked for: a walk down needs none."""
        return self.make_waves()


def schedule(tree: DraftTree) -> Schedule:
    return _schedule(tree.form, len(tree.tokens), 0 if tree.q is None else tree.q.size(1), tree.tokens.device)


@lru_cache(maxsize=64)
def _schedule(form: Form, batch: int, drawn_rows: int, device: torch.device) -> Schedule:
    parents, kinds = np.array(form.parents), np.array(form.kinds)
    (rows, size), copies = parents.shape, batch // len(parents)
    kinds, flat = np.broadcast_to(kinds, parents.shape), np.arange(rows * size).reshape(rows, size)
    first, edge = np.arange(rows)[:, None] * size, parents >= 0
    above = np.where(edge, parents + first, -1).ravel()  # the parent's flat number, -1 for roots and padding
    paths, depths = _paths(parents)
    child = np.flatnonzero(edge.ravel())
    child = child[np.argsort(above[child], kind="stable")]  # siblings together, in draw order
    parent, kind = above[child], kinds.ravel()[child]
    degree = np.bincount(parent, minlength=rows * size)
    rank = np.arange(len(child)) - (degree.cumsum() - degree)[parent]
    drawn = np.zeros(rows * size, bool)
    drawn[parent[kind != Kind.ONE_HOT]] = True
    row_of = np.where(drawn.reshape(rows, size), drawn.reshape(rows, size).cumsum(1) - 1, 0)
    last = np.full(rows * size, -1)  # the last rank that is drawn without replacement
    without = kind == Kind.WITHOUT_REPLACEMENT
    np.maximum.at(last, parent[without], rank[without])
    children = np.full((rows, size, degree.max(initial=0)), -1)
    children.reshape(rows * size, -1)[parent, rank] = child % size
    inside = (degree > 0).reshape(rows, size)
    inside[:, 0] = True
    inner = flat[inside]
    slot = np.full(rows * size, -1)
    slot[inner] = np.arange(len(inner))
    copy = np.arange(copies)[:, None]

    def tile(values: np.ndarray, step: int) -> np.ndarray:
        """The values for every copy of these trees, `step` further on each; negative ones stay."""
        return np.where(values < 0, values, values + step * copy).ravel()

    on = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)  # noqa: E731

    def make_waves() -> tuple[Wave, ...]:
        order = np.lexsort((child, kind, rank, depths.ravel()[child]))
        keys = np.stack([depths.ravel()[child], rank, kind], 1)[order]
        starts = np.flatnonzero(np.concatenate([[True], (keys[1:] != keys[:-1]).any(1)])) if len(keys) else []
        pieces, waves = [], []
        for start, end in zip(starts, [*starts[1:], len(order)]):
            some = order[start:end]
            hot = kind[some[0]] == Kind.ONE_HOT
            rows_of_q = row_of.ravel()[parent[some]] + parent[some] // size * drawn_rows
            more = (
                np.flatnonzero(last[parent[some]] > rank[some])
                if kind[some[0]] == Kind.WITHOUT_REPLACEMENT
                else some[:0]
            )
            pieces += [
                tile(child[some], rows * size),
                tile(parent[some], rows * size),
                tile(slot[parent[some]], len(inner)),
                tile(some[:0] if hot else rows_of_q, rows * drawn_rows),
                tile(more, len(some)),
            ]
            waves.append(int(kind[some[0]]))
        parts = on(np.concatenate([*pieces, np.empty(0, int)])).split([len(piece) for piece in pieces])
        return tuple(Wave(Kind(kind), *parts[5 * i : 5 * i + 5]) for i, kind in enumerate(waves))

    table = lambda values: on(values).expand(batch, *values.shape[1:])  # noqa: E731
    widths = [int(degree.reshape(rows, size)[depths == depth].max()) for depth in range(depths.max())]
    return Schedule(
        on(tile(inner, rows * size)),
        on(tile(slot, len(inner))),
        table(paths),
        table(depths),
        table(_post_order(parents, paths, depths, children)),
        table(edge | (np.arange(size) == 0)),
        table(children),
        table(row_of),
        tuple(widths),
        make_waves,
    )


def _paths(parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """parents [B, N] -> (paths [B, N, D + 1], the nodes from the root to each node, then zeros; depths [B, N])."""
    climbed, at = [], np.broadcast_to(np.arange(parents.shape[1]), parents.shape)
    while (at > 0).any():
        climbed.append(at)
        at = np.where(at > 0, np.take_along_axis(parents, at, 1), 0).clip(min=0)
    steps = np.stack(climbed, 2) if climbed else np.zeros((*parents.shape, 0), int)
    steps[parents < 0] = 0
    depths = (steps > 0).sum(2)
    paths = np.zeros((*parents.shape, depths.max() + 1), int)
    for up in range(depths.max()):
        rows, nodes = np.nonzero(depths > up)
        paths[rows, nodes, depths[rows, nodes] - up] = steps[rows, nodes, up]
    return paths, depths


def _post_order(parents: np.ndarray, paths: np.ndarray, depths: np.ndarray, children: np.ndarray) -> np.ndarray:
    """[B, N]: children before their parent, earlier subtrees first, padding last. A node comes behind the subtrees of
    its elder siblings and of its ancestors' elder siblings, and behind its own.
    """
    batch, size = parents.shape
    real = (parents >= 0) | (np.arange(size) == 0)
    below, rows = np.zeros((batch, size), int), np.arange(batch)[:, None]
    for step in range(paths.shape[2]):
        there = real & (depths >= step)
        np.add.at(below, (np.nonzero(there)[0], paths[..., step][there]), 1)
    sizes = np.where(children >= 0, below[rows[..., None], children], 0)
    ahead = sizes.cumsum(2) - sizes  # nodes in the subtrees of elder siblings
    start = np.zeros((batch, size), int)
    for depth in range(depths.max()):
        b, node, rank = np.nonzero((children >= 0) & (depths == depth)[..., None])
        start[b, children[b, node, rank]] = start[b, node] + ahead[b, node, rank]
    return np.argsort(np.where(real, start + below - 1, size + np.arange(size)), axis=1)
