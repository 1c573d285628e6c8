"""A pretraining run: learning rates, clipping, a line of the log now and then, snapshots, and a stop when
the loss is no number.
"""

import math
import time

import torch
from pydantic import Field

from draftsmith.models.errors import UserError
from draftsmith.train.optimizers import MuonAdamW
from draftsmith.train.recipe import Strict


class Optimizer(Strict):
    """muon_lr: of matrices; adam_lr: of all else. Both rise over `warmup` steps and fall linearly to zero over the last
    `decay` share.
    """

    muon_lr: float = Field(gt=0)
    adam_lr: float = Field(gt=0)
    warmup: int = Field(gt=0)
    decay: float = Field(gt=0, le=1)
    clip: float = Field(gt=0)


def make_optimizer(model, spec: Optimizer) -> MuonAdamW:
    named = list(model.named_parameters())
    return MuonAdamW(
        [p for n, p in named if p.ndim == 2 and "embed" not in n],
        [p for n, p in named if p.ndim != 2 or "embed" in n],
        spec.muon_lr,
        spec.adam_lr,
    )


class PretrainingRun:
    """`seen` of `total` after `steps` steps. unit: what `seen` and `total` count, as the log says it."""

    def __init__(self, spec: Optimizer, total: int, save_minutes: float, log, unit: str = "rows"):
        self.spec, self.total, self.save_minutes, self.log, self.unit = spec, total, save_minutes, log, unit
        self.seen = self.steps = 0
        self.losses: list[float] = []
        self.started = self.saved = time.time()

    def go_on(self, seen: int, steps: int, minutes: float) -> None:
        """Where a run that was killed had come to."""
        self.seen, self.steps, self.started = seen, steps, time.time() - minutes * 60

    @property
    def minutes(self) -> float:
        return (time.time() - self.started) / 60

    def step(self, model, optimizer, loss: torch.Tensor, count: int, note: str) -> None:
        """One step by the gradients of `loss`, which took `count` more of the total. Raises UserError when it is not
        finite.
        """
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.spec.clip)
        scale = min(1.0, (self.steps + 1) / self.spec.warmup, (1 - self.seen / self.total) / self.spec.decay)
        for group, lr in zip(optimizer.param_groups, (self.spec.muon_lr, self.spec.adam_lr)):
            group["lr"] = lr * max(scale, 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.seen, self.steps = self.seen + count, self.steps + 1
        self.losses = [*self.losses[-49:], loss.item()]
        if not math.isfinite(self.losses[-1]):
            raise UserError(
                f"step {self.steps}: loss is {self.losses[-1]}, expected a finite number; lower optimizer.muon_lr or "
                f"adam_lr"
            )
        if self.steps % 50 == 0:
            recent = sum(self.losses) / len(self.losses)
            self.log(
                f"{note} step {self.steps} {self.unit} {self.seen}/{self.total} loss {recent:.3f} lr x{scale:.2f} "
                f"{self.minutes:.1f} min"
            )

    def due(self) -> bool:
        """Whether it is time for a snapshot; asked after every step."""
        if time.time() - self.saved < self.save_minutes * 60:
            return False
        self.saved = time.time()
        return True
