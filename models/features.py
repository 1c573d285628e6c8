"""What a head asks of the target (`FeatureSpec`) and what it gets (`Features`), in training and in decoding alike.

One definition on both sides is what keeps training accuracy and decoding acceptance equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class FeatureSpec:
    """taps: Hugging Face `hidden_states` indices (0 = embeddings, k = state entering layer k, "last" = after the final norm),
    concatenated in this order."""

    taps: tuple[int | Literal["last"], ...]


@dataclass(frozen=True)
class Teacher:
    """The target's own predictions for training. final [B, S, h]: states after the final norm.

    `project(hidden [P, h], ids | None) -> logits [P, V or len(ids)]` applies the target's frozen output head.
    """

    final: torch.Tensor
    project: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Features:
    """Rows of processed tokens, right-padded.

    tokens [B, S] int64; hidden [B, S, taps * h] detached; lengths [B] int64, the number of real rows.
    Training only: mask [B, S] bool, the token mask (True = written by the target), and the teacher.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor | None = None
    teacher: Teacher | None = None
