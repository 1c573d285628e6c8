"""Muon (Jordan et al., 2024) in fp32: momentum, then the nearest semi-orthogonal matrix by Newton-Schulz iteration.

`torch.optim.Muon` casts to bf16 inside, which a CPU without bf16 instructions runs many times slower. Matrices of one shape
are orthogonalised in one batched product, since a deep and thin model has hundreds of small ones.
"""

from collections import defaultdict

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the reference implementation


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate U V^T of each matrix's SVD. matrices [N, rows, cols] fp32 -> the same shape."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.size(1) <= matrices.size(2)
    x = matrices if wide else matrices.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights. `lr` is the update's root-mean-square scale before the shape factor sqrt(max(1, rows/cols))."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(updates))):
                    p.add_(update, alpha=-group["lr"] * scale)
