"""What a head learns from the target where its output head is the target's own, frozen: cross-entropies over all of the
vocabulary.

For output states x, z = project(x), teacher probabilities q, its k most probable tokens T, and weights a, b:

    loss = a (lse(z) - <q, z>) + b sum_{v in T} q_v (lse(z) - z_v) = s lse(z) - <c, z>,   c = a q + b q_T,  s = a + b
        sum_T q_v,
    d loss / d z = s softmax(z) - c,

less a times the entropy of q, a constant, where the first term is to be KL(q || softmax(z)); the objective may have q
at another temperature and total variation in place of a share of the first term (`Distillation`);
and `project` is pulled back as it is (it may have a soft cap, and its weights may be spread over processes). All of it
happens in the forward pass, some tokens at a time, each teacher row once for all steps, so that no [rows, V] tensor is
kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from draftsmith.models.argmax import argmax
from draftsmith.models.features import Teacher
from draftsmith.models.heads.distill import chunk_rows, product_rows, shifted, spans
from draftsmith.models.heads.divergences import PLAIN, Distillation, accepted, overlap, soften, variation_slope


class Weights(NamedTuple):
    """ce: of the cross-entropy (a); top: of its part over the `k` most probable tokens (b), not renormalised; kl:
    whether the target's entropy is taken off the first.
    """

    ce: float
    top: float
    k: int
    kl: bool = False


class _TeacherLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, teacher: Teacher, project, vocab: int, weights: Weights, goal: Distillation):
        (steps, count, _), device = states.shape, states.device
        size, wide = chunk_rows(vocab, device), product_rows(vocab, device)
        losses = torch.zeros(steps, count, dtype=torch.promote_types(states.dtype, torch.float32), device=device)
        rank, goes_on = torch.full((steps, count), vocab, device=device), torch.zeros_like(losses)
        varied = weights.ce * goal.total_variation
        weights = weights._replace(ce=weights.ce - varied)
        grads = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        for block in spans(0, count, wide):
            logits = teacher.project(teacher.final[block], None).to(losses.dtype)
            choice, probs = argmax(logits)[:, None], soften(logits, goal.teacher_temperature)
            constant = weights.ce * torch.xlogy(probs, probs).sum(-1) if weights.kl else torch.zeros_like(logits[:, 0])
            apart = goal.reach == "overlap" or varied > 0  # `_weighted` works in place
            supervised, total = _weighted(probs.clone() if apart else probs, weights)
            for k in range(steps):
                # row i of step k is supervised at token i + k
                first, stop = max(block.start - k, 0), block.stop - k
                if stop <= first:
                    continue
                with torch.enable_grad():
                    x = states[k, first:stop].detach().to(teacher.final.dtype).requires_grad_()
                    out = project(x)
                slopes = None if grads is None else torch.empty_like(out)
                for cut in spans(first, stop, size):
                    own, mine = shifted(cut, -first), shifted(cut, k - block.start)
                    z = out.detach()[own].to(losses.dtype)
                    top, student = z.amax(-1), z.softmax(-1)
                    rank[k, cut] = (z > z.gather(-1, choice[mine])).sum(-1)
                    losses[k, cut] = (
                        total[mine] * (top - student.amax(-1).log())
                        - torch.linalg.vecdot(supervised[mine], z)
                        + constant[mine]
                    )
                    goes_on[k, cut] = accepted(goal.reach, rank[k, cut] == 0, probs[mine], student)
                    slope = 0.0
                    if varied > 0:
                        losses[k, cut] += varied * (1 - overlap(probs[mine], student))
                        slope = variation_slope(probs[mine], student).mul_(varied)
                    if slopes is not None:
                        slopes[own] = student.mul_(total[mine, None]).sub_(supervised[mine]).add_(slope)
                if slopes is not None:
                    grads[k, first:stop] = torch.autograd.grad(out, x, slopes)[0]
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(rank, goes_on)
        return losses, rank, goes_on

    @staticmethod
    def backward(ctx, grad, *_):
        (grads,) = ctx.saved_tensors
        return (grads * grad[..., None]).to(grads.dtype), None, None, None, None, None


def _weighted(probs: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher probabilities [N, V] -> (c [N, V], s [N])."""
    if weights.top == 0:
        return probs.mul_(weights.ce), torch.full_like(probs[:, 0], weights.ce)
    top = probs.topk(min(weights.k, probs.size(-1)))
    supervised = probs.mul_(weights.ce).scatter_add_(-1, top.indices, weights.top * top.values)
    return supervised, weights.ce + weights.top * top.values.sum(-1)


def teacher_losses(
    states: torch.Tensor,
    teacher: Teacher,
    project: Callable,
    vocab: int,
    weights: Weights,
    goal: Distillation = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """states [K, P, h], after which stands `project` to `vocab` tokens; row i of step k is supervised by the teacher
    of its token i + k.

    -> (losses [K, P] fp32, differentiable in the states; how many tokens are more probable than the target's own first
    choice [K, P] int64; the chance that drafting reaches each step [K, P], by the objective's `reach`, without
    gradient). The last k rows of step k have no supervision: 0, `vocab` and whatever.
    """
    losses, rank, goes_on = _TeacherLosses.apply(states, teacher, project, vocab, weights, goal)
    return losses, rank, torch.cat([torch.ones_like(goes_on[:1]), goes_on[:-1].cumprod(0)])
