"""Typical acceptance (Medusa: Cai et al., 2024, section 2.3.1): NOT lossless. Texts follow another law than the
target's.

Here to be measured against, never a default. A drafted token x is accepted if p(x) > min(epsilon, delta exp(-H(p))),
with p the target's distribution at its parent and H its entropy; the deepest path whose tokens all pass is taken (the
earliest of equals).
"""

import torch

from draftsmith.eval.verification.schedule import schedule
from draftsmith.eval.verification.verifier import Law, Verifier

EPSILON, DELTA = 0.09, 0.3  # Medusa's defaults


class Typical(Verifier):
    name = "typical"
    lossless = False

    def law(self, tree, logits):
        plan, p = schedule(tree), logits.softmax(-1)
        rows, parents = torch.arange(len(p), device=p.device)[:, None], tree.parents.clamp(min=0)
        entropy = torch.special.entr(p).sum(-1)
        threshold = (DELTA * torch.exp(-entropy)).clamp(max=EPSILON).gather(1, parents)
        passes = p[rows, parents, tree.tokens] > threshold
        passes = (passes & plan.real).index_fill(1, torch.zeros(1, dtype=torch.int64, device=p.device), True)
        good = passes[rows[..., None], plan.paths].all(-1) & plan.real
        last = torch.where(good, plan.depths, -1).argmax(1, keepdim=True)
        stop = torch.zeros(good.shape, dtype=torch.float64, device=p.device).scatter_(1, last, 1.0)
        return Law(stop, lambda at: p[rows[:, 0], at], plan.depths)
