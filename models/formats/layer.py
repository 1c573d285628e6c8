"""What directories of heads with Llama decoder layers share: the entries of config.json that describe a layer and its
rope, and what is checked of them and of a stored embedding.
"""

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared
from draftsmith.models.formats.layout import figures
from draftsmith.models.heads.config import LayerConfig

LAYER_FIGURES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
)
LEFT_OUT = (
    "rotary_emb.inv_freq",
    "verifier_lm_head.weight",
    "verifier_norm.weight",
)  # suffixes of keys that hold nothing of the head's own


def layer_entries(config: LayerConfig) -> dict:
    """Of config.json: a head of one layer, its widths and counts."""
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
    }


def rope_entries(config: LayerConfig) -> dict:
    """Of config.json: the rope, in today's form and in the one that engines read before, and how far it goes."""
    rope = dict(config.rope_parameters)
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
    }


def layer_figures(stored: dict, place: str) -> dict:
    """The widths and counts of a head of one decoder layer, with the engines' defaults for what is absent. Raises
    UserError as `figures`.
    """
    found = figures(stored, LAYER_FIGURES, place)
    heads = found["num_attention_heads"]
    usual = {"num_key_value_heads": heads, "head_dim": found["hidden_size"] // heads}
    given = {name: value if stored.get(name) is None else stored[name] for name, value in usual.items()}
    found |= figures(given, tuple(given), place)
    if heads % found["num_key_value_heads"]:
        raise UserError(
            f"{place}: num_key_value_heads: found {found['num_key_value_heads']}, expected a divisor of {heads}"
        )
    if found["head_dim"] % 2:
        raise UserError(f"{place}: head_dim: found {found['head_dim']}, expected an even number")
    return found


def rope(stored: dict, place: str) -> dict:
    """`rope_parameters`, or the same from the legacy `rope_theta` and `rope_scaling`."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(stored.get(name), dict | None):
            raise UserError(f"{place}: {name}: found {stored[name]!r}, expected an object or null")
    scaling = dict(stored.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
    found = dict(stored.get("rope_parameters") or {"rope_theta": stored.get("rope_theta", 10000.0), **scaling})
    if stored.get("rope_theta") not in (None, found.get("rope_theta")):
        raise UserError(
            f"{place}: rope_theta: found {stored['rope_theta']}, expected rope_parameters' {found.get('rope_theta')}"
        )
    figures(found, ("rope_theta",), place)
    if "mrope_section" in found:
        raise UserError(
            f"{place}: mrope_section: found {found['mrope_section']}, expected none (this head turns by one position)"
        )
    return found


def check_expected(stored: dict, expected: dict, place: str) -> None:
    """Raises UserError for an entry of config.json with which a head computes something else than ours; what is absent
    or null is as expected.
    """
    for name, value in expected.items():
        if stored.get(name, value) not in (value, None):
            raise UserError(
                f"{place}: {name}: found {stored[name]}, expected {str(value).lower()} (this head computes something "
                f"else)"
            )


def check_target(config: LayerConfig, shared: Shared, place: str) -> None:
    """Raises UserError for a head of another vocabulary or width than the target's."""
    for name, expected in zip(("vocab_size", "hidden_size"), shared.embedding.shape):
        if (found := getattr(config, name)) != expected:
            raise UserError(f"{place}: {name}: found {found}, expected the target's {expected}")


def check_embedding(stored: torch.Tensor, embedding: torch.Tensor, place: str) -> None:
    """A stored embedding must be the target's, in the coarser of the two precisions."""
    if stored.shape != embedding.shape:
        raise UserError(
            f"{place}: embed_tokens.weight: found {tuple(stored.shape)}, expected the target's {tuple(embedding.shape)}"
        )
    if not stored.is_floating_point():
        raise UserError(f"{place}: embed_tokens.weight: found {stored.dtype}, expected a floating type")
    dtype = min(stored.dtype, embedding.dtype, key=lambda d: torch.finfo(d).bits)
    wrong = int((stored.to(embedding.device, dtype) != embedding.to(dtype)).any(1).sum())
    if wrong:
        raise UserError(
            f"{place}: embed_tokens.weight: {wrong} of {len(stored)} rows differ from the target's, expected its own "
            f"embedding"
        )
