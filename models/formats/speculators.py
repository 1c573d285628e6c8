"""EAGLE-3 in the speculators directory (vLLM-native): self-describing, names its verifier, `layers.0.*` keys, the
target's embedding included.

The top level must not hold `model_type` (vLLM then takes the plain path and fails), and `norm_before_residual` must be
written: readers take a missing one for true.
"""

from pathlib import Path

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared
from draftsmith.models.formats import eagle3
from draftsmith.models.formats.layout import Layout, Serving, Tensors
from draftsmith.models.formats.mended import holds_eagle3, mend_eagle3
from draftsmith.models.heads import Eagle3Head

VERSION = "0.7.0"  # of the format's description that this follows
LAYER_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "vocab_size",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "layer_types",
)


def recognises(config: dict) -> bool:
    return config.get("speculators_model_type") == "eagle3"


def read(stored: dict, tensors: Tensors, shared: Shared, taps_below: int | None, folder: Path) -> Eagle3Head:
    """`Layout.read`: the same head as in the EAGLE-3 directory, described elsewhere."""
    place, layer = f"{folder}/config.json", stored.get("transformer_layer_config")
    if "model_type" in stored:
        raise UserError(
            f"{place}: model_type: found {stored['model_type']!r}, expected none at the top level (vLLM would not "
            f"read it as speculators)"
        )
    if stored.get("norm_before_residual") is not False:
        raise UserError(f"{place}: norm_before_residual: found {stored.get('norm_before_residual')}, expected false")
    if not isinstance(layer, dict) or layer.get("model_type") != "llama":
        found = layer.get("model_type") if isinstance(layer, dict) else layer
        raise UserError(f"{place}: transformer_layer_config.model_type: found {found!r}, expected 'llama'")
    return eagle3.read({**layer, **stored}, tensors, shared, taps_below, folder)


def write(head: Eagle3Head, dtype: torch.dtype, serving: Serving | None) -> tuple[dict, Tensors]:
    """`Layout.write`; serving must be given."""
    config, tensors = eagle3.write(head, dtype)
    tensors = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
    tensors["embed_tokens.weight"] = head.embedding.detach().to("cpu", dtype).contiguous()
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "draft_vocab_size": head.config.draft_vocab_size,
        "target_hidden_size": None,
        "norm_before_residual": False,
        "norm_before_fc": False,
        **{name: config[name] for name in eagle3.FLAGS},
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": list(head.config.taps),
        "torch_dtype": config["torch_dtype"],
        "transformer_layer_config": {key: config[key] for key in LAYER_KEYS if key in config},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": serving.depth,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"name_or_path": serving.verifier, "architectures": [serving.architecture]},
        },
    }, tensors


LAYOUT = Layout(
    Eagle3Head,
    {"speculators": "vllm serve $drafter"},
    recognises,
    read,
    write,
    described=True,
    holds=holds_eagle3,
    mend=mend_eagle3(None, taps_are="entering"),
    unable=eagle3.unable,
)
