"""LoRA adapters of drafters, as peft saves them: many on one head that is held once.

A directory of adapter_config.json, which names the drafter it belongs to, and adapter_model.safetensors. An adapted
head shares every tensor with its base except the matrices that the adapter changes.
"""

import copy
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.formats.layout import read_json

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def base_of(place: str | Path) -> str | None:
    """The drafter that the adapter in a directory belongs to; None where no adapter lies. Raises UserError for one that
    names none.
    """
    file = Path(place) / CONFIG
    if not file.is_file():
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{file}: found no base_model_name_or_path, expected the drafter that it adapts")
    return base


def with_adapter(head: nn.Module, folder: str | Path) -> nn.Module:
    """A head that applies W + alpha / r B A where the adapter has B and A, and shares all else with `head`, which stays
    as it is. Raises UserError for keys and shapes that do not fit it.
    """
    folder = Path(folder)
    config, tensors = read_json(folder / CONFIG), load_file(folder / TENSORS)
    scale, pairs = config["lora_alpha"] / config["r"], {}
    for key, value in tensors.items():
        name, found, side = key.removeprefix(PREFIX).removesuffix(".weight").partition(".lora_")
        if not found or side not in ("A", "B"):
            raise UserError(f"{folder / TENSORS}: found {key}, expected low-rank factors lora_A and lora_B alone")
        pairs.setdefault(name, {})[side] = value
    adapted = copy.deepcopy(head, {id(x): x for x in (*head.parameters(), *head.buffers())})
    matrices = dict(adapted.named_modules())
    for name, pair in pairs.items():
        weight = getattr(matrices.get(name), "weight", None)
        if set(pair) != {"A", "B"} or weight is None:
            raise UserError(
                f"{folder / TENSORS}: found {name}, expected both factors of a matrix of {type(head).__name__}"
            )
        if (len(pair["B"]), pair["A"].size(1)) != tuple(weight.shape):
            raise UserError(
                f"{folder / TENSORS}: {name}: found a change of {len(pair['B'])} x {pair['A'].size(1)}, expected "
                f"{' x '.join(map(str, weight.shape))}"
            )
        change = scale * (pair["B"].float() @ pair["A"].float())
        matrices[name].weight = nn.Parameter(weight + change.to(weight), requires_grad=False)
    return adapted
