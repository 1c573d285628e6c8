"""SpecTr's k-sequential selection (Sun et al., 2023, algorithm 2) of one level: k i.i.d. drafts, at most one of them
accepted.
"""

import torch

from draftsmith.eval.verification.schedule import schedule
from draftsmith.eval.verification.support import target_ids
from draftsmith.eval.verification.verifier import DraftVerifier, Law
from draftsmith.models.tree import Form, Kind


def k_seq(p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """p, q [B, V], drafts [B] (their number k, at least 1) -> rho, beta [B] fp64: beta(rho) = sum min(q, p / rho), and
    rho in [1, k] solves 1 - (1 - beta)^k = rho beta. By bisection; the upper end is taken, where no token is accepted
    too often.
    """
    p, q, k = p.double(), q.double(), drafts.double()
    beta = lambda rho: torch.minimum(q, p / rho[:, None]).sum(1)  # noqa: E731
    low, high = torch.ones_like(k), k.clone()
    for _ in range(60):
        middle = (low + high) / 2
        accepted = beta(middle)
        above = 1 - (1 - accepted) ** k <= middle * accepted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high, beta(high)


class KSeq(DraftVerifier):
    """Accepts the first draft x with eta < p(x) / (rho q(x)); otherwise samples p - min(q, p / rho) (1 - (1 - beta)^k)
    / beta, normalised.
    """

    name = "spectr"
    kinds = frozenset({Kind.IID})
    remedy = "draw the tree with replacement, or verify with rejection or traversal"

    def _wrong_shape(self, form: Form) -> str:
        deep = any(p > 0 for parents in form.parents for p in parents)
        return "a tree of several levels, expected one" if deep else ""

    def law(self, tree, logits):
        plan, p = schedule(tree), logits[:, 0].softmax(-1)
        if tree.q is None or tree.size == 1:
            return Law(torch.ones_like(tree.tokens, dtype=torch.float64), lambda last: p, plan.depths)
        q = target_ids(tree.q.to(p.dtype), tree.ids, p.size(1))[:, 0]
        here = plan.real[:, 1:]
        drafts = here.sum(1)
        rho, beta = k_seq(p, q, drafts.clamp(min=1))
        share = p.gather(1, tree.tokens[:, 1:]).double() / (
            rho[:, None] * q.gather(1, tree.tokens[:, 1:]).double()
        ).clamp(min=1e-300)
        chances = torch.cat([share.clamp(max=1) * here, torch.ones_like(share[:, :1])], 1)
        missed = (1 - chances).cumprod(1)
        stop = torch.cat([missed[:, -2:-1], chances[:, :1], chances[:, 1:-1] * missed[:, :-2]], 1)
        accepted = torch.where(beta > 0, (1 - (1 - beta) ** drafts) / beta.clamp(min=1e-300), 0.0)
        residual = (
            (p - torch.minimum(q.double(), p.double() / rho[:, None]) * accepted[:, None]).clamp(min=0).to(p.dtype)
        )

        def following(last):
            rows = torch.arange(len(last), device=last.device)
            raw = (last > 0) | (residual.sum(1) == 0)
            return torch.where(raw[:, None], logits[rows, last].softmax(-1), residual)

        return Law(stop, following, plan.depths)
