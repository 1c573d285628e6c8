"""Which layers of a target keep keys and values, as its own cache shows after a few tokens."""

from typing import NamedTuple

import torch

from draftsmith.models.errors import UserError


class Layout(NamedTuple):
    """attending: the indices of layers with keys and values, of `heads` heads of `width` each (1 where there are
    none).
    """

    attending: list[int]
    heads: int
    width: int


@torch.no_grad()
def layout_of(target) -> Layout:
    """Raises UserError where layers keep keys and values of different shapes."""
    places = torch.arange(3, device=target.device)[None]
    kinds = {*target.config.layer_types, "linear_attention", "full_attention"}
    masks = {"attention_mask": dict.fromkeys(kinds)} if target.masked else {}
    out = target.body(input_ids=torch.zeros_like(places), position_ids=places, use_cache=True, **masks)
    cache = out[target.cache_argument]
    shapes = {
        index: (*layer.keys.shape[1::2], layer.values.size(3))
        for index, layer in enumerate(cache.layers)
        if isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4
    }
    if len(set(shapes.values())) > 1 or any(key != value for _, key, value in shapes.values()):
        raise UserError(
            f"target {target.name}: {target.config.model_type} is not supported: found keys and values of shapes "
            f"{sorted(set(shapes.values()))}, expected one shape for all layers"
        )
    heads, width, _ = next(iter(shapes.values()), (1, 1, 1))
    return Layout(list(shapes), heads, width)
