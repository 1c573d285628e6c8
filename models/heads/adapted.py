"""Linear layers with low-rank adapters on them (LoRA, Hu et al., 2022), as peft wraps them: what matrix they apply, and
what is left when it is merged.

A wrapped layer still calls its frozen matrix `weight`; whoever computes with a matrix instead of calling the layer
takes `matrix(layer)`.
"""

import torch
from torch import nn


def matrix(linear: nn.Module) -> torch.Tensor:
    """The matrix [out, in] that a linear layer applies, adapters included: W + sum (alpha / r) B A, differentiable in
    all of them.
    """
    if not hasattr(linear, "base_layer"):
        return linear.weight
    return sum((linear.get_delta_weight(name) for name in linear.active_adapters), start=linear.base_layer.weight)


def merged(head: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the same head without adapters: its state dict with every adapter merged into its matrix."""
    weights = {
        name.replace(".base_layer.", "."): value for name, value in head.state_dict().items() if ".lora_" not in name
    }
    return weights | {
        f"{name}.weight": matrix(layer) for name, layer in head.named_modules() if hasattr(layer, "base_layer")
    }
