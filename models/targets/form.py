"""What a config alone says of a target's form: the figures that it has to have, and a small model of the same
architecture, on which everything that a target is asked at load can be tried before any weights are read.
"""

import copy

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from draftsmith.models.errors import UserError
from draftsmith.models.targets.vision import FAMILIES
from draftsmith.models.targets.weights import one_line, quietly

SCALES = ("lm_head_multiplier", "logit_scale", "logits_scaling")  # of logits, behind the output head
UNBOUNDED = 2**20  # tokens: the context of a model that has states alone
HEAD_WIDTH = 64  # of heads for a target that has none
FIGURES = (  # that the config of every supported target has
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
SEVERAL_STATES = ("gemma3n", "gemma3n_text")  # a token, of which no small model can be made
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERTS, FEW = ("num_experts", "num_local_experts", "n_routed_experts"), 8
WIDTH, VOCABULARY, HEADS, LAYERS = 32, 64, 2, 2  # of the small model, at most
STATE_HEADS = {  # the names of (heads, their width, groups, inner width by hidden width) of Mamba-2 layers
    "num_heads": ("head_dim", "n_groups", "expand"),
    "mamba_n_heads": ("mamba_d_head", "mamba_n_groups", "mamba_expand"),
    "mamba_num_heads": ("mamba_head_dim", "n_groups", "expand"),
    "n_mamba_heads": ("mamba_headdim", "mamba_ngroups", "mamba_expand"),
}


def check_figures(config, name: str) -> None:
    """Raises UserError, with the family's name, for a config that describes no decoder like Llama."""
    if getattr(config, "vision_config", None) is not None:
        if config.model_type not in FAMILIES:
            raise UserError(
                f"target {name}: found vision-language model {config.model_type}, expected one of {', '.join(FAMILIES)}"
            )
    elif config.model_type in SEVERAL_STATES or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"target {name}: {config.model_type} is not supported: expected a causal language model with one "
            f"state a token"
        )
    text = completed(config.get_text_config())
    try:
        absent = [figure for figure in FIGURES if getattr(text, figure, None) is None]
        getattr(text, "head_dim", None)
    except RuntimeError as error:  # transformers, where layers have figures of their own
        raise UserError(f"target {name}: {text.model_type} is not supported: {one_line(error)}") from None
    if absent:
        raise UserError(
            f"target {name}: {text.model_type} is not supported: found no {absent[0]} in its config, expected one of a "
            f"decoder like Llama"
        )


def completed(config):
    """A text config with all that heads are made by. A target without attention has no heads, MLP or rope to go by:
    its drafter gets heads of the width of the target's own, or of 64, an MLP of 8/3 of the hidden size, and a plain
    rope. A target whose attention has no rope gives its drafter the rope alone. The config itself, where it lacks
    nothing.
    """
    states, roped = set(getattr(config, "layer_types", None) or ()), getattr(config, "rope_parameters", None)
    lacking = not roped or getattr(config, "intermediate_size", None) is None
    if not states & {"linear_attention", "hybrid"} or not lacking:
        return config
    config = copy.deepcopy(config)
    if getattr(config, "num_attention_heads", None) is None:
        width = getattr(config, "head_dim", None) or HEAD_WIDTH
        config.num_attention_heads = config.num_key_value_heads = max(1, config.hidden_size // width)
        config.max_position_embeddings = UNBOUNDED
    if getattr(config, "intermediate_size", None) is None:
        config.intermediate_size = -(-config.hidden_size * 8 // 3 // 64) * 64
    if not roped:
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    return config


def logit_scales(config) -> list[float]:
    """Factors that a config may multiply logits by behind the output head; some families divide by the same name."""
    found = [getattr(config, name, None) for name in SCALES]
    return [scale for value in found if value for scale in (float(value), 1 / float(value))]


def context_length(config) -> int:
    """How many tokens a target of this text config takes. A longrope has other frequencies behind its original length:
    there keys that were kept, and texts beside it in a batch, would be turned otherwise than by plain decoding.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [r for r in (rope, *rope.values()) if isinstance(r, dict) and r.get("rope_type") == "longrope"]
    originals = [r.get("original_max_position_embeddings") for r in ropes]
    return min([config.max_position_embeddings, *(length for length in originals if length)])


def small_model(config):
    """A random model [vocabulary 64, at most 2 layers or as many as show every kind of layer] of a text config's
    architecture, heads of the same width; None where none can be made of it. fp32, on the CPU; the random numbers of
    the process are left as they are. Raises ImportError for a package that the architecture needs.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    try:
        small = small_config(config)
        with quietly(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    except ImportError:
        raise
    except Exception:  # the widths of a family hang together in a way of their own: loading decides
        return None


def shrink_states(small) -> None:
    """Fits the heads of Mamba-2 layers to the hidden size of a small config: as many groups as before, at most 2, and
    the fewest heads whose widths add up.
    """
    if "linear_num_value_heads" in vars(small):  # the gated delta rule has widths of its own
        shared = small.linear_num_value_heads // small.linear_num_key_heads
        small.linear_num_key_heads = min(small.linear_num_key_heads, HEADS)
        small.linear_num_value_heads = small.linear_num_key_heads * shared
    if "attention_hidden_size" in vars(small):  # Zamba2: of the embedding beside the state
        small.attention_hidden_size = 2 * small.hidden_size
        small.attention_head_dim = small.attention_hidden_size // small.num_attention_heads
    for heads, (width, groups, expand) in STATE_HEADS.items():
        if {heads, groups, expand} <= set(vars(small)):
            setattr(small, groups, min(getattr(small, groups), HEADS))
            setattr(small, heads, 2 * getattr(small, groups))
            inner = getattr(small, expand) * small.hidden_size
            setattr(small, width, inner // getattr(small, heads))
            if "mamba_d_ssm" in vars(small):
                small.mamba_d_ssm = inner
            return


def shallow(config, layers: int):
    """A copy of a text config with its first layers alone."""
    few = copy.deepcopy(config)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:  # one entry a layer
            setattr(few, key, value[:layers])
    if vars(few).get("attn_layer_indices"):
        few.attn_layer_indices = [index for index in few.attn_layer_indices if index < layers]
    few.num_hidden_layers = layers
    return few


def narrow(config, vocab_size: int) -> None:
    """Gives a config so few ids: its special ones become 0, since embeddings refuse a padding id beyond them."""
    config.vocab_size = vocab_size
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, key, None) is not None:
            setattr(config, key, 0)


def small_config(config):
    small = copy.deepcopy(completed(config))
    heads, groups, layers = small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers
    width = getattr(small, "head_dim", None) or small.hidden_size // heads
    kinds = getattr(small, "layer_types", None) or []
    kept = min(layers, max([LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    small = shallow(small, kept)
    small.num_key_value_heads = min(groups, HEADS)
    small.num_attention_heads = small.num_key_value_heads * min(heads // groups, HEADS)
    small.hidden_size = small.num_attention_heads * width
    shrink_states(small)
    for key in WIDTHS:
        if isinstance(getattr(small, key, None), int):
            setattr(small, key, min(getattr(small, key), WIDTH))
    narrow(small, VOCABULARY)
    for key in EXPERTS:
        if isinstance(getattr(small, key, None), int):
            setattr(small, key, min(getattr(small, key), max(FEW, getattr(small, "num_experts_per_tok", None) or 0)))
    small.initializer_range = 0.2  # so that a difference between two ways of computing logits shows
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small
