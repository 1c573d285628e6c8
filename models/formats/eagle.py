"""The EAGLE-1/2 directory, of HASS heads too: config.json and model.safetensors with `fc`, one layer without input
norm, and no output head.

The engines differ in two points, so that there are two layouts. The name: SGLang knows LlamaForCausalLMEagle, vLLM puts
"Eagle" before LlamaForCausalLM. The bias of `fc`: SGLang always applies one (left as it happens to be where the file
has none), vLLM never does and says nothing. SGLang's layout, which can store every head, is the one that drafters are
kept in: without bias it has zeros there and `"bias": false`. Both are read, and what the authors publish
(`LlamaForCausalLM`, with bias, embedding included).
"""

from pathlib import Path

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared
from draftsmith.models.formats.layer import (
    LEFT_OUT,
    check_embedding,
    check_expected,
    check_target,
    layer_entries,
    layer_figures,
    rope,
    rope_entries,
)
from draftsmith.models.formats.layout import Layout, Serving, Tensors, architecture, check_tensors
from draftsmith.models.formats.mended import holds_eagle, mend_eagle
from draftsmith.models.heads import EagleConfig, EagleHead

SGLANG, VLLM = "LlamaForCausalLMEagle", "LlamaForCausalLM"
EXPECTED = {
    "attention_bias": False,
    "qkv_bias": False,
    "mlp_bias": False,
    "add_para_norm": False,
    "logit_scale": None,
    "hidden_act": "silu",
    "num_hidden_layers": 1,
}


def recognises(config: dict) -> bool:
    return architecture(config) == SGLANG


def recognises_vllm(config: dict) -> bool:
    """EAGLE-3 heads of the same name have a draft vocabulary, targets have more layers."""
    others = {"speculators_model_type", "draft_vocab_size"}
    return architecture(config) == VLLM and config.get("num_hidden_layers") == 1 and not others & set(config)


def expected_shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Every stored key with its shape."""
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = {
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (i, h),
        "mlp.up_proj": (i, h),
        "mlp.down_proj": (h, i),
        "post_attention_layernorm": (h,),
    }
    bias = {"fc.bias": (h,)} if config.bias else {}
    return {"fc.weight": (h, 2 * h)} | bias | {f"layers.0.{name}.weight": shape for name, shape in layer.items()}


def to_config(config: EagleConfig, dtype: torch.dtype, architecture: str) -> dict:
    """config.json."""
    return {
        "architectures": [architecture],
        **layer_entries(config),
        "bias": config.bias,
        **rope_entries(config),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def from_config(stored: dict, place: str, bias: bool) -> EagleConfig:
    """config.json -> config; bias: whether `fc` has one where the file says nothing of it. Raises UserError naming what
    this head computes otherwise.
    """
    check_expected(stored, EXPECTED, place)
    bias = stored.get("bias", bias)
    if type(bias) is not bool:
        raise UserError(f"{place}: bias: found {bias!r}, expected true or false")
    return EagleConfig(**layer_figures(stored, place), rope_parameters=rope(stored, place), bias=bias)


def read(stored: dict, tensors: Tensors, shared: Shared, taps_below: int | None, folder: Path) -> EagleHead:
    """`Layout.read`: checked against the target before anything is built."""
    place = f"{folder}/config.json"
    config = from_config(stored, place, any(name.endswith("fc.bias") for name in tensors))
    check_target(config, shared, place)
    place = f"{folder}/model.safetensors"
    tensors = {name.removeprefix("model."): value for name, value in tensors.items() if not name.endswith(LEFT_OUT)}
    if "embed_tokens.weight" in tensors:
        check_embedding(tensors.pop("embed_tokens.weight"), shared.embedding, place)
    if not config.bias and not tensors.get("fc.bias", torch.ones(1)).any():
        tensors.pop("fc.bias")
    check_tensors(tensors, expected_shapes(config), place)
    head = EagleHead(config, shared)
    head.load_state_dict({name: value.to(shared.embedding) for name, value in tensors.items()}, assign=True)
    return head.eval()


def write(head: EagleHead, dtype: torch.dtype, serving: Serving | None = None) -> tuple[dict, Tensors]:
    """`Layout.write` for SGLang: no embedding (the target's is taken), and always a bias."""
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in head.state_dict().items()}
    tensors.setdefault("fc.bias", torch.zeros(head.config.hidden_size, dtype=dtype))
    return to_config(head.config, dtype, SGLANG), tensors


def write_vllm(head: EagleHead, dtype: torch.dtype, serving: Serving | None = None) -> tuple[dict, Tensors]:
    """`Layout.write` for vLLM. Raises UserError for a head with a bias, which vLLM would leave out without a word."""
    if head.config.bias:
        raise UserError(
            "--to vllm: head.bias: found true, expected false (vLLM leaves the bias of fc out without a word)"
        )
    _, tensors = write(head, dtype)
    tensors.pop("fc.bias")
    return to_config(head.config, dtype, VLLM), tensors


LAYOUT = Layout(
    EagleHead,
    {
        "sglang": "python -m sglang.launch_server --model-path $target --speculative-algorithm EAGLE "
        "--speculative-draft-model-path $drafter "
        "--speculative-num-steps $depth --speculative-eagle-topk 4 --speculative-num-draft-tokens 16",
    },
    recognises,
    read,
    write,
    holds=holds_eagle,
    mend=mend_eagle((SGLANG, VLLM)),
)
VLLM_LAYOUT = Layout(
    EagleHead,
    {
        "vllm": "vllm serve $target --speculative-config "
        """'{"method": "eagle", "model": "$drafter", "num_speculative_tokens": $depth}'""",
    },
    recognises_vllm,
    read,
    write_vllm,
    holds=holds_eagle,
    mend=mend_eagle((VLLM,)),
)
