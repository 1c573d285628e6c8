"""What a head learns from the target: soft cross-entropy over the draft vocabulary, or another divergence, fused with
the head's output matrix.

For output states x (after the head's last norm), output matrix W, teacher probabilities p over the draft vocabulary and
row weights w:

    z = W x,  loss = sum_n w_n (logsumexp(z_n) - <p_n, z_n>),  d loss / d z_n = w_n (softmax(z_n) - p_n).

The gradient needs nothing from later layers, so that the forward pass computes it chunk by chunk and no [rows, Vd]
tensor is kept.
"""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from draftsmith.models.argmax import argmax
from draftsmith.models.features import Packing, Teacher
from draftsmith.models.heads.divergences import (
    PLAIN,
    Distillation,
    accepted,
    overlap,
    soften,
    variation_slope,
)

CHUNK = 2**20  # elements of one [rows, Vd] chunk on a CPU: it stays in the cache
PRODUCT = 2**24  # of one product with the output matrix there, which is rearranged for each
CHUNK_OF_ACCELERATOR = 2**26  # there few large products are what counts: 256 MB in fp32


def chunk_rows(width: int, device: torch.device) -> int:
    """How many rows of this width are computed at a time."""
    return max(64, (CHUNK if device.type == "cpu" else CHUNK_OF_ACCELERATOR) // width)


def product_rows(width: int, device: torch.device) -> int:
    """How many rows of this width are multiplied at a time, at least `chunk_rows`."""
    return max(chunk_rows(width, device), PRODUCT // width)


def spans(start: int, stop: int, size: int):
    """start .. stop - 1 as slices of at most `size`."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def shifted(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


@dataclass(frozen=True)
class TeacherDistribution:
    """The teacher at P tokens: probs [P, Vd] over the draft vocabulary (renormalised), choice [P] its most probable
    draft index, covered [P] bool: the target's own argmax over V can be drafted, mass [P]: of the draft vocabulary
    (None where the objective has no use for it).
    """

    probs: torch.Tensor
    choice: torch.Tensor
    covered: torch.Tensor
    mass: torch.Tensor | None


@torch.no_grad()
def teacher_distribution(teacher: Teacher, ids: torch.Tensor, goal: Distillation = PLAIN) -> TeacherDistribution:
    """ids [Vd]: the draft vocabulary; goal: whose `teacher_temperature` the probabilities have. fp32 or better; the
    [P, V] logits are never held whole.
    """
    parts, heat = [], goal.teacher_temperature
    for part in teacher.final.split(512):
        logits = teacher.project(part, None)
        wide = torch.promote_types(logits.dtype, torch.float32)
        drafted = (logits if len(ids) == logits.size(-1) else logits.index_select(-1, ids)).to(wide)
        best = argmax(drafted)
        covered = drafted.gather(-1, best[:, None])[:, 0] >= logits.amax(-1)
        mass = covered.to(wide)  # at temperature 0, and where nobody asks
        if goal.reach == "overlap" and heat > 0:
            mass = ((drafted / heat).logsumexp(-1) - (logits.to(wide) / heat).logsumexp(-1)).exp()
        parts.append((soften(drafted, heat), best, covered, mass))
    probs, choice, covered, mass = map(torch.cat, zip(*parts))
    return TeacherDistribution(probs, choice, covered, mass if goal.reach == "overlap" else None)


class Dense:
    """An output head that is one matrix [Vd, h]."""

    @staticmethod
    def logits(x: torch.Tensor, weights: tuple[torch.Tensor, ...]):
        """x [N, h] -> (logits [N, Vd], what `pull` needs of it)."""
        return x @ weights[0].T, None

    @staticmethod
    def pull(x, slope, share, probs, kept, weights, grads) -> torch.Tensor:
        """Gradient of the states [N, h] for slope [N, Vd], rows weighed by share [N, 1]; that of the weights is added
        to grads (None: a weight that is not trained). probs(): the teacher's probabilities [N, Vd]."""
        if grads[0] is not None:
            add_product(grads[0], slope.T, x * share)
        return (slope @ weights[0]).mul_(share)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, distribution: TeacherDistribution, here, scale, goal: Distillation, output, *weights):
        size, wide = chunk_rows(len(weights[0]), states.device), product_rows(len(weights[0]), states.device)
        losses, right = torch.zeros_like(scale), torch.zeros_like(scale, dtype=torch.bool)
        grad_states = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        grads = [
            torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) if needed else None
            for w, needed in zip(weights, ctx.needs_input_grad[6:])
        ]
        weighed, reach = torch.zeros_like(scale), scale.new_ones(len(distribution.choice))
        borders = [0, *accumulate(map(len, here))]
        for k, rows in enumerate(here):
            for block in spans(borders[k], borders[k + 1], wide):
                products, kept = output.logits(states[block], weights)
                for cut in spans(block.start, block.stop, size):
                    mine, own = rows[shifted(cut, -borders[k])], products[shifted(cut, -block.start)]
                    at = mine + k
                    probs, covered = distribution.probs[at], distribution.covered[at]
                    logits = own.to(losses.dtype)
                    top, student = logits.amax(-1), logits.softmax(-1)
                    right[cut] = (logits.gather(-1, distribution.choice[at, None])[:, 0] >= top) & covered
                    losses[cut] = top - student.amax(-1).log() - torch.linalg.vecdot(probs, logits)
                    weighed[cut] = scale[cut] * reach[mine] * covered
                    if goal.reach != "none":
                        whole = probs if distribution.mass is None else probs * distribution.mass[at, None]
                        reach[mine] *= accepted(goal.reach, right[cut], whole, student)
                    slope = None
                    if goal.total_variation > 0:
                        losses[cut] = torch.lerp(losses[cut], 1 - overlap(probs, student), goal.total_variation)
                        slope = variation_slope(probs, student).mul_(goal.total_variation)
                    losses[cut] *= covered
                    if grad_states is not None:
                        plain = student.sub_(probs)
                        own.copy_(plain if slope is None else slope.add_(plain, alpha=1 - goal.total_variation))
                if grad_states is not None:
                    teacher = partial(distribution.probs.index_select, 0, rows[shifted(block, -borders[k])] + k)
                    share = weighed[block, None].to(states.dtype)
                    grad_states[block] = output.pull(states[block], products, share, teacher, kept, weights, grads)
        ctx.save_for_backward(grad_states, *(g if g is None else g.to(w.dtype) for g, w in zip(grads, weights)))
        ctx.mark_non_differentiable(losses, right)
        return (losses * weighed).sum(), losses, right

    @staticmethod
    def backward(ctx, grad, *_):
        states, *weights = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return states, None, None, None, None, None, *weights


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, without a copy where the precisions agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def soft_cross_entropy(
    states: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    distribution: TeacherDistribution,
    here: list[torch.Tensor],
    scale: torch.Tensor,
    goal: Distillation = PLAIN,
    output: type = Dense,
):
    """states [N, h] of the rows here[0], here[1], ... ([n_k] each, places among P rows) of the steps 0, 1, ..., one
    step behind the other; row i of step k is supervised by the teacher of token i + k. weights of the output head (for
    `Dense`: ([Vd, h],)), scale [N] fp32: what each row weighs.

    -> (loss, loss of each row [N], whether the most probable draft token is the teacher's [N] bool). Tokens whose
    argmax cannot be drafted count nothing and are never right.
    """
    return _SoftCrossEntropy.apply(states, distribution, here, scale, goal, output, *weights)


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
