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
WIDTH, VOCABULARY, HEADS, LAYERS = 32, 64, 2, 2  # of the small model, at most


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
    text = config.get_text_config()
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


def small_config(config):
    small = copy.deepcopy(config)
    heads, groups, layers = small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers
    width = getattr(small, "head_dim", None) or small.hidden_size // heads
    kinds = getattr(small, "layer_types", None) or []
    kept = min(layers, max([LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:  # one entry a layer
            setattr(small, key, value[:kept])
    small.num_hidden_layers = kept
    small.num_key_value_heads = min(groups, HEADS)
    small.num_attention_heads = small.num_key_value_heads * min(heads // groups, HEADS)
    small.hidden_size, small.vocab_size = small.num_attention_heads * width, VOCABULARY
    for key in WIDTHS:
        if isinstance(getattr(small, key, None), int):
            setattr(small, key, min(getattr(small, key), WIDTH))
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, key, None) is not None:
            setattr(small, key, 0)
    small.initializer_range = 0.2  # so that a difference between two ways of computing logits shows
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small
