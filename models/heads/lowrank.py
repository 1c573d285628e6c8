"""An output head over the target's whole vocabulary at low rank, in place of a pruned vocabulary.

With x the head's last state [h], W [V, h] the target's output head (frozen), down [r, h] and up [V, r]:

    c = up down x,  S the `candidates` largest of c,  z_v = W_v x for v in S, else c_v.

r (h + V) + candidates h products in place of h V. It starts from the best rank-r approximation of W, up down = W Q Q^T
with Q [h, r] the first right singular vectors; at r = h it is W itself.

Training: the trunk learns by the loss on z, through W's rows and the low-rank scores as they are; up and down learn by
the cross-entropy of softmax(c) against the target, which alone ranks candidates, and not by z.
"""

import torch
from torch import nn

from draftsmith.models.heads.distill import add_product


class Frozen(nn.Module):
    """A matrix that is stored and not trained."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)


class LowRankHead(nn.Module):
    """Called with states [..., h] it gives z [..., V]."""

    def __init__(self, hidden: int, vocab: int, rank: int, candidates: int):
        super().__init__()
        self.candidates = candidates
        self.exact = Frozen(torch.zeros(vocab, hidden))
        self.down, self.up = nn.Linear(hidden, rank, bias=False), nn.Linear(rank, vocab, bias=False)

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor) -> None:
        """weight [V, h]: the target's output head."""
        self.exact.weight.copy_(weight)
        wide = weight.double()
        directions = torch.linalg.eigh(wide.T @ wide)[1][:, -self.down.out_features :].flip(1)
        self.down.weight.copy_(directions.T)
        self.up.weight.copy_(wide @ directions)

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """What `LowRank` takes; the number of candidates rides along as a shape."""
        return self.up.weight, self.down.weight, self.exact.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.size(-1))
        return low_rank(self.candidates).logits(flat, self.weights)[0].reshape(*x.shape[:-1], -1)


class LowRank:
    """As `distill.Dense`, for weights (up [V, r], down [r, h], exact [V, h])."""

    candidates: int

    @classmethod
    def logits(cls, x, weights):
        up, down, exact = weights
        inner = x @ down.T
        scores = inner @ up.T
        best = scores.topk(min(cls.candidates, len(up)), sorted=False).indices
        rows = exact[best]
        z = scores.scatter(-1, best, torch.einsum("nch,nh->nc", rows, x))
        return z, (inner, scores, best, rows)

    @classmethod
    def pull(cls, x, slope, share, probs, kept, weights, grads) -> torch.Tensor:
        up, down, _ = weights
        inner, scores, best, rows = kept
        chosen = slope.gather(-1, best)
        rest = slope.scatter(-1, best, 0.0)
        grad = ((rest @ up) @ down).add_(torch.einsum("nc,nch->nh", chosen, rows))
        if grads[0] is not None or grads[1] is not None:
            probs = probs()
            own = scores.to(probs.dtype).softmax(-1).sub_(probs).to(x.dtype).mul_(share)
            if grads[0] is not None:
                add_product(grads[0], own.T, inner)
            if grads[1] is not None:
                add_product(grads[1], (own @ up).T, x)
        return grad.mul_(share)


def low_rank(candidates: int) -> type[LowRank]:
    """`LowRank` with so many candidates."""
    return type("LowRank", (LowRank,), {"candidates": candidates})
