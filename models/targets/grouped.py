"""Attention of queries that share keys (grouped-query attention) without repeated keys: every key is read once, where
the library, behind a mask, first writes each as often as it is shared, at every layer of every pass. The CPU's kernel
can do so; for others the query heads of a group stand as more rows of one head.
"""

from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "draftsmith_grouped"


def attend(module, query, key, value, attention_mask, scaling=None, **options):
    """As transformers' `sdpa`: query [B, H, T, D], key and value [B, H_kv, K, D], additive mask [B, 1, T, K] or None
    (then that is what runs) -> [B, T, H, D] and no weights.
    """
    if attention_mask is None or query.size(1) == key.size(1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    form = shared_by_kernel if query.device.type == "cpu" else folded
    return form(query, key, value, attention_mask[..., : key.size(2)], scaling), None


def shared_by_kernel(query, key, value, mask, scale):
    """-> [B, T, H, D]: the kernel for CPUs shares keys itself, also behind a mask; others then repeat them."""
    out = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def folded(query, key, value, mask, scale):
    """-> [B, T, H, D]: the query heads of a group are more rows of one head."""
    (batch, heads, rows, width), shared = query.shape, key.size(1)
    group = heads // shared
    mask = mask.expand(batch, 1, rows, key.size(2)).repeat(1, 1, group, 1)
    out = scaled_dot_product_attention(query.reshape(batch, shared, group * rows, width), key, value, mask, scale=scale)
    return out.view(batch, heads, rows, width).transpose(1, 2).contiguous()


def use_grouped(config) -> None:
    """Lets a text body with this config attend so, where it attends by `sdpa` and its queries share keys."""
    from transformers import AttentionInterface, AttentionMaskInterface  # with all model code: it takes seconds

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    heads, shared = (getattr(config, name, None) or 0 for name in ("num_attention_heads", "num_key_value_heads"))
    if config._attn_implementation == "sdpa" and 0 < shared < heads:
        config._attn_implementation = NAME
