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
from draftsmith.models.formats.eagle3 import LEFT_OUT, check_embedding, rope
from draftsmith.models.formats.layout import Layout, Serving, Tensors, architecture, check_tensors, layer_figures
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
    turning = dict(config.rope_parameters)
    scaling = {k: v for k, v in turning.items() if k != "rope_theta"}
    return {
        "architectures": [architecture],
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
        "bias": config.bias,
        "rope_theta": turning.get("rope_theta"),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "rope_parameters": turning,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def from_config(stored: dict, place: str, bias: bool) -> EagleConfig:
    """config.json -> config; bias: whether `fc` has one where the file says nothing of it. Raises UserError naming what
    this head computes otherwise.
    """
    for name, expected in EXPECTED.items():
        if stored.get(name, expected) not in (expected, None):
            raise UserError(
                f"{place}: {name}: found {stored[name]}, expected {str(expected).lower()} (this head computes "
                f"something else)"
            )
    bias = stored.get("bias", bias)
    if type(bias) is not bool:
        raise UserError(f"{place}: bias: found {bias!r}, expected true or false")
    return EagleConfig(**layer_figures(stored, place), rope_parameters=rope(stored, place), bias=bias)


def read(stored: dict, tensors: Tensors, shared: Shared, taps_below: int | None, folder: Path) -> EagleHead:
    """`Layout.read`: checked against the target before anything is built."""
    place, (vocab, hidden) = f"{folder}/config.json", shared.embedding.shape
    config = from_config(stored, place, any(name.endswith("fc.bias") for name in tensors))
    for name, found, expected in (
        ("vocab_size", config.vocab_size, vocab),
        ("hidden_size", config.hidden_size, hidden),
    ):
        if found != expected:
            raise UserError(f"{place}: {name}: found {found}, expected the target's {expected}")
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
