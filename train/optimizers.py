"""Optimizers that skip a step whose gradients are not finite: AdamW, and Muon (Jordan et al., 2024) for matrices beside
it.

Muon: momentum, then the nearest semi-orthogonal matrix by Newton-Schulz iteration. `torch.optim.Muon` iterates in bf16
everywhere, which a CPU without instructions for it runs many times slower. Matrices of one shape are orthogonalised in
one batched product, since a deep and thin model has hundreds of small ones.
"""

from collections import defaultdict

import torch
import torch.distributed

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the reference implementation


def product_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies such matrices faster than fp32, else fp32."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


def orthogonalise(matrices: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Approximate U V^T of each matrix's SVD. matrices [N, rows, cols] fp32 -> the same; dtype: of the iteration."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.size(1) <= matrices.size(2)
    x = matrices if wide else matrices.mT
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class FiniteSteps:
    """Before a `torch.optim.Optimizer`: leaves weights and state alone when a gradient of any process is not finite.
    `skipped` counts them.

    DeepSpeed calls this with its own partitions of the parameters, in every process equally often: one flag is all that
    is exchanged.
    """

    skipped = 0

    @torch.no_grad()
    def step(self, closure=None):
        grads = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None and p.grad.numel()
        ]
        bad = torch.zeros((), device=grads[0].device if grads else None)
        for total in torch._foreach_norm(grads) if grads else []:
            bad = torch.maximum(bad, (~torch.isfinite(total)).float())
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if bad.item():
            self.skipped += 1
        else:
            super().step(closure)


class AdamW(FiniteSteps, torch.optim.AdamW):
    """torch's AdamW."""


class _MuonAdamW(torch.optim.Optimizer):
    """`matrices` (2-D) get Muon with rate `muon_lr` times sqrt(max(1, rows / cols)); `others` get AdamW without weight
    decay.
    """

    def __init__(
        self,
        matrices,
        others,
        muon_lr: float,
        adam_lr: float,
        momentum: float = 0.95,
        betas=(0.9, 0.95),
        eps: float = 1e-8,
    ):
        super().__init__(
            [
                {"params": list(matrices), "lr": muon_lr, "kind": "muon"},
                {"params": list(others), "lr": adam_lr, "kind": "adam"},
            ],
            {"momentum": momentum, "betas": betas, "eps": eps},
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (self._muon if group["kind"] == "muon" else self._adam)(group)

    def _muon(self, group):
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
            scale, stacked = max(1.0, shape[0] / shape[1]) ** 0.5, torch.stack(updates)
            for p, update in zip(params, orthogonalise(stacked, dtype=product_dtype(stacked.device))):
                p.add_(update, alpha=-group["lr"] * scale)

    def _adam(self, group):
        first, second = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - first)
            state["square"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
            scale = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
            p.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - first ** state["step"]))


class MuonAdamW(FiniteSteps, _MuonAdamW):
    __doc__ = _MuonAdamW.__doc__
