"""Tiny GGUF files, written as the converters of llama.cpp write them, from a Llama model of transformers and a
byte-level tokenizer.
"""

import json
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, get_tensor_name_map, quants

KINDS = {  # of the matrices; vectors stay F32
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "Q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def write_gguf(
    file: Path,
    model,
    tokenizer,
    kind: str = "Q4_1",
    without: str = "",
    extra: dict = {},
    metadata: dict = {},
    **changes,
) -> Path:
    """without: a tensor that is left out; extra: tensors more; metadata: values more; changes: `split` or
    `architecture`.
    """
    config, arch = model.config, changes.get("architecture", "llama")
    stored, file_type = KINDS[kind]
    writer = GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, changes.get("split", "gpt-2"))
    for key, value in metadata.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {
        names.get_name(key, (".weight", ".bias")): turned(key, value, config).numpy()
        for key, value in model.state_dict().items()
        if not (key == "lm_head.weight" and config.tie_word_embeddings)
    }
    assert not without or tensors.pop(without) is not None
    for name, value in (tensors | extra).items():
        if value.ndim == 1:
            writer.add_tensor(name, value.astype(np.float32))
        else:
            writer.add_tensor(name, quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def turned(key: str, value: torch.Tensor, config) -> torch.Tensor:
    """llama.cpp turns neighbouring pairs of a head, transformers its halves: rows of queries and keys change places."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((count for name, count in heads.items() if name in key), None)
    if count is None:
        return value
    return value.view(count, 2, len(value) // count // 2, -1).transpose(1, 2).reshape(value.shape)


def dequantised(model, kind: str = "Q4_1") -> dict[str, torch.Tensor]:
    """What is left of a model's weights in a file of this kind, in bf16."""
    stored = KINDS[kind][0]
    return {
        key: (
            value
            if value.ndim == 1
            else torch.from_numpy(quants.dequantize(quants.quantize(value.numpy(), stored), stored)).view(value.shape)
        ).to(torch.bfloat16)
        for key, value in model.state_dict().items()
    }


def add_tokenizer(writer: GGUFWriter, tokenizer, split: str) -> None:
    words, special = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), set(tokenizer.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(words))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
