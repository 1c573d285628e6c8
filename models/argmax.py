"""The largest of many numbers: torch takes twenty times as long for it on a CPU as numpy, more than drafting costs."""

import torch


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """scores [..., V] -> [...] int64, where the largest stands (the first of equal ones on a CPU)."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(scores.detach().numpy().argmax(-1, keepdims=True))[..., 0]
    return scores.argmax(-1)
