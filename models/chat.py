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
        check_tokenizer(tokenizer, name)
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # damaged files raise whatever their readers come across
        raise UserError(f"tokenizer {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None


def check_tokenizer(tokenizer, name: str | Path) -> None:
    """Raises UserError for one that cuts texts at random, or leaves them out; and whatever comes of damaged values,
    some of which are looked at only here.
    """
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"tokenizer {name}: found no ids for the text 'a', expected some (see its post_processor)")
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if share := getattr(model, "dropout", None):
        raise UserError(
            f"tokenizer {name}: found model.dropout {share:g} in tokenizer.json, expected none: it would cut every "
            f"text at random"
        )


def stop_ids(target, tokenizer) -> set[int]:
    """Every id that ends an answer (`Stops`). target: `TextTarget` or `Description`."""
    return Stops.of(target, tokenizer).ids
