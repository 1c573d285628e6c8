"""A decoder layer that attends to the target's states instead of to its own rows (DREAM), and masked attention for rows
that may see nothing.

Keys and values come from states as they are, without another norm and without positions; queries and keys are
normalised per head; both residual branches stand behind gates tanh(g), g = 0 at first: then the layer passes its input
on.
"""

import torch
import torch.nn.functional as F
from torch import nn

from draftsmith.models.heads.layer import MLP


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """query [B, T, H, D]; keys, values [B, H_kv, S, D]; seen [B, T, S] bool -> [B, T, H, D], zero where a row sees
    nothing (a softmax over finite masks would mix all keys, those of the future too).
    """
    if seen.size(-1) == 0:
        return torch.zeros_like(query)
    some = seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        attn_mask=(seen | ~some)[:, None],
        scale=scale,
        enable_gqa=query.size(2) != keys.size(1),
    )
    return out.transpose(1, 2).masked_fill(~some[..., None], 0)


class CrossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.scale = self.head_dim**-0.5

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., h] -> [..., H, D]."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)))

    def key_value(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """states [..., h] -> keys and values [..., H_kv, D]."""
        key = self.k_norm(self.k_proj(states).unflatten(-1, (self.kv_heads, self.head_dim)))
        return key, self.v_proj(states).unflatten(-1, (self.kv_heads, self.head_dim))


class CrossLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.attn_gate, self.mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def query(self, x: torch.Tensor) -> torch.Tensor:
        return self.cross_attn.query(self.input_layernorm(x))

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """x [..., h] (residual), attended [..., H, D] -> layer output [..., h]."""
        y = x + self.attn_gate.tanh() * self.cross_attn.o_proj(attended.flatten(-2))
        return y + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(y))
