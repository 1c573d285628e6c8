"""The shapes of the reference targets: a Llama, a hybrid of gated delta rule and full attention layers (as Qwen3.5,
three to one), and a Mamba-2.
"""

import copy
from typing import Literal

import torch
from pydantic import Field, model_validator
from transformers import AutoModelForCausalLM, PreTrainedConfig

from draftsmith.train.recipe import Strict

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ATTENTION = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
)
INTERVAL = 4  # every so many layers of a hybrid one attends
WRITING = ("o_proj", "out_proj", "down_proj")  # the matrices by which a layer adds to the residual


class States(Strict):
    """Layers with a state. hybrid: `groups` key heads of width `size`, `heads` value heads of width `head_dim`. mamba2:
    `heads` of width `head_dim` (together twice the hidden size) in `groups`, `size` state numbers to each channel.
    """

    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    groups: int = Field(gt=0)
    size: int = Field(gt=0)


class Architecture(Strict):
    """intermediate_size to rope_theta: of llama and hybrid; states: of hybrid and mamba2."""

    family: Literal["llama", "hybrid", "mamba2"] = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    states: States | None = None

    @model_validator(mode="after")
    def _whole(self):
        wanted = (() if self.family == "mamba2" else ATTENTION) + (() if self.family == "llama" else ("states",))
        for name in (*ATTENTION, "states"):
            if (getattr(self, name) is None) == (name in wanted):
                found, expected = ("none", "a value") if name in wanted else (getattr(self, name), "none")
                raise ValueError(f"{name}: found {found}, expected {expected} for {self.family}")
        return self

    def config(self, layers: int) -> PreTrainedConfig:
        """A config of so many layers, whose embedding is the output head."""
        from transformers import LlamaConfig, Mamba2Config, Qwen3_5TextConfig  # with all model code: it takes seconds

        common = {**IDS, "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "num_hidden_layers": layers}
        common |= {"tie_word_embeddings": True, "use_cache": False}
        if self.family == "mamba2":
            return Mamba2Config(
                **common,
                num_heads=self.states.heads,
                head_dim=self.states.head_dim,
                n_groups=self.states.groups,
                state_size=self.states.size,
                initializer_range=0.02,
                chunk_size=64,
            )
        common |= {name: getattr(self, name) for name in ATTENTION if name != "rope_theta"}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.family == "llama":
            return LlamaConfig(**common, rope_parameters=rope)
        return Qwen3_5TextConfig(
            **common,
            rope_parameters={**rope, "partial_rotary_factor": 1.0},
            layer_types=["full_attention" if (i + 1) % INTERVAL == 0 else "linear_attention" for i in range(layers)],
            linear_num_key_heads=self.states.groups,
            linear_key_head_dim=self.states.size,
            linear_num_value_heads=self.states.heads,
            linear_value_head_dim=self.states.head_dim,
        )


def random_model(config: PreTrainedConfig):
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def grow(model, layers: int):
    """The same function with more layers: each layer is followed by copies of itself that add zero to the residual."""
    old = model.config.num_hidden_layers
    if layers % old:
        raise ValueError(f"cannot grow {old} layers to {layers}: not a multiple")
    factor, config = layers // old, copy.deepcopy(model.config)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = layers
    if kinds is not None and "layer_types" in vars(config):
        config.layer_types = [kind for kind in kinds for _ in range(factor)]
    grown = random_model(config)
    layered = tuple(f"{name}." for name, module in model.named_modules() if module is model.get_decoder().layers)
    grown.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(layered)}, strict=False)
    for index, layer in enumerate(grown.get_decoder().layers):
        layer.load_state_dict(model.get_decoder().layers[index // factor].state_dict())
        for name, module in layer.named_modules() if index % factor else ():
            if name.rpartition(".")[2] in WRITING:
                torch.nn.init.zeros_(module.weight)
    return grown
