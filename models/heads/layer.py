"""Parts of a Llama decoder layer that heads are built of. Parameter names are those that drafters are stored under."""

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.heads.adapted import matrix
from draftsmith.models.heads.unroll import turn

COPIED = ("default", "linear", "llama3", "yarn")  # types of rope that do not change with the length


def rope_of(config, name: str) -> dict:
    """The rope of a head for a target's text config. It is the target's; where kinds of layer have ropes of their own
    (Gemma 3) that of full attention, since heads attend to all rows; of one dimension where images count in three
    (M-RoPE). Where a head cannot copy it (`rope_difference`) the head has a plain one of its own, with the target's
    base. Raises UserError, which names the head, for targets without one.
    """
    rope = target_rope(config)
    if "rope_theta" not in rope:
        raise UserError(f"{name}: rope_parameters: found {rope or 'none'}, expected one rope or one of full_attention")
    return {"rope_type": "default", "rope_theta": rope["rope_theta"]} if rope_difference(rope) else rope


def target_rope(config) -> dict:
    """The rope of full attention, of one dimension; {} without any."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return {key: value for key, value in rope.items() if key != "mrope_section" and value != "mrope"}


def rope_difference(rope: dict) -> str | None:
    """What no head computes in this rope: a type that changes with the length, or turning a part of each query; None
    for one that heads copy.
    """
    kind, partial = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
    if kind not in COPIED:
        return f"rope_type: found {kind!r}, expected {', '.join(COPIED[:-1])} or {COPIED[-1]}"
    if partial not in (None, 1):
        return f"partial_rotary_factor: found {partial}, expected 1 (the head turns all of a query)"
    return None


def check_rope(rope: dict) -> None:
    """Raises UserError for a rope that no head computes."""
    if found := rope_difference(rope):
        raise UserError(found)


def frequencies(config, device) -> tuple[torch.Tensor, float]:
    """The target's rotary frequencies [D / 2] fp32 and attention scaling. Raises UserError as `check_rope`."""
    check_rope(config.rope_parameters)
    from transformers import LlamaConfig  # with all of the library's code for models, which takes seconds to import
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        rope = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                rope_parameters=dict(config.rope_parameters),
                max_position_embeddings=config.max_position_embeddings,
            )
        )
    except (ArithmeticError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"rope_parameters: found {config.rope_parameters}, which make no rope ({why})") from None
    return rope.inv_freq.to(device), rope.attention_scaling


def angles(
    rope: tuple[torch.Tensor, float], positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [...] -> cos, sin [..., 1, D] for `turn`."""
    inverse, scaling = rope
    turned = positions[..., None, None].float() * inverse.to(positions.device)
    cos, sin = ((x * scaling).to(dtype) for x in (turned.cos(), turned.sin()))
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class Attention(nn.Module):
    """width: of its input, which may differ from the hidden size; bias: of its query, key and value projections."""

    def __init__(self, config, width: int, bias: bool = False):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.scale = self.head_dim**-0.5

    def query(self, u, cos, sin):
        """u [..., width] -> [..., H, D], turned."""
        return turn(self.q_proj(u).unflatten(-1, (self.heads, self.head_dim)), cos, sin)

    def key_value(self, u, cos, sin):
        """u [..., width] -> keys (turned) and values [..., H_kv, D]."""
        key = turn(self.k_proj(u).unflatten(-1, (self.kv_heads, self.head_dim)), cos, sin)
        return key, self.v_proj(u).unflatten(-1, (self.kv_heads, self.head_dim))

    def weight(self):
        """Query, key and value projections as one matrix [(H + 2 H_kv) D, width], for attention without biases."""
        return torch.cat([matrix(self.q_proj), matrix(self.k_proj), matrix(self.v_proj)])

    def repeat(self, x, dim: int):
        """Key/value heads to query heads."""
        return x.repeat_interleave(self.heads // self.kv_heads, dim)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer without the norms before its attention; width and bias: of the attention."""

    def __init__(self, config, width: int, bias: bool = False):
        super().__init__()
        self.self_attn = Attention(config, width, bias)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def finish(self, base, attended):
        """base [..., h] (residual), attended [..., H, D] -> layer output [..., h]."""
        y = base + self.self_attn.o_proj(attended.flatten(-2))
        return y + self.mlp(self.post_attention_layernorm(y))


def copy_matrix(source: nn.Module | None, weight: torch.Tensor) -> None:
    """A target's linear layer into a head's weight [out, in], where there is one of that shape."""
    matrix = getattr(source, "weight", None)
    if matrix is not None and matrix.shape == weight.shape:
        weight.copy_(matrix)


def copy_norm(source: nn.Module | None, norm: nn.RMSNorm) -> None:
    """A target's norm into a head's, where there is one of that width: the factor that it applies, not what it stores.
    Some families store the factor less one (Gemma), some add a bias.
    """
    if getattr(getattr(source, "weight", None), "shape", None) != norm.weight.shape:
        return
    signs = torch.ones_like(norm.weight)
    signs[1::2] = -1
    signs = signs.to(source.weight)
    norm.weight.copy_((source(signs) - source(-signs)) * signs / 2)
