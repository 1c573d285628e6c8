"""What a head learns from the target: soft cross-entropy over the draft vocabulary, fused with the head's output
matrix.

For output states x (after the head's last norm), output matrix W, teacher probabilities p over the draft vocabulary and
row weights w:

    z = W x,  loss = sum_n w_n (logsumexp(z_n) - <p_n, z_n>),  d loss / d z_n = w_n (softmax(z_n) - p_n).

The gradient needs nothing from later layers, so that the forward pass computes it chunk by chunk and no [rows, Vd]
tensor is kept.
"""

from dataclasses import dataclass

import torch

from draftsmith.models.features import Packing, Teacher

CHUNK = 2**20  # elements of one [rows, Vd] chunk: it stays in a processor's cache
CHUNK_OF_ACCELERATOR = 2**26  # there few large products are what counts: 256 MB in fp32


def chunk_rows(width: int, device: torch.device) -> int:
    """How many rows of this width are computed at a time."""
    return max(64, (CHUNK if device.type == "cpu" else CHUNK_OF_ACCELERATOR) // width)


@dataclass(frozen=True)
class TeacherDistribution:
    """The teacher at P tokens: probs [P, Vd] over the draft vocabulary (renormalised), choice [P] its most probable
    draft index, covered [P] bool: the target's own argmax over V can be drafted.
    """

    probs: torch.Tensor
    choice: torch.Tensor
    covered: torch.Tensor


@torch.no_grad()
def teacher_distribution(teacher: Teacher, ids: torch.Tensor) -> TeacherDistribution:
    """ids [Vd]: the draft vocabulary. fp32; the [P, V] logits are never held whole."""
    probs, choice, covered = [], [], []
    for part in teacher.final.split(512):
        logits = teacher.project(part, None).float()
        drafted = logits if len(ids) == logits.size(-1) else logits.index_select(-1, ids)
        best = drafted.argmax(-1)
        covered.append(drafted.gather(-1, best[:, None])[:, 0] >= logits.amax(-1))
        choice.append(best)
        probs.append(drafted.softmax(-1))
    return TeacherDistribution(torch.cat(probs), torch.cat(choice), torch.cat(covered))


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, distribution: TeacherDistribution, scale):
        (steps, count, _), size = states.shape, chunk_rows(weight.size(0), states.device)
        losses, right = scale.new_zeros(steps, count), torch.zeros(steps, count, dtype=torch.bool, device=states.device)
        grad_states = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            if ctx.needs_input_grad[1]
            else None
        )
        scale = scale[..., None].to(states.dtype)
        for k in range(steps):
            for start in range(0, count - k, size):
                cut, supervised = (
                    slice(start, min(start + size, count - k)),
                    slice(start + k, min(start + size + k, count)),
                )
                x, probs = states[k, cut], distribution.probs[supervised]
                logits = (x @ weight.T).to(losses.dtype)
                top = logits.amax(-1)
                right[k, cut] = (
                    logits.gather(-1, distribution.choice[supervised, None])[:, 0] >= top
                ) & distribution.covered[supervised]
                expected = torch.linalg.vecdot(probs, logits)
                student = logits.softmax(-1)
                losses[k, cut] = (top - student.amax(-1).log() - expected) * distribution.covered[supervised]
                if grad_states is not None:
                    slope, part = (
                        student.sub_(probs).to(states.dtype),
                        scale[k, cut] * distribution.covered[supervised, None],
                    )
                    torch.mm(slope, weight, out=grad_states[k, cut]).mul_(part)
                    if grad_weight is not None:
                        add_product(grad_weight, slope.T, x * part)
        ctx.save_for_backward(grad_states, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, right)
        return (losses * scale[..., 0]).sum(), losses, right

    @staticmethod
    def backward(ctx, grad, *_):
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, without a copy where the precisions agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def soft_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, distribution: TeacherDistribution, scale: torch.Tensor
):
    """states [K, P, h], weight [Vd, h], scale [K, P] fp32 row weights; row i of step k is supervised by the teacher
    of token i + k.

    -> (loss, cross-entropy [K, P], whether the most probable draft token is the teacher's [K, P] bool). Tokens whose
    argmax cannot be drafted count nothing and are never right; the last k rows of step k have no supervision.
    """
    return _SoftCrossEntropy.apply(states, weight, distribution, scale)


def chain_walk(packing: Packing, leading: list[int]) -> tuple[int, int]:
    """The greedy chain decoding that per-row results predict: leading [T] = leading right steps of the round at row t.

    In every stretch that the target wrote, the first root is its first token; a round moves the root by leading + 1.
    Returns (tokens emitted, rounds); their ratio is the predicted chain tau (averages over all rows would be biased:
    rounds start after hard tokens).
    """
    tokens = rounds = 0
    written, positions = packing.written.tolist(), packing.positions.tolist()
    at = 0
    while at < len(written):
        if not written[at]:
            at += 1
            continue
        root, last = (
            max(at, at - positions[at] + 1),
            at + written[at] - 1,
        )  # a document's first token has no row before it
        tokens += max(last - root, 0)
        while root < last:
            root += min(leading[root - 1], last - root - 1) + 1
            rounds += 1
        at = last + 1
    return tokens, rounds


def tally(packing: Packing, parts: torch.Tensor, right: torch.Tensor, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a head's `loss` reports beside it, sums that add up over packed rows, from results of `packing.rows` at K
    steps: parts [K, P] which of them take part, right [K, P] which agree with the target, losses [K, P].

    {"rows", "right", "tried", "kept", "loss": [K], "walk": [2]}: of the `rows` of step k, `right` ones agree with the
    target; all earlier steps were right in `tried`, and step k too in `kept`; `walk` is (tokens, rounds) of the greedy
    chain that this predicts.
    """
    right = right & parts
    alive = right.cumprod(0).bool()  # right so far
    before = torch.cat([torch.ones_like(parts[:1]), alive[:-1]]) & parts
    leading = torch.zeros(len(packing.mask), dtype=torch.int64)
    leading[packing.rows] = alive.sum(0).cpu()
    sums = {"rows": parts, "right": right, "tried": before, "kept": alive, "loss": losses * parts}
    return {name: value.sum(1).float() for name, value in sums.items()} | {
        "walk": torch.tensor(chain_walk(packing, leading.tolist()), dtype=torch.float32, device=parts.device)
    }
