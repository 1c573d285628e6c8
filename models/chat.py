"""A target's tokenizer, and the ids that end its answers."""

from pathlib import Path

from transformers import AutoTokenizer

from draftsmith.models.errors import UserError
from draftsmith.models.stops import Stops
from draftsmith.models.targets import locate


def load_tokenizer(name: str | Path):
    """The tokenizer of a Hub id, a directory or `bundled:NAME`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
        tokenizer("a")  # some values of its config are looked at only here
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # damaged files raise whatever their readers come across
        raise UserError(f"tokenizer {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None


def stop_ids(target, tokenizer) -> set[int]:
    """Every id that ends an answer (`Stops`). target: `TextTarget` or `Description`."""
    return Stops.of(target, tokenizer).ids
