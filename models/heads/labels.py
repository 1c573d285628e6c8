"""Cross-entropy against tokens themselves (hard labels), fused with the head's output matrix W:

    z = W x,  loss = sum_n w_n (logsumexp(z_n) - z_n[label_n]),  d loss / d z_n = w_n (softmax(z_n) - onehot(label_n)).

As in `distill` the forward pass computes the gradient chunk by chunk, so that no [rows, V] tensor is kept.
"""

import torch

from draftsmith.models.argmax import argmax
from draftsmith.models.features import Teacher
from draftsmith.models.heads.distill import add_product, chunk_rows, product_rows, shifted, spans


@torch.no_grad()
def choices(teacher: Teacher) -> torch.Tensor:
    """[P] int64: the target's most probable token behind each supervised one. The [P, V] logits are never held
    whole.
    """
    return torch.cat([argmax(teacher.project(part, None)) for part in teacher.final.split(512)])


class _HardCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, labels, choice, scale):
        size, wide = chunk_rows(weight.size(0), states.device), product_rows(weight.size(0), states.device)
        losses, right = torch.zeros_like(scale), torch.zeros_like(labels, dtype=torch.bool)
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            if ctx.needs_input_grad[1]
            else None
        )
        for block in spans(0, len(states), wide):
            products = states[block] @ weight.T
            for cut in spans(block.start, block.stop, size):
                own, label = products[shifted(cut, -block.start)], labels[cut, None]
                logits = own.to(scale.dtype)
                top, wanted = logits.amax(-1, keepdim=True), logits.gather(-1, label)
                right[cut] = logits.gather(-1, choice[cut, None])[:, 0] >= top[:, 0]
                student = logits.sub_(top).exp_()
                total = student.sum(-1, keepdim=True)
                losses[cut] = (total.log() + top - wanted)[:, 0]
                if grad_states is not None:
                    share = scale[cut, None]
                    own.copy_(student.mul_(share / total).scatter_add_(-1, label, -share))
            if grad_states is not None:
                torch.mm(products, weight, out=grad_states[block])
                if grad_weight is not None:
                    add_product(grad_weight, products.T, states[block])
        ctx.save_for_backward(grad_states, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, right)
        return (losses * scale).sum(), losses, right

    @staticmethod
    def backward(ctx, grad, *_):
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None


def hard_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, choice: torch.Tensor, scale: torch.Tensor
):
    """states [N, d], weight [V, d], labels and choice [N] token ids, scale [N] row weights (fp32 or fp64).

    -> (loss, cross-entropy [N], whether `choice` is the most probable token [N] bool).
    """
    return _HardCrossEntropy.apply(states, weight, labels, choice, scale)
