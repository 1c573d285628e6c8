"""In which order the nodes of a batch of trees are judged: index tensors derived once from what the host knows of the
trees' form.

Nodes are numbered flat, row b's node i being b * N + i. Everything here is static for a tree shape, so that a verifier
is a fixed sequence of gathers and row sums: no branch on values, no wait for the device.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

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
    """waves: parents before children, siblings in draw order. inner [I]: flat nodes that have children, and the roots;
    slot: a node's place in `inner`, -1 for other nodes. paths [B, N, D + 1]: the nodes from the root to each node, then
    zeros; depths [B, N]. order [B, N]: the nodes in post-order (children before their parent, earlier subtrees first),
    padding last. real [B, N]. children [B, N, K]: in draw order, then -1; drawn [B, N]: a node's row of q, 0 without
    one. widths: the most children of a node, by its depth.
    """

    waves: tuple[Wave, ...]
    inner: torch.Tensor
    slot: torch.Tensor
    paths: torch.Tensor
    depths: torch.Tensor
    order: torch.Tensor
    real: torch.Tensor
    children: torch.Tensor
    drawn: torch.Tensor
    widths: tuple[int, ...]


def schedule(tree: DraftTree) -> Schedule:
    return _schedule(tree.form, len(tree.tokens), 0 if tree.q is None else tree.q.size(1), tree.tokens.device)


@lru_cache(maxsize=64)
def _schedule(form: Form, batch: int, drawn_rows: int, device: torch.device) -> Schedule:
    size, edges, inner, tables = len(form.parents[0]), [], [], []
    for b in range(len(form.parents)):
        parents, kinds = form.row(b)
        paths, below = [[0]], [[] for _ in range(size)]
        for node in range(1, size):
            paths.append([*paths[parents[node]], node] if parents[node] >= 0 else [0])
            if parents[node] >= 0:
                below[parents[node]].append(node)
        rows = {node: r for r, node in enumerate(form.drawn(b))}
        for node, kids in enumerate(below):
            for rank, kid in enumerate(kids):
                more = any(kinds[later] == Kind.WITHOUT_REPLACEMENT for later in kids[rank + 1 :])
                edges.append(
                    (
                        len(paths[node]),
                        rank,
                        kinds[kid],
                        b * size + kid,
                        b * size + node,
                        len(inner),
                        b * drawn_rows + rows.get(node, 0),
                        more,
                    )
                )
            if kids or node == 0:
                inner.append(b * size + node)
        tables.append(
            (
                paths,
                _post_order(below),
                [node == 0 or p >= 0 for node, p in enumerate(parents)],
                below,
                [rows.get(node, 0) for node in range(size)],
            )
        )
    copies = batch // len(form.parents)  # of everything above, each so many nodes, rows or places further on
    place = {node: i for i, node in enumerate(inner)}

    def tile(values, step):
        values = torch.tensor(values, dtype=torch.int64)
        shifted = values + step * torch.arange(copies)[:, None]
        return torch.where(values < 0, values, shifted).flatten().to(device)

    waves = []
    for (_, _, kind), group in groupby(sorted(edges), key=lambda edge: edge[:3]):
        _, _, _, child, parent, where, drawn, more = zip(*group)
        further = [i for i, m in enumerate(more) if m and kind == Kind.WITHOUT_REPLACEMENT]
        waves.append(
            Wave(
                Kind(kind),
                tile(child, size),
                tile(parent, size),
                tile(where, len(inner)),
                tile(drawn if kind != Kind.ONE_HOT else [], drawn_rows),
                tile(further, len(child)),
            )
        )
    paths, orders, real, children, drawn = zip(*tables)
    widths = [0] * max(len(path) for some in paths for path in some)
    for some, below in zip(paths, children):
        for path, kids in zip(some, below):
            widths[len(path) - 1] = max(widths[len(path) - 1], len(kids))

    def table(values):  # one entry a row, or one for all of them
        values = torch.tensor(values, device=device)
        return values.expand(batch, *values.shape[1:])

    fill = lambda values, length, value: [*values, *[value] * (length - len(values))]  # noqa: E731
    return Schedule(
        tuple(waves),
        tile(inner, size),
        tile([place.get(node, -1) for node in range(len(tables) * size)], len(inner)),
        table([[fill(path, len(widths), 0) for path in some] for some in paths]),
        table([[len(path) - 1 for path in some] for some in paths]),
        table([order + [node for node in range(size) if not there[node]] for order, there in zip(orders, real)]),
        table(real),
        table([[fill(kids, max(widths), -1) for kids in below] for below in children]),
        table(drawn),
        tuple(widths[:-1]),
    )


def _post_order(children: list[list[int]]) -> list[int]:
    order, stack = [], [(0, iter(children[0]))]
    while stack:
        node, rest = stack[-1]
        child = next(rest, None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            stack.append((child, iter(children[child])))
    return order
