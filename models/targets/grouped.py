"""Attention of queries that share keys (grouped-query attention) without repeated keys: the query heads of a group
stand as more rows of one head. The usual kernel then reads every key once, where the library first writes each as often
as it is shared, at every layer of every pass.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "draftsmith_grouped"


def attend(module, query, key, value, attention_mask, scaling=None, **options):
    """As transformers' `sdpa`: query [B, H, T, D], key and value [B, H_kv, K, D], additive mask [B, 1, T, K] or None
    (then that is what runs) -> [B, T, H, D] and no weights.
    """
    (batch, heads, rows, width), shared = query.shape, key.size(1)
    if attention_mask is None or heads == shared:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **options)
    group = heads // shared
    mask = attention_mask[..., : key.size(2)].expand(batch, 1, rows, key.size(2))
    mask = mask.repeat(1, 1, group, 1)
    grouped = query.reshape(batch, shared, group * rows, width)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return out.view(batch, heads, rows, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def use_grouped(config) -> None:
    """Lets a text body with this config attend so, where it attends by `sdpa` and its queries share keys."""
    heads, shared = (getattr(config, name, None) or 0 for name in ("num_attention_heads", "num_key_value_heads"))
    if config._attn_implementation == "sdpa" and 0 < shared < heads:
        config._attn_implementation = NAME
