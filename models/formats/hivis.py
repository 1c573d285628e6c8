"""The HiViS directory: config.json and model.safetensors with the authors' keys `embed_tokens`, `fc`, `residual` and
`layers.0`.

How many steps have a vector of their own is the number of rows of `residual`, which older files call
`adaptive_embedding`. The authors' configuration says nothing of positions and hidden tokens; without a word positions
are compact and visual tokens alone are hidden, as for their Llava heads. `qkv_bias` says whether queries, keys and
values have biases, as in their Qwen heads; without a word the tensors do. No engine serves these heads.
"""

from pathlib import Path

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared
from draftsmith.models.formats import eagle
from draftsmith.models.formats.layer import LEFT_OUT, check_embedding, check_target
from draftsmith.models.formats.layout import Layout, Serving, Stored, Tensors, architecture, check_tensors
from draftsmith.models.formats.mended import check_spelling, mend_eagle, plain_names
from draftsmith.models.heads import HivisConfig, HivisHead

ARCHITECTURE, MARKS = "HivisLlama", ("residual", "adaptive_embedding")


def recognises(config: dict) -> bool:
    return architecture(config) == ARCHITECTURE


def read(stored: dict, tensors: Tensors, shared: Shared, taps_below: int | None, folder: Path) -> HivisHead:
    """`Layout.read`: checked against the target before anything is built."""
    place, vocab = f"{folder}/config.json", len(shared.embedding)
    base = eagle.from_config({name: value for name, value in stored.items() if name != "qkv_bias"}, place, True)
    positions = stored.get("positions", "compact")
    if positions not in ("compact", "original"):
        raise UserError(f"{place}: positions: found {positions}, expected compact or original")
    check_target(base, shared, place)
    if not base.bias:
        raise UserError(f"{place}: bias: found false, expected true")
    place = f"{folder}/model.safetensors"
    tensors = {name: value for name, value in tensors.items() if not name.endswith(LEFT_OUT)}
    if "embed_tokens.weight" in tensors:
        check_embedding(tensors.pop("embed_tokens.weight"), shared.embedding, place)
    rows = len(tensors["residual"]) if "residual" in tensors and tensors["residual"].ndim else 1
    bias = stored.get("qkv_bias", "layers.0.self_attn.q_proj.bias" in tensors)
    drop_ids = stored.get("drop_token_ids") or []
    if not isinstance(drop_ids, list) or not all(type(i) is int and 0 <= i < vocab for i in drop_ids):
        raise UserError(f"{folder}/config.json: drop_token_ids: found {drop_ids!r}, expected ids below {vocab}")
    if type(bias) is not bool:
        raise UserError(f"{folder}/config.json: qkv_bias: found {bias!r}, expected true or false")
    config = HivisConfig(
        **vars(base),
        qkv_bias=bias,
        residuals=rows,
        positions=positions,
        drop_ids=tuple(drop_ids),
    )
    check_tensors(tensors, expected_shapes(config), place)
    head = HivisHead(config, shared)
    head.load_state_dict({name: value.to(shared.embedding) for name, value in tensors.items()}, assign=True)
    return head.eval()


def expected_shapes(config: HivisConfig) -> dict[str, tuple[int, ...]]:
    """Every stored key but the embedding, with its shape."""
    h, q, kv = (
        config.hidden_size,
        *(count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads)),
    )
    biases = (
        {f"layers.0.self_attn.{name}_proj.bias": (size,) for name, size in (("q", q), ("k", kv), ("v", kv))}
        if config.qkv_bias
        else {}
    )
    return eagle.expected_shapes(config) | {"fc.weight": (h, 3 * h), "residual": (config.residuals, h)} | biases


def write(head: HivisHead, dtype: torch.dtype, serving: Serving | None = None) -> tuple[dict, Tensors]:
    """`Layout.write`, with the target's embedding, which the authors' loader wants."""
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in head.state_dict().items()}
    tensors["embed_tokens.weight"] = head.shared.embedding.detach().to("cpu", dtype).contiguous()
    own = {
        "qkv_bias": head.config.qkv_bias,
        "num_residuals": head.config.residuals,
        "positions": head.config.positions,
        "drop_token_ids": list(head.config.drop_ids),
    }
    return eagle.to_config(head.config, dtype, ARCHITECTURE) | own, tensors


def holds(tensors: Tensors) -> bool:
    return any(name in MARKS for name in plain_names(tensors))


def mend(stored: Stored, layers: int | None, taps: str | None) -> tuple[dict, Tensors, list[str]]:
    """`Layout.mend`: as of EAGLE-1 heads, with one name for the vectors of the steps."""
    renamed = lambda name: "residual" if name in MARKS else name  # noqa: E731
    place = f"{stored.folder}/model.safetensors"
    check_spelling(stored.tensors, place, lambda name: renamed(name.removeprefix("model.")))
    config, tensors, lines = mend_eagle((ARCHITECTURE,), "a HiViS head")(stored, layers, taps)
    return config, {renamed(name): value for name, value in tensors.items()}, lines


LAYOUT = Layout(HivisHead, {}, recognises, read, write, holds=holds, mend=mend)
