"""Traversal Verification (Weng et al., 2025, arXiv 2505.12398) and, on a chain, block verification (Sun et al., 2024,
arXiv 2403.10444).

The tree is judged from its leaves to the root: a whole path is accepted or not, so that a token that alone would be
rejected may still pass as part of a likely path. Nodes are tried in post-order. When one is tried all before it were
rejected, hence the thresholds depend on the tree, p and q alone: they are computed level by level without any random
number.
"""

from functools import lru_cache

import torch

from draftsmith.eval.verification.rejection import Residuals
from draftsmith.eval.verification.schedule import schedule
from draftsmith.eval.verification.support import target_ids
from draftsmith.eval.verification.verifier import DraftVerifier, Law
from draftsmith.models.tree import DraftTree, Form, Kind


def first_hit(chances: torch.Tensor) -> torch.Tensor:
    """chances [..., N] of independent trials -> [..., N]: the probability that each is the first to succeed."""
    missed = (1 - chances).cumprod(-1)
    return chances * torch.cat([torch.ones_like(missed[..., :1]), missed[..., :-1]], -1)


@lru_cache(maxsize=64)
def is_chain(form: Form) -> bool:
    """No tree of this form branches, and padding stands behind."""
    chain = tuple(range(-1, len(form.parents[0]) - 1))
    lengths = [len(parents) - parents[1:].count(-1) for parents in form.parents]
    return all(parents == chain[:n] + (-1,) * (len(parents) - n) for parents, n in zip(form.parents, lengths))


class Block(DraftVerifier):
    """w_i = min(1, w_{i-1} p(x_i) / q(x_i)); the longest prefix i with eta < h_i is kept, h_i = S_i / (S_i + 1 - w_i)
    with S_i = sum [w_i p - q]_+ behind it, h_n = w_n. The same law as traversal on a chain, with all rows of a chain at
    once.
    """

    name = "block"
    remedy = "verify trees with traversal"

    def _wrong_shape(self, form: Form) -> str:
        return "" if is_chain(form) else "a tree that branches, expected chains (padded behind)"

    def law(self, tree, logits):
        plan, p = schedule(tree), logits.softmax(-1)
        hot = (tree.kind[:, 1:] == Kind.ONE_HOT)[..., None]
        below = torch.where(plan.real[:, 1:], tree.tokens[:, 1:], 0)[..., None]
        proposal = torch.zeros_like(p[:, :-1]).scatter_(2, below, 1.0)
        if tree.q is not None:
            q = target_ids(tree.q.to(p.dtype), tree.ids, p.size(-1))
            proposal = torch.where(hot, proposal, q.gather(1, plan.drawn[:, :-1, None].expand_as(proposal)))
        tiny, here = torch.finfo(p.dtype).eps ** 2, plan.real
        ratio = (p[:, :-1].gather(2, below).double() / proposal.gather(2, below).double().clamp(min=tiny))[..., 0]
        weights = [
            torch.ones_like(ratio[:, 0]) if tree.size > 1 else torch.ones(len(p), dtype=torch.float64, device=p.device)
        ]
        for step in range(tree.size - 1):
            weights.append((weights[-1] * ratio[:, step]).clamp(max=1))
        w = torch.stack(weights, 1) * here
        left = (w[:, :-1, None].to(p.dtype) * p[:, :-1] - proposal).clamp_(min=0)
        rest = left.sum(-1).double()
        more = here[:, 1:]
        kept = torch.where(more, rest / (rest + (1 - w[:, :-1])).clamp(min=tiny), w[:, :-1])
        thresholds = torch.cat([kept, w[:, -1:]], 1)
        thresholds[:, 0] = 1.0

        def following(last):
            rows, inside = torch.arange(len(last), device=last.device), last.clamp(max=tree.size - 2)
            raw = p[rows, last]
            if tree.size == 1:
                return raw
            residual = left[rows, inside]
            ended = (last == tree.size - 1) | ~more[rows, inside] | (residual.sum(1) == 0)
            return torch.where(ended[:, None], raw, residual)

        return Law(first_hit(thresholds.flip(1)).flip(1), following, plan.depths)


BLOCK = Block()


class Traversal(DraftVerifier):
    """Lossless (Theorem 3.3) for all kinds of edge, if how many children a node has is known before they are drawn."""

    name = "traversal"

    def law(self, tree, logits):
        if is_chain(tree.form):
            return BLOCK.law(tree, logits)
        return self.by_levels(tree, logits)

    def by_levels(self, tree: DraftTree, logits: torch.Tensor) -> Law:
        """w(child) = min(1, w p(x) / q(x)) when its turn among its siblings comes; once all of a node's children were
        rejected its own w is its threshold (Algorithm 2).
        """
        left = Residuals(tree, logits)
        for wave in left.plan.waves:
            left.w.index_copy_(0, wave.child, left.reject(wave))
        plan, thresholds = left.plan, left.w.view_as(tree.tokens) * left.plan.real
        thresholds[:, 0] = 1.0
        stop = torch.zeros_like(thresholds).scatter_(1, plan.order, first_hit(thresholds.gather(1, plan.order)))
        return Law(stop, left.following, plan.depths)
