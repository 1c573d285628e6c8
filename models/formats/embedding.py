"""What a layout may need of a target beside the drafter: its config and its input embedding, read without opening the
model.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from draftsmith.models.errors import UserError
from draftsmith.models.targets.place import read_config

NAMES = ("embed_tokens.weight", "embeddings.weight", "wte.weight")


def read_target(name: str):
    """A Hub id, directory or `bundled:NAME` -> (its text config, architecture, input embedding [V, h] fp32 as stored).
    Raises UserError.
    """
    place, config = read_config(name)
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        index = cached_file(place, "model.safetensors.index.json", **optional)
        files = json.loads(Path(index).read_text("utf-8"))["weight_map"] if index else None
        shards = (
            {"model.safetensors"} if files is None else {file for key, file in files.items() if key.endswith(NAMES)}
        )
        found = [
            tensor
            for shard in sorted(shards)
            for tensor in embeddings(cached_file(place, shard), config.get_text_config().hidden_size)
        ]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"target {name}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if len(found) != 1:
        raise UserError(f"target {name}: found {len(found)} input embeddings named {', '.join(NAMES)}, expected one")
    return config.get_text_config(), (config.architectures or [""])[0], found[0].float()


def embeddings(file: str, hidden: int) -> list[torch.Tensor]:
    with safe_open(file, "pt") as tensors:
        keys = [key for key in tensors.keys() if key.endswith(NAMES)]
        return [tensors.get_tensor(key) for key in keys if tensors.get_slice(key).get_shape()[1] == hidden]
