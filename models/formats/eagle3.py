"""The EAGLE-3 directory that vLLM and SGLang load: config.json and model.safetensors, nothing missing, nothing unknown.

Written in one form (`midlayer.*` keys, which both engines read; SGLang skips `layers.0.*` without a word). Read in
every form that says the same: other spellings of keys, legacy rope fields, defaults that the engines fill in, an
embedding that is the target's own. EAGLE-3.1's norms are flags of vLLM's (`fc_norm`, `norm_output`); a sliding window
is that of the layer's type (`layer_types`, `sliding_window`). A low-rank output head has the keys of EAGLE-4's public
configurations, which no engine loads without a plugin.
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
from draftsmith.models.formats.layout import Layout, Serving, Tensors, architecture, check_tensors, figures
from draftsmith.models.formats.mended import holds_eagle3, mend_eagle3
from draftsmith.models.formats.taps import NAME, possible
from draftsmith.models.heads import Eagle3Config, Eagle3Head
from draftsmith.models.heads.vocabulary import from_offsets, to_offsets

LOW_RANK = "LlamaForCausalLMEagle4"
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", LOW_RANK)
KINDS = {"d2t": torch.int64, "t2d": torch.bool}
EXPECTED = {
    "norm_before_residual": False,
    "norm_before_fc": False,
    "attention_bias": False,
    "mlp_bias": False,
    "logit_scale": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "num_hidden_layers": 1,
}
FLAGS = ("fc_norm", "norm_output")  # EAGLE-3.1
STORED = {  # parts of a low-rank output head, as they are stored
    "lm_head.exact.weight": "lm_head.weight",
    "lm_head.up.weight": "efficient_lm_head.weight",
    "lm_head.down.weight": "efficient_lm_head_down_proj.weight",
}


def recognises(config: dict) -> bool:
    """The authors' own heads say LlamaForCausalLM, as EAGLE-1 does; the draft vocabulary tells them apart."""
    name = architecture(config)
    return "speculators_model_type" not in config and (
        name in ARCHITECTURES or name == "LlamaForCausalLM" and "draft_vocab_size" in config
    )


def expected_shapes(config: Eagle3Config, target_hidden: int) -> dict[str, tuple[int, ...]]:
    """Every stored key with its shape; `d2t` and `t2d` only where the draft vocabulary is smaller than the target's."""
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "fc.weight": (h, len(config.taps) * target_hidden),
        "midlayer.input_layernorm.weight": (h,),
        "midlayer.hidden_norm.weight": (h,),
        "midlayer.post_attention_layernorm.weight": (h,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * h),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * h),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * h),
        "midlayer.self_attn.o_proj.weight": (h, q),
        "midlayer.mlp.gate_proj.weight": (i, h),
        "midlayer.mlp.up_proj.weight": (i, h),
        "midlayer.mlp.down_proj.weight": (h, i),
        "norm.weight": (h,),
        "lm_head.weight": (config.draft_vocab_size, h),
    }
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (target_hidden,) for i in range(len(config.taps))}
    if config.candidate_rank is not None:
        shapes["efficient_lm_head.weight"] = (config.vocab_size, config.candidate_rank)
        shapes["efficient_lm_head_down_proj.weight"] = (config.candidate_rank, h)
    if config.draft_vocab_size != config.vocab_size:
        shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return shapes


def to_config(config: Eagle3Config, dtype: torch.dtype) -> dict:
    """config.json. Taps are written in both conventions: entering layer k (vLLM, top level) and leaving layer k
    (SGLang).
    """
    more = {}
    if config.sliding_window is not None:
        more |= {"sliding_window": config.sliding_window, "layer_types": ["sliding_attention"]}
    if config.candidate_rank is not None:
        more["efficient_lm_head_config"] = {
            "type": "low_rank",
            "rank": config.candidate_rank,
            "num_candidates": config.num_candidates,
        }
    return {
        "architectures": [ARCHITECTURES[0] if config.candidate_rank is None else LOW_RANK],
        **layer_entries(config),
        **rope_entries(config),
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "norm_before_residual": False,
        **{name: getattr(config, name) for name in FLAGS},
        **more,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [k - 1 for k in config.taps],
        },
    }


def from_config(stored: dict, place: str) -> Eagle3Config:
    """config.json -> config, with the engines' defaults for what is absent. Raises UserError naming what this head
    computes otherwise.
    """
    check_expected(stored, EXPECTED, place)
    if stored.get("target_hidden_size") not in (None, stored.get("hidden_size")):
        raise UserError(
            f"{place}: target_hidden_size: found {stored['target_hidden_size']}, expected hidden_size "
            f"{stored.get('hidden_size')}"
        )
    taps = tuple(stored[NAME])
    if stored.get("num_aux_hidden_states") not in (None, len(taps)):
        raise UserError(
            f"{place}: num_aux_hidden_states: found {stored['num_aux_hidden_states']}, expected {len(taps)}"
        )
    shape = layer_figures(stored, place)
    given = {"draft_vocab_size": stored.get("draft_vocab_size") or shape["vocab_size"]}
    for name in FLAGS:
        if not isinstance(stored.get(name), bool | None):
            raise UserError(f"{place}: {name}: found {stored[name]!r}, expected true or false")
    more = {name: bool(stored.get(name)) for name in FLAGS}
    if "sliding_attention" in (stored.get("layer_types") or ()):
        more |= figures(stored, ("sliding_window",), place)
    if stored.get("efficient_lm_head_config") is not None:
        more |= low_rank(stored["efficient_lm_head_config"], f"{place}: efficient_lm_head_config")
    given = figures(given, tuple(given), place)
    try:
        return Eagle3Config(**shape, **given, **more, rope_parameters=rope(stored, place), taps=taps).checked()
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(place) else f"{place}: {error}") from None


def low_rank(stored, place: str) -> dict:
    if not isinstance(stored, dict) or stored.get("type") != "low_rank":
        raise UserError(f"{place}: found {stored!r}, expected an object of type 'low_rank'")
    found = figures(stored, ("rank", "num_candidates"), place)
    return {"candidate_rank": found["rank"], "num_candidates": found["num_candidates"]}


def read(stored: dict, tensors: Tensors, shared: Shared, taps_below: int | None, folder: Path) -> Eagle3Head:
    """`Layout.read`: checked against the target before anything is built."""
    place, embedding = f"{folder}/config.json", shared.embedding
    vocab, hidden = embedding.shape
    config = from_config(stored, place)
    check_target(config, shared, place)
    if not possible(config.taps, taps_below):
        raise UserError(
            f"{place}: {NAME}: found {list(config.taps)}, expected ascending numbers "
            f"from 1 to {taps_below - 1 if taps_below else 'the number of layers less one'}"
        )
    place = f"{folder}/model.safetensors"
    tensors = respell(tensors, config)
    if "embed_tokens.weight" in tensors:
        check_embedding(tensors.pop("embed_tokens.weight"), embedding, place)
    check_tensors(tensors, expected_shapes(config, hidden), place, KINDS)
    try:
        ids = from_offsets(tensors.pop("d2t"), tensors.pop("t2d"), vocab) if "d2t" in tensors else None
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    head = Eagle3Head(config, shared, ids)
    if config.candidate_rank is not None:
        tensors |= {name: tensors.pop(key) for name, key in STORED.items()}
    head.load_state_dict({name: value.to(embedding) for name, value in tensors.items()}, assign=True)
    return head.eval()


def respell(tensors: Tensors, config: Eagle3Config) -> Tensors:
    """`midlayer.*` keys without prefix; without what holds nothing of the head's own, such as an identical mapping of
    equal vocabularies.
    """
    named = {
        k.removeprefix("model.").replace("layers.0.", "midlayer.", 1): v
        for k, v in tensors.items()
        if not k.endswith(LEFT_OUT)
    }
    if config.draft_vocab_size == config.vocab_size and not bool(named.get("d2t", torch.ones(1)).any()):
        named.pop("d2t")
        named.pop("t2d", None)
    return named


def write(head: Eagle3Head, dtype: torch.dtype, serving: Serving | None = None) -> tuple[dict, Tensors]:
    """`Layout.write`: no embedding (both engines take the target's), no mapping between equal vocabularies."""
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in head.state_dict().items()}
    if head.config.candidate_rank is not None:
        tensors |= {key: tensors.pop(name) for name, key in STORED.items()}
    if head.config.draft_vocab_size != head.config.vocab_size:
        tensors |= to_offsets(head.ids, head.config.vocab_size)
    return to_config(head.config, dtype), tensors


def unable(head: Eagle3Head, engine: str) -> str | None:
    """`Layout.unable`: SGLang skips keys that it does not know without a word, and takes no window from a drafter."""
    if head.config.candidate_rank is not None:
        return f"candidate_rank: found {head.config.candidate_rank}, expected none"
    found = {name: getattr(head.config, name) for name in (*FLAGS, "sliding_window")}
    wrong = next((name for name, value in found.items() if value), None) if engine == "sglang" else None
    return wrong and f"{wrong}: found {str(found[wrong]).lower()}, expected none"


LAYOUT = Layout(
    Eagle3Head,
    {
        "vllm": "vllm serve $target --speculative-config "
        """'{"method": "eagle3", "model": "$drafter", "num_speculative_tokens": $depth}'""",
        "sglang": "python -m sglang.launch_server --model-path $target --speculative-algorithm EAGLE3 "
        "--speculative-draft-model-path $drafter "
        "--speculative-num-steps $depth --speculative-eagle-topk 4 --speculative-num-draft-tokens 16",
    },
    recognises,
    read,
    write,
    holds=holds_eagle3,
    mend=mend_eagle3((*ARCHITECTURES, "LlamaForCausalLM")),
    unable=unable,
)
