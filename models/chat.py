"""A target's tokenizer, and the ids that end its answers."""

from pathlib import Path

from transformers import AutoTokenizer

from draftsmith.models.errors import UserError
from draftsmith.models.targets import locate


def load_tokenizer(name: str | Path):
    """The tokenizer of a Hub id, a directory or `bundled:NAME`."""
    try:
        return AutoTokenizer.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None


def stop_ids(target, tokenizer) -> set[int]:
    """Every id that ends an answer: the generation config's, the model config's or the tokenizer's. target:
    `TextTarget` or `Description`.
    """
    for source in (target.generation_config, target.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return set(ids if isinstance(ids, (list, tuple)) else [ids])
    return set()
