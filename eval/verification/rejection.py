"""Recursive rejection sampling, with and without replacement: the tree is judged from the root down, a node's children
in draw order.

SpecInfer (Miao et al., 2024) with replacement, Sequoia (Chen et al., 2024) and EAGLE-1 without; a chain is the rule of
Leviathan et al. (2023). ONE_HOT edges are draws from a point mass (q = 1 in EAGLE-2's code), for which the rule equals
sampling and matching in law.
"""

import torch

from draftsmith.eval.verification.schedule import Wave, schedule
from draftsmith.eval.verification.support import support
from draftsmith.eval.verification.verifier import Accepted, DraftVerifier, Law, accept
from draftsmith.models.tree import DraftTree, Kind


class Residuals:
    """What is left of the target's distribution at every node with children while they are rejected one after the
    other.

    p [I, columns]: residuals, in the order of `schedule.inner`, on the columns of `support`; w [B * N] fp64: the
    probability with which a node may still be accepted (a rule that judges each level by itself leaves it at 1);
    q [B * R, columns]: what the next child is drawn from.
    """

    def __init__(self, tree: DraftTree, logits: torch.Tensor):
        self.plan, self.logits = schedule(tree), logits.flatten(0, 1)
        self.support = support(tree, self.plan, logits)
        self.p, self.q = self.support.target(self.plan.inner), self.support.proposals
        self.w = torch.ones(len(self.logits), dtype=torch.float64, device=logits.device)
        self.tiny = torch.finfo(logits.dtype).eps ** 2

    def reject(self, wave: Wave) -> torch.Tensor:
        """Judges a wave of children: [n] fp64, with what probability each is accepted once its turn comes. Their
        parents go on as if it were not:

            r = [w p - q]_+,  S = sum r,  p <- r / S,  w <- S / (S + 1 - w)         (Traversal Verification, equations 1
                and 3)
            q <- q without the child, normalised                                  (without replacement, equation 2)

        where a ONE_HOT child has q = 1 at its token. S = 0: the parent can no longer be accepted.
        """
        token, w = self.support.letters.index_select(0, wave.child)[:, None], self.w.index_select(0, wave.parent)
        left = self.p.index_select(0, wave.inner)
        share = w * left.gather(1, token)[:, 0].double()
        if wave.kind == Kind.ONE_HOT:
            chance = share
            left.scatter_(1, token, 0.0)
            total = left.sum(1)
            rest = w * total.double()
        else:
            q = self.q.index_select(0, wave.drawn)
            drawn = q.gather(1, token)[:, 0].double()
            chance = torch.where(drawn > 0, share / drawn, 0.0)
            left.mul_(w[:, None].to(left.dtype)).sub_(q).clamp_(min=0)
            total = left.sum(1)
            rest = total.double()
            if len(wave.more):
                q.scatter_(1, token, 0.0)
                q = q.index_select(0, wave.more)
                self.q.index_copy_(
                    0, wave.drawn.index_select(0, wave.more), q / q.sum(1, keepdim=True).clamp(min=self.tiny)
                )
        gone = rest <= self.tiny
        self.w.index_copy_(0, wave.parent, torch.where(gone, 0.0, rest / (rest + (1 - w)).clamp(min=self.tiny)))
        self.p.index_copy_(0, wave.inner, left.div_(total.masked_fill(gone, float("inf"))[:, None]))
        return chance.clamp(max=1)

    def following(self, last: torch.Tensor) -> torch.Tensor:
        """last [B] -> [B, V]: the residual of a node whose children were all rejected, the target's own row where
        nothing was (or is left).
        """
        flat = torch.arange(len(last), device=last.device) * (len(self.logits) // len(last)) + last
        place = self.plan.slot.index_select(0, flat)
        left, raw = self.p.index_select(0, place.clamp(min=0)), self.logits.index_select(0, flat).softmax(-1)
        return torch.where(((place < 0) | (left.sum(1) == 0))[:, None], raw, self.support.spread(left, flat))


class Rejection(DraftVerifier):
    """Accepts a child with probability min(1, p(x) / q(x)) and goes on below it with fresh p and q, or rejects it: p <-
    norm([p - q]_+). Lossless for all kinds of edge, if how many children a node has is known before they are drawn.
    """

    name = "rejection"

    def law(self, tree, logits):
        left = Residuals(tree, logits)
        reach = torch.ones_like(left.w)
        stay = torch.ones_like(left.w)  # no child accepted so far
        for wave in left.plan.waves:
            chance, open_ = left.reject(wave), stay.index_select(0, wave.parent)
            reach.index_copy_(0, wave.child, reach.index_select(0, wave.parent) * open_ * chance)
            stay.index_copy_(0, wave.parent, open_ * (1 - chance))
        return Law((reach * stay).view_as(tree.tokens) * left.plan.real, left.following, left.plan.depths)

    def __call__(self, tree, logits, noise) -> Accepted:
        """The same law by walking down one path a row, which touches no node beside it: depth times width steps of [B,
        columns].
        """
        self.check(tree)
        plan, rows, tiny = (
            schedule(tree),
            torch.arange(len(tree.tokens), device=logits.device),
            torch.finfo(logits.dtype).eps ** 2,
        )
        kinds = {kind for row in tree.form.kinds for kind in row[1:]}
        found, drafts = support(tree, plan, logits), 0 if tree.q is None else tree.q.size(1)
        letters = found.letters.view_as(tree.tokens)
        uniform, at = noise.uniform(tree.size, logits.device), torch.zeros_like(rows)
        going, ended, weights = torch.ones_like(rows, dtype=torch.bool), at, None
        for width in plan.widths:
            p, taken = found.target(rows * tree.size + at), at
            q = found.proposal(rows * drafts + plan.drawn[rows, at])
            weights = p if weights is None else weights
            for rank in range(width):
                place = plan.children[rows, at, rank]
                child, proposal = place.clamp(min=0), q
                token, kind = letters[rows, child][:, None], tree.kind[rows, child][:, None]
                if Kind.ONE_HOT in kinds:
                    proposal = torch.where(kind == Kind.ONE_HOT, torch.zeros_like(p).scatter_(1, token, 1.0), q)
                drawn, tried = proposal.gather(1, token)[:, 0], going & (taken == at) & (place >= 0)
                hit = tried & (drawn > 0) & (uniform[rows, child] * drawn < p.gather(1, token)[:, 0])
                left = (p - proposal).clamp_(min=0)
                total = left.sum(1, keepdim=True)
                p = torch.where((tried & ~hit)[:, None] & (total > tiny), left / total.clamp(min=tiny), p)
                if Kind.WITHOUT_REPLACEMENT in kinds and rank + 1 < width:
                    without = q.scatter(1, token, 0.0)
                    q = torch.where(
                        kind == Kind.WITHOUT_REPLACEMENT, without / without.sum(1, keepdim=True).clamp(min=tiny), q
                    )
                taken = torch.where(hit, child, taken)
            weights, ended = torch.where(going[:, None], p, weights), torch.where(going, at, ended)
            going, at = going & (taken != at), taken
        raw = logits[rows, at].softmax(-1)
        if weights is not None:
            raw = torch.where(going[:, None], raw, found.spread(weights, rows * tree.size + ended))
        return accept(tree, at, raw, noise)
