"""What a head learns of the target's distribution, and how much of it at which step: small functions, each one key of a
recipe's section `objective`, for every head.

p are the target's probabilities [N, V], z the head's logits, q = softmax(z). Closed forms of the gradients:

    cross-entropy      lse(z) - <p, z>                d / dz = q - p
    total variation    1 - sum_v min(p_v, q_v)        d / dz = q * (<q, l> - l),  l_v = [q_v < p_v]

The second is one minus the chance that a token drawn from q is accepted by rejection sampling (Leviathan et al., 2023).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What all objectives have that learn from the target's distribution. Left out, they are what the papers have.

    teacher_temperature: of the distribution that is learned; 0 is the target's most probable token alone.
    total_variation: w of the mixture (1 - w) cross-entropy + w total variation; for sampled trees.
    reach: what each step of a row weighs. none: 1. Else the chance that drafting reaches it, a product over the row's
    earlier steps by the drafter as it is (no gradient): greedy, 1 while its first choice was the target's; overlap, of
    sum_v min(p_v, q_v), what sampling accepts.
    """

    teacher_temperature: Annotated[float, Ge(0)] = 1.0
    total_variation: Annotated[float, Ge(0), Le(1)] = 0.0
    reach: Literal["none", "greedy", "overlap"] = "none"


PLAIN = Distillation()


def soften(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [N, V] -> probabilities at this temperature; at 0 all on the largest."""
    if temperature > 0:
        return logits.softmax(-1) if temperature == 1 else (logits / temperature).softmax(-1)
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def overlap(probs: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """sum_v min(p_v, q_v) [N], the chance that rejection sampling accepts a draw from q."""
    return torch.minimum(probs, student).sum(-1)


def variation_slope(probs: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """d / dz of 1 - `overlap` [N, V]."""
    less = (student < probs).to(student.dtype)
    return student * (torch.linalg.vecdot(student, less)[:, None] - less)


def accepted(reach: str, right: torch.Tensor, probs: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The chance [N] that drafting goes on behind each row: right [N], whether its first choice is the target's."""
    return {
        "none": lambda: torch.ones_like(student[:, 0]),
        "greedy": lambda: right.to(student.dtype),
        "overlap": lambda: overlap(probs, student),
    }[reach]()
