"""Drafting whole trees as captured graphs (models/graphs.py), for heads of `decoding`."""

from functools import partial

import torch
import torch.nn.functional as F

from draftsmith.models.features import Features
from draftsmith.models.graphs import STEP, bucket
from draftsmith.models.grow import NONE, TreeByRows
from draftsmith.models.heads.decoding import Beam, Context, LayerHead
from draftsmith.models.slots import SlotCache
from draftsmith.models.tree import DraftTree


def grown(head, context: Context, policy, root: torch.Tensor, most: int) -> DraftTree:
    """The tree that a policy without draws grows behind a context, root [B]: from a captured graph where the head's
    passes are captured and have a static shape, level by level otherwise. most: rows that no request has more of, so
    that nobody waits for the device to tell.
    """
    eager = lambda: policy.grow(head, head.roots(context), root)  # noqa: E731
    policy = policy.of(len(root)) if isinstance(policy, TreeByRows) else policy
    if not isinstance(head, LayerHead) or not head.graphs.on or head.window is not None or policy == NONE:
        return eager()
    pending, cache, count = context.pending, context.cache, policy.depth + 1
    if pending is None or pending.tokens.size(1) > count:
        return eager()
    visible = bucket(most + count + policy.expanded, STEP)
    cache.hold(visible)
    more = count - pending.tokens.size(1)
    inputs = {
        "tokens": F.pad(pending.tokens, (0, more)),
        "hidden": F.pad(pending.hidden, (0, 0, 0, more)),
        "counts": pending.lengths,
        "lengths": cache.lengths,
        "shift": context.shift,
        "root": root,
    }
    before = context.mark()
    usual = lambda: noted(head, policy, head.roots(context), root)  # noqa: E731
    key, run = ("draft", policy, len(root), visible), partial(static_draft, head, cache, policy, visible)
    found = head.graphs(cache, key, run, usual, inputs)
    cache.lengths, context.pending = before
    if found is None:
        return eager()
    cache.lengths, context.pending = cache.lengths + pending.lengths, None
    return DraftTree.of(*found[:2])


def static_draft(head, cache: SlotCache, policy, visible: int, tokens, hidden, counts, lengths, shift, root):
    """A whole tree in which no shape depends on the lengths [B]; as `noted`."""
    with cache.standing(lengths, visible):
        return noted(head, policy, Beam(Context(cache, Features(tokens, hidden, counts), shift)), root)


def noted(head, policy, beam: Beam, root: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A tree's tokens and parents [B, N], and [B, levels] fp32 the greatest log-probability of each level."""
    watched = Watched(head)
    tree = policy.grow(watched, beam, root)
    return tree.tokens, tree.parents, torch.stack(watched.best, 1)


class Watched:
    """A head as a policy sees it. best: of each `expand`, [B]."""

    def __init__(self, head):
        self.head, self.ids, self.best = head, head.ids, []

    def expand(self, beam, tokens, parents):
        logp, beam = self.head.expand(beam, tokens, parents)
        self.best.append(logp.amax((1, 2)))
        return logp, beam
