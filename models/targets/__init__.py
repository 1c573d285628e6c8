"""Targets: frozen models as drafters see them, behind sessions that own caches, masks and positions."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.targets.packed import PackedPrefix
from draftsmith.models.targets.place import locate
from draftsmith.models.targets.reading import ImagePrompt
from draftsmith.models.targets.session import Prefill, TextSession, Verified
from draftsmith.models.targets.text import TextTarget

__all__ = [
    "Description",
    "FeatureSpec",
    "ImagePrompt",
    "PackedPrefix",
    "Prefill",
    "TextSession",
    "TextTarget",
    "Verified",
    "describe",
    "locate",
]


@dataclass(frozen=True)
class Description:
    """What is known of a target without its weights. config: the text model's; generation_config: None where the target
    has none; image_token: the id that stands for pieces of images (None: it sees none).
    """

    config: object
    generation_config: object | None
    image_token: int | None = None

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context_length(self) -> int:
        return self.config.max_position_embeddings


def describe(name: str | Path) -> Description:
    """Raises UserError when there is no such target."""
    place = locate(name)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"target {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    try:
        generation = GenerationConfig.from_pretrained(place)
    except OSError:
        generation = None
    seen = (
        getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if getattr(config, "vision_config", None)
        else None
    )
    return Description(config.get_text_config(), generation, seen)
