"""TrainingStep: the module that the DeepSpeed engine holds. Everything that touches parameters happens in its one
`forward`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from draftsmith.models.features import TrainingFeatures


class TrainingStep(nn.Module):
    """A head, its objective, and what is optimised beside it: each of `beside` is called (head, features) -> (loss,
    sums), and is no module of the engine's.
    """

    def __init__(self, head: nn.Module, objective, beside: Sequence[Callable] = ()):
        super().__init__()
        self.head, self.objective, self.beside = head, objective, tuple(beside)

    def forward(self, features: TrainingFeatures, counts: list[float]):
        """counts [objective.steps]: what each step's sum is divided by. -> (loss, sums that add up over micro-batches
        and processes).
        """
        loss, sums = self.head.loss(features, self.objective, counts)
        for objective in self.beside:
            more, own = objective(self.head, features)
            loss, sums = loss + more, sums | own
        return loss, sums


class PartitionedStep(nn.Module):
    """A `TrainingStep` for ZeRO-3: all its parameters are gathered for the whole of its forward and backward (one leaf
    module).

    DeepSpeed takes a leaf's gradients when the gradient of the leaf's input is there, and features need none: a zero
    that does is added to them in the first operation, whose backward is the last one.
    """

    def __init__(self, step: TrainingStep):
        super().__init__()
        self.leaf = Leaf(step)

    def forward(self, features: TrainingFeatures, counts: list[float]):
        return self.leaf(features.hidden.new_zeros((), requires_grad=True), features, counts)


class Leaf(nn.Module):
    def __init__(self, step: TrainingStep):
        super().__init__()
        self.step = step

    def forward(self, zero: torch.Tensor, features: TrainingFeatures, counts: list[float]):
        return self.step(replace(features, hidden=features.hidden + zero), counts)
