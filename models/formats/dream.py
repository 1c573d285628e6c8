"""The DREAM directory: config.json and model.safetensors with three blocks and the last norm, nothing of the target's.

No serving engine loads such heads. The names of keys are our own (`layers.0`, `layers.1.cross_attn`, `layers.2`,
`norm`): those of the authors' one published head are not known to us, so that it is not read.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared
from draftsmith.models.formats.layer import check_target, layer_figures, rope
from draftsmith.models.formats.layout import (
    Layout,
    Serving,
    Stored,
    Tensors,
    architecture,
    check_tensors,
)
from draftsmith.models.formats.mended import check_spelling, mend_architecture, plain_names
from draftsmith.models.heads import DreamConfig, DreamHead

ARCHITECTURE = "DreamDrafter"


def recognises(config: dict) -> bool:
    return architecture(config) == ARCHITECTURE


def expected_shapes(config: DreamConfig) -> dict[str, tuple[int, ...]]:
    """Every stored key with its shape."""
    h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    mlp = {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i), "post_attention_layernorm": (h,)}
    attention = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    own = mlp | {f"self_attn.{name}": shape for name, shape in attention.items()}
    cross = mlp | {
        f"cross_attn.{name}": shape for name, shape in (attention | {"q_norm": (d,), "k_norm": (d,)}).items()
    }
    blocks = (own, cross | {"input_layernorm": (h,)}, own | {"input_layernorm": (h,)})
    shapes = {f"layers.{n}.{name}.weight": shape for n, block in enumerate(blocks) for name, shape in block.items()}
    return shapes | {"layers.1.attn_gate": (1,), "layers.1.mlp_gate": (1,), "norm.weight": (h,)}


def from_config(stored: dict, place: str) -> DreamConfig:
    """config.json -> config. Raises UserError for what is missing or of another kind."""
    if missing := next((name for name in DreamConfig.__dataclass_fields__ if name not in stored), None):
        raise UserError(f"{place}: {missing}: missing")
    found = layer_figures(stored, place) | {"rope_parameters": rope(stored, place)}
    for name, right, expected in (
        ("keep_ratio", lambda v: type(v) in (int, float) and 0 < v <= 1, "a share above 0, at most 1"),
        ("positions", lambda v: v in ("original", "compact"), "original or compact"),
        ("middle_granularity", lambda v: v in ("token", "sample"), "token or sample"),
        ("middle_feature", lambda v: v in ("output", "input"), "output or input"),
        ("middle_first", lambda v: type(v) is int and v >= 0, "the number of a layer"),
        ("middle_last", lambda v: type(v) is int and v > stored["middle_first"], "a number above middle_first"),
    ):
        if not right(stored[name]):
            raise UserError(f"{place}: {name}: found {stored[name]!r}, expected {expected}")
        found[name] = stored[name]
    return DreamConfig(**found)


def read(stored: dict, tensors: Tensors, shared: Shared, taps_below: int | None, folder: Path) -> DreamHead:
    """`Layout.read`: checked against the target before anything is built."""
    place = f"{folder}/config.json"
    config = from_config(stored, place)
    check_target(config, shared, place)
    if taps_below is not None and config.middle_last > taps_below:
        raise UserError(
            f"{place}: middle_last: found {config.middle_last}, expected at most the target's {taps_below} layers"
        )
    check_tensors(tensors, expected_shapes(config), f"{folder}/model.safetensors")
    head = DreamHead(config, shared)
    head.load_state_dict({name: value.to(shared.embedding) for name, value in tensors.items()}, assign=True)
    return head.eval()


def write(head: DreamHead, dtype: torch.dtype, serving: Serving | None = None) -> tuple[dict, Tensors]:
    """`Layout.write`."""
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in head.state_dict().items()}
    about = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 3,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return about | asdict(head.config), tensors


def mend(stored: Stored, layers: int | None, taps: str | None) -> tuple[dict, Tensors, list[str]]:
    """`Layout.mend`: names with a prefix, and the target's architecture."""
    config = dict(stored.config)
    check_spelling(stored.tensors, f"{stored.folder}/model.safetensors", lambda name: name.removeprefix("model."))
    return config, plain_names(stored.tensors), mend_architecture(config, (ARCHITECTURE,), "a DREAM head")


LAYOUT = Layout(
    DreamHead,
    {},
    recognises,
    read,
    write,
    holds=lambda tensors: any(".cross_attn." in name for name in tensors),
    mend=mend,
)
