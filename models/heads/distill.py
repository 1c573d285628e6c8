"""What a head learns from the target: soft cross-entropy over the draft vocabulary, fused with the head's output matrix.

For output states x (after the head's last norm), output matrix W, teacher probabilities p over the draft vocabulary and row weights w:

    z = W x,  loss = sum_n w_n (logsumexp(z_n) - <p_n, z_n>),  d loss / d z_n = w_n (softmax(z_n) - p_n).

The gradient needs nothing from later layers, so that the forward pass computes it chunk by chunk and no [rows, Vd] tensor is kept.
"""

from dataclasses import dataclass

import torch

from draftsmith.models.features import Packing, Teacher

CHUNK = 2**20  # elements of one [rows, Vd] chunk: it stays in a processor's cache


@dataclass(frozen=True)
class Lesson:
    """The teacher at P tokens: probs [P, Vd] over the draft vocabulary (renormalised), choice [P] its most probable draft index,
    covered [P] fp32: 1 where the target's own argmax over V can be drafted."""

    probs: torch.Tensor
    choice: torch.Tensor
    covered: torch.Tensor


@torch.no_grad()
def teach(teacher: Teacher, ids: torch.Tensor) -> Lesson:
    """ids [Vd]: the draft vocabulary. fp32; the [P, V] logits are never held whole."""
    probs, choice, covered = [], [], []
    for part in teacher.final.split(512):
        logits = teacher.project(part, None).float()
        drafted = logits if len(ids) == logits.size(-1) else logits.index_select(-1, ids)
        best = drafted.argmax(-1)
        covered.append(drafted.gather(-1, best[:, None])[:, 0] >= logits.amax(-1))
        choice.append(best)
        probs.append(drafted.softmax(-1))
    return Lesson(torch.cat(probs), torch.cat(choice), torch.cat(covered).float())


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, lesson: Lesson, at, scale):
        losses, right = [], []
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        size = max(64, CHUNK // weight.size(0))
        for start in range(0, len(states), size):
            cut = slice(start, start + size)
            logits = (states[cut] @ weight.T).float()
            probs = lesson.probs.index_select(0, at[cut])
            top = logits.amax(-1)
            right.append(logits.gather(-1, lesson.choice[at[cut], None])[:, 0] >= top)
            expected = torch.linalg.vecdot(probs, logits)
            student = logits.softmax(-1)
            losses.append(top - student.amax(-1).log() - expected)
            if grad_states is not None:
                slope = student.sub_(probs).mul_(scale[cut, None]).to(states.dtype)
                torch.mm(slope, weight, out=grad_states[cut])
                if grad_weight is not None:
                    grad_weight += slope.T @ states[cut]
        losses, right = torch.cat(losses), torch.cat(right)
        ctx.save_for_backward(grad_states, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, right)
        return (losses * scale).sum(), losses, right

    @staticmethod
    def backward(ctx, grad, *_):
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None


def soft_cross_entropy(states: torch.Tensor, weight: torch.Tensor, lesson: Lesson, at: torch.Tensor, scale: torch.Tensor):
    """states [N, h], weight [Vd, h]; at [N] which token of the lesson each row is taught; scale [N] fp32 row weights
    -> (loss, per-row cross-entropy [N], whether the row's most probable draft token is the teacher's [N] bool)."""
    return _SoftCrossEntropy.apply(states, weight, lesson, at, scale)


def chain_walk(packing: Packing, leading: list[int]) -> tuple[int, int]:
    """The greedy chain decoding that per-row results predict: leading [T] = leading right steps of the round at row t.

    In every stretch that the target wrote, the first root is its first token; a round moves the root by leading + 1.
    Returns (tokens emitted, rounds); their ratio is the predicted chain tau (averages over all rows would be biased: rounds start after
    hard tokens).
    """
    tokens = rounds = 0
    written, positions = packing.written.tolist(), packing.positions.tolist()
    at = 0
    while at < len(written):
        if not written[at]:
            at += 1
            continue
        root, last = max(at, at - positions[at] + 1), at + written[at] - 1  # a document's first token has no row before it
        tokens += max(last - root, 0)
        while root < last:
            root += min(leading[root - 1], last - root - 1) + 1
            rounds += 1
        at = last + 1
    return tokens, rounds
