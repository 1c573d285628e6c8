"""The speculators directory (vLLM-native): self-describing, names its verifier, `layers.0.*` keys, the target's embedding included.

The top level must not hold `model_type`, and `norm_before_residual` must be written: readers take a missing one for true.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from draftsmith.models.errors import UserError
from draftsmith.models.formats.eagle import build, from_config, read_files, to_config
from draftsmith.models.heads import Eagle3Head
from draftsmith.models.heads.vocabulary import to_offsets

LAYER_KEYS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
              "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "vocab_size",
              "attention_bias", "mlp_bias")


def save_speculators(head: Eagle3Head, folder: str | Path, verifier: str, verifier_architecture: str, speculative_tokens: int,
                     dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes config.json and model.safetensors to a new folder. Raises UserError when the folder exists."""
    folder, config = Path(folder), to_config(head.config, dtype)
    if folder.exists():
        raise UserError(f"{folder} exists; expected a new place")
    tensors = {name.replace("midlayer.", "layers.0."): value.detach().to("cpu", dtype).contiguous() for name, value in head.state_dict().items()}
    tensors["embed_tokens.weight"] = head.embedding.detach().to("cpu", dtype).contiguous()
    if head.config.draft_vocab_size != head.config.vocab_size:
        tensors |= to_offsets(head.ids, head.config.vocab_size)
    document = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.7.0",
        "draft_vocab_size": head.config.draft_vocab_size, "target_hidden_size": None, "norm_before_residual": False, "norm_before_fc": False,
        "fc_norm": False, "norm_output": False, "embed_requires_grad": False, "eagle_aux_hidden_state_layer_ids": list(head.config.taps),
        "torch_dtype": config["torch_dtype"], "transformer_layer_config": {key: config[key] for key in LAYER_KEYS},
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": speculative_tokens, "accept_tolerance": 0.0,
                                  "verifier_accept_k": 1}],
            "verifier": {"name_or_path": verifier, "architectures": [verifier_architecture]}},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(document, indent=2) + "\n")
        new.rename(folder)
    return folder


def load_speculators(folder: str | Path, embedding: torch.Tensor, taps_below: int | None = None) -> Eagle3Head:
    """Reads such a directory for a target with this embedding [V, h]; arguments and errors as in `load_drafter`."""
    (stored, tensors), place = read_files(folder), f"{folder}/config.json"
    if stored.get("speculators_model_type") != "eagle3":
        raise UserError(f"{place}: speculators_model_type: found {stored.get('speculators_model_type')!r}, expected 'eagle3'")
    if stored.get("norm_before_residual") is not False:
        raise UserError(f"{place}: norm_before_residual: found {stored.get('norm_before_residual')}, expected false")
    flat = {**stored.get("transformer_layer_config", {}), **stored, "architectures": ["LlamaForCausalLMEagle3"]}
    tensors = {name.replace("layers.0.", "midlayer."): value for name, value in tensors.items() if name != "embed_tokens.weight"}
    return build(from_config(flat, place), tensors, embedding, taps_below, folder)
