"""A head whose parameters may be partitioned over processes (ZeRO-3), as a whole."""

import contextlib

import torch
from torch import nn

from draftsmith.models.heads.adapted import merged
from draftsmith.train import distributed


def size(parameters) -> int:
    """Numbers in parameters that may be partitioned."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def gathered(head: nn.Module, zero_stage: int):
    """A block in which all of a head's parameters are whole, partitioned or not; all processes enter it."""
    return (
        distributed.load_deepspeed().zero.GatheredParameters(list(head.parameters()))
        if zero_stage == 3
        else contextlib.nullcontext()
    )


def consolidated(head: nn.Module, zero_stage: int) -> nn.Module:
    """An fp32 copy of a head whose parameters may be partitioned, its adapter merged; all processes call this."""
    with gathered(head, zero_stage):
        weights = {name: value.detach().to(torch.float32, copy=True) for name, value in merged(head).items()}
    twin = type(head)(head.config, head.shared, head.ids).to(head.ids.device, torch.float32)
    twin.load_state_dict(weights)
    return twin.eval()
