"""Targets: frozen models as drafters see them, behind sessions that own caches, masks and positions."""

from dataclasses import dataclass
from pathlib import Path

import torch

from draftsmith.models.features import FeatureSpec
from draftsmith.models.targets.form import completed, context_length
from draftsmith.models.targets.packed import PackedPrefix
from draftsmith.models.targets.place import locate, read_config, read_generation
from draftsmith.models.targets.reading import ImagePrompt
from draftsmith.models.targets.session import Prefill, TextSession, Verified
from draftsmith.models.targets.text import TextTarget
from draftsmith.models.targets.weights import Weights, check_checkpoint, checkpoint_bytes, quantizer_for, weights_of

__all__ = [
    "Description",
    "FeatureSpec",
    "ImagePrompt",
    "PackedPrefix",
    "Prefill",
    "TextSession",
    "TextTarget",
    "Verified",
    "Weights",
    "describe",
    "locate",
]


@dataclass(frozen=True)
class Description:
    """What is known of a target without its weights. config: the text model's; generation_config: None where the target
    has none; image_token: the id that stands for pieces of images (None: it sees none); weights: what they are where
    they are quantised, or were; stored: bytes of the checkpoint, of weights that stay quantised when they are loaded;
    by_level: as of a loaded one.
    """

    config: object
    generation_config: object | None
    image_token: int | None = None
    weights: Weights | None = None
    stored: int | None = None
    by_level: bool = False

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context_length(self) -> int:
        return context_length(self.config)


def describe(name: str | Path) -> Description:
    """Raises UserError when there is no such target, for one of another form, for a quantised one that cannot be loaded
    here, and for a directory whose weights are not all there.
    """
    place, config = read_config(name)
    text = completed(config.get_text_config())
    small = TextTarget.check(config, str(name))
    generation = read_generation(place, str(name))
    quantizer = quantizer_for(config, str(name), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_checkpoint(place, str(name), config, quantizer)
    seen = (
        getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if getattr(config, "vision_config", None)
        else None
    )
    packed = quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False)
    stored = checkpoint_bytes(place) if packed else None
    by_level = small is not None and small.by_level
    return Description(text, generation, seen, weights_of(place, config), stored, by_level)
