"""From a record of a file to training rows: conversations, ready-made text, and token ids as `draftsmith regenerate`
writes them.
"""

from collections import Counter

from draftsmith.models.errors import UserError
from draftsmith.models.messages import check_text, messages_of, tools_of
from draftsmith.models.rendering import EMPTY_ANSWER, END_INSIDE, Encoded, Renderer
from draftsmith.models.row_encoder import check_ids

READY_MADE = "ready-made texts have markers of a template: all of each is supervised, what the user says as well"
SIDE_BY_SIDE = ("conversation_a", "conversation_b", "chosen", "rejected")  # what sets of compared answers have


def encode_record(record, reader, stops: set[int], vocab_size: int) -> Encoded:
    """reader: as `Renderer.of` takes it. Raises UserError saying what was found and expected."""
    renderer = Renderer.of(reader)
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f"found {type(record).__name__}, expected an object")
    if record.get("tokens") is not None:
        found = encode_tokens(record, renderer, stops)
    elif is_conversation(record):
        found = renderer.encode(messages_of(record), tools_of(record), stops)
    elif isinstance(record.get("text"), str):
        found = encode_text(record["text"], renderer)
    elif others := next((key for key in SIDE_BY_SIDE if key in record), None):
        raise UserError(
            f"found {others}: answers of other models, expected tokens, messages, conversations or text (draftsmith "
            f"regenerate reads the prompts of such rows)"
        )
    else:
        raise UserError(f"found keys {sorted(record)}, expected tokens, messages, conversations or text")
    for ids, _ in found.rows:
        check_ids(ids, renderer.tokenizer, vocab_size)
    return found


def is_conversation(record) -> bool:
    return (
        isinstance(record, dict)
        and record.get("tokens") is None
        and any(record.get(key) is not None for key in ("messages", "conversations"))
    )


def encode_text(text: str, renderer: Renderer) -> Encoded:
    """All of it is supervised. Text that begins with the first token as a template does gets no second one, and text
    that ends with the last one neither.
    """
    check_text(text, "text")
    if not text.strip():
        return Encoded(notes=Counter([EMPTY_ANSWER]))
    tokenizer = renderer.tokenizer
    made = bool(tokenizer.bos_token) and text.lstrip().startswith(tokenizer.bos_token)
    ids = list(tokenizer(text, add_special_tokens=not made)["input_ids"])
    eos = tokenizer.eos_token
    if eos and text.rstrip().endswith(eos) and ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids.pop()  # some tokenizers put a last token behind every text
    marked = not renderer.encoder.markers.isdisjoint(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Encoded([(ids, [1] * len(ids))], Counter([READY_MADE] if marked else []))


def encode_tokens(record: dict, renderer: Renderer, stops: set[int]) -> Encoded:
    """`tokens` from `prompt_length` on were written by the target, up to the first id that ends an answer."""
    tokens, start = record["tokens"], record.get("prompt_length")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise UserError("tokens: expected a list of integers")
    if type(start) is not int or not 0 < start <= len(tokens):
        raise UserError(f"prompt_length: found {start!r}, expected 1..{len(tokens)}")
    if record.get("tokenizer") not in (None, renderer.fingerprint):
        raise UserError(
            f"tokenizer: found ids of the tokenizer {ascii(record['tokenizer'])}, expected of the target's, "
            f"{renderer.fingerprint}"
        )
    end = next((at for at, token in enumerate(tokens[start:], start + 1) if token in stops), len(tokens))
    notes, target = Counter([END_INSIDE] * (end < len(tokens))), record.get("target")
    tokens = tokens[:end]  # what stands behind was padded, or written by nobody who was asked
    if stops.issuperset(tokens[start:]):
        return Encoded(notes=Counter([EMPTY_ANSWER]))
    if isinstance(target, str) and renderer.target is not None and target != renderer.target:
        notes[f"rows are answers of {target}, the target here is {renderer.target}"] += 1
    return Encoded([(tokens, [0] * start + [1] * (len(tokens) - start))], notes)
