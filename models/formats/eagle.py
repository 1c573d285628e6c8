"""The EAGLE-3 directory that vLLM and SGLang load: config.json and model.safetensors, nothing missing, nothing unknown.

Neither engine reports a missing key (the parameter stays uninitialised) and vLLM refuses an unknown one, so every key, shape and dtype
is checked here, after writing and before use. What only draftsmith reads stands in draftsmith.json.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from draftsmith.models.errors import UserError
from draftsmith.models.heads import Eagle3Config, Eagle3Head
from draftsmith.models.heads.vocabulary import from_offsets, to_offsets


def expected_shapes(config: Eagle3Config, target_hidden: int) -> dict[str, tuple[int, ...]]:
    """Every stored key with its shape; `d2t` and `t2d` only where the draft vocabulary is smaller than the target's."""
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "fc.weight": (h, len(config.taps) * target_hidden),
        "midlayer.input_layernorm.weight": (h,), "midlayer.hidden_norm.weight": (h,), "midlayer.post_attention_layernorm.weight": (h,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * h), "midlayer.self_attn.k_proj.weight": (kv, 2 * h),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * h), "midlayer.self_attn.o_proj.weight": (h, q),
        "midlayer.mlp.gate_proj.weight": (i, h), "midlayer.mlp.up_proj.weight": (i, h), "midlayer.mlp.down_proj.weight": (h, i),
        "norm.weight": (h,), "lm_head.weight": (config.draft_vocab_size, h),
    }
    if config.draft_vocab_size != config.vocab_size:
        shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return shapes


def check_tensors(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], place: str) -> None:
    """Raises UserError with the first differences between found and expected keys, shapes and dtypes."""
    differences = [f"{k}: missing" for k in sorted(shapes.keys() - tensors.keys())]
    differences += [f"{k}: unknown key" for k in sorted(tensors.keys() - shapes.keys())]
    differences += [f"{k}: found {tuple(tensors[k].shape)}, expected {shape}" for k, shape in shapes.items()
                    if k in tensors and tuple(tensors[k].shape) != shape]
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    differences += [f"{k}: found {v.dtype}, expected {kinds.get(k, 'a floating type')}" for k, v in tensors.items()
                    if (v.dtype != kinds[k] if k in kinds else not v.is_floating_point())]
    if differences:
        raise UserError(f"{place}: {len(differences)} differences: {'; '.join(differences[:4])}")


def to_config(config: Eagle3Config, dtype: torch.dtype) -> dict:
    """config.json. Taps are written in both conventions: entering layer k (vLLM, top level) and leaving layer k (SGLang)."""
    rope = dict(config.rope_parameters)
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim,
        "hidden_act": "silu", "rms_norm_eps": config.rms_norm_eps, "attention_bias": False, "mlp_bias": False,
        "rope_theta": rope.get("rope_theta"), "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
        "rope_parameters": rope, "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size, "draft_vocab_size": config.draft_vocab_size, "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."), "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [k - 1 for k in config.taps]},
    }


def from_config(stored: dict, place: str) -> Eagle3Config:
    if stored.get("architectures") != ["LlamaForCausalLMEagle3"]:
        raise UserError(f"{place}: architectures: found {stored.get('architectures')}, expected ['LlamaForCausalLMEagle3']")
    for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias", "mlp_bias", "logit_scale"):
        if stored.get(flag):
            raise UserError(f"{place}: {flag}: found {stored[flag]}, expected false (this head computes something else)")
    try:
        return Eagle3Config(
            **{k: stored[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
                                      "rope_parameters", "max_position_embeddings", "vocab_size", "draft_vocab_size")},
            taps=tuple(stored["eagle_aux_hidden_state_layer_ids"]))
    except KeyError as error:
        raise UserError(f"{place}: {error.args[0]}: missing") from None


def save_drafter(head: Eagle3Head, folder: str | Path, about: dict, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the directory beside its place, checks it by reading it back bit for bit, then moves it there.

    `about` (target, recipe, figures) goes to draftsmith.json.
    """
    folder, config = Path(folder), head.config
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in head.state_dict().items()}
    if config.draft_vocab_size != config.vocab_size:
        tensors |= to_offsets(head.ids, config.vocab_size)
    check_tensors(tensors, expected_shapes(config, head.embedding.size(1)), "drafter")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(to_config(config, dtype), indent=2) + "\n")
        (new / "draftsmith.json").write_text(json.dumps({"head": head.name, **about}, indent=2) + "\n")
        again = load_drafter(new, head.embedding.float())
        for name, value in again.state_dict().items():
            if not torch.equal(value.to("cpu", dtype), tensors[name]):
                raise RuntimeError(f"{name} differs after reloading")
        if not torch.equal(again.ids.cpu(), head.ids.cpu()):
            raise RuntimeError("draft vocabulary differs after reloading")
        old = Path(temporary) / "old"
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    return folder


def load_drafter(folder: str | Path, embedding: torch.Tensor, taps_below: int | None = None) -> Eagle3Head:
    """Reads a directory for a target with this embedding [V, h] (`taps_below`: its number of layers). fp32 or the embedding's dtype.

    Raises UserError naming the file and the key when something is missing, unknown or of another target.
    """
    stored, tensors = read_files(folder)
    return build(from_config(stored, f"{folder}/config.json"), tensors, embedding, taps_below, folder)


def read_files(folder: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and the tensors of a drafter directory, of any layout."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; expected a drafter directory")
    try:
        return json.loads((folder / "config.json").read_text("utf-8")), load_file(folder / "model.safetensors")
    except json.JSONDecodeError as error:
        raise UserError(f"{folder}/config.json: not valid JSON ({error})") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/model.safetensors: cannot be read ({error})") from None


def build(config: Eagle3Config, tensors: dict[str, torch.Tensor], embedding: torch.Tensor, taps_below: int | None, folder: str | Path) -> Eagle3Head:
    """A head from checked tensors (`midlayer.*` keys), for a target with this embedding."""
    vocab, hidden = embedding.shape
    if config.vocab_size != vocab:
        raise UserError(f"{folder}/config.json: vocab_size: found {config.vocab_size}, expected the target's {vocab}")
    if config.hidden_size != hidden:
        raise UserError(f"{folder}/config.json: hidden_size: found {config.hidden_size}, expected the target's {hidden}")
    if not config.taps or list(config.taps) != sorted({k for k in config.taps if 0 < k < (taps_below or max(config.taps) + 1)}):
        raise UserError(f"{folder}/config.json: eagle_aux_hidden_state_layer_ids: found {list(config.taps)}, expected ascending numbers "
                        f"from 1 to {taps_below - 1 if taps_below else 'the number of layers less one'}")
    check_tensors(tensors, expected_shapes(config, hidden), f"{folder}/model.safetensors")
    try:
        ids = from_offsets(tensors.pop("d2t"), tensors.pop("t2d"), vocab) if "d2t" in tensors else None
    except UserError as error:
        raise UserError(f"{folder}/model.safetensors: {error}") from None
    head = Eagle3Head(config, embedding, ids)
    head.load_state_dict({name: value.to(embedding) for name, value in tensors.items()}, assign=True)
    return head.eval()
