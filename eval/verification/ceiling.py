"""How far a rule is from the best possible on one level: the optimal-transport ceiling.

No lossless rule accepts one of k drafts x_1..x_k of one node more often than

    alpha* = min over token sets H of  1 + p(H) - Pr(all drafts in H)

(the dual of optimal transport with the cost "the emitted token is no draft"; SpecTr, Sun et al., 2023, theorem 1; for
sets: Hu et al., 2025, arXiv 2502.18779). The minimum is reached by a set of the tokens with the least p / q, so that V
sets are looked at, not 2^V.
"""

import math

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.tree import Kind


def ceiling(p: torch.Tensor, q: torch.Tensor, drafts: int, kind: Kind) -> torch.Tensor:
    """p, q [B, V], `drafts` children drawn as `kind` -> [B] fp64, the greatest chance that one of them is accepted.

    Raises UserError for ONE_HOT children: all rules reach their ceiling, the target's mass on them.
    """
    if kind == Kind.ONE_HOT:
        raise UserError(
            "ceiling: found ONE_HOT edges, expected sampled ones (what the target gives to the drafted tokens is the "
            "ceiling there)"
        )
    p, q = p.double(), q.double()
    order = torch.where(q > 0, p / q, float("inf")).argsort(1)
    p, q = p.gather(1, order), q.gather(1, order)
    inside = q.cumsum(1).clamp(max=1)
    if drafts == 1 or kind == Kind.IID:
        all_in = inside**drafts
    else:
        all_in = 1 - without_replacement_misses(q, inside, drafts)
    return 1 + (p.cumsum(1) - all_in).min(1).values.clamp(max=0)


def without_replacement_misses(q: torch.Tensor, inside: torch.Tensor, drafts: int) -> torch.Tensor:
    """[B, V]: for every leading set H, the probability that not all draws lie in it.

    Tokens drawn one after the other are the arrivals of independent exponential clocks of rates q(x). With c = 1 - q(H)
    the first token outside arrives at a time of density c exp(-c t), and of the tokens inside fewer than k arrived
    before with probability exp(-q(H) t) sum_{j < k} e_j(exp(q(x) t) - 1), e_j the elementary symmetric polynomials. For
    k = 2 the integral is c (1 + sum_H q / (1 - q)); beyond it is computed by double-exponential quadrature (t = exp(pi
    / 2 sinh s), errors about 1e-10).
    """
    outside = (1 - inside).clamp(min=0)
    if drafts == 2:
        return (outside * (1 + (q / (1 - q).clamp(min=1e-300)).cumsum(1))).clamp(max=1)
    total, step = torch.zeros_like(q), 1 / 24
    for node in range(-92, 93):
        s = node * step
        t = math.exp(math.pi / 2 * math.sinh(s))
        clock = (q * t).clamp(max=100.0)  # beyond, a token has arrived for certain
        odds, e, of_none = clock.expm1(), torch.ones_like(q), 1.0  # e_0 of every set, the empty one too
        fewer = e.clone()
        for _ in range(1, drafts):  # e_j(H with x) = e_j(H) + x e_{j-1}(H)
            e, of_none = (odds * torch.cat([torch.full_like(e[:, :1], of_none), e[:, :-1]], 1)).cumsum(1), 0.0
            fewer += e
        chance = (fewer * (-clock.cumsum(1)).exp()).clamp(max=1)
        total += chance * outside * (-outside * t).exp() * (t * math.pi / 2 * math.cosh(s) * step)
    return torch.where(outside > 0, total.clamp(max=1), 0.0)
