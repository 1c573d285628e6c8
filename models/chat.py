"""From messages to token ids: prompts for decoding, and training rows with their token mask (1 = written by the
target).
"""

import hashlib
import json
import re
from pathlib import Path

from jinja2 import Environment, meta
from jinja2.exceptions import TemplateError
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


def vocabulary_digest(tokenizer) -> str:
    """16 hex digits over which string every id of a tokenizer stands for: token ids on disk are of no other one."""
    listed = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


# What rendering gives every template, besides special tokens
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


def template_variables(reader) -> dict[str, None]:
    """What the chat template of a tokenizer (or `models.pictures.Reader`) reads besides the conversation, such as
    `enable_thinking`: each name with None, since `render` sets none of them and leaves the template's own defaults.
    """
    template = reader.chat_template or ""
    template = template.get("default", "") if isinstance(template, dict) else template
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))
    except TemplateError as error:
        raise UserError(f"chat template: {' '.join(str(error).split())[:200]}") from None
    names = meta.find_undeclared_variables(tree) - GIVEN - set(environment.globals)
    return dict.fromkeys(sorted(name for name in names if not name.endswith("_token")))


class UnstableTemplate(UserError):
    """The chat template renders a turn differently once another one follows: no token mask can be derived from it."""


def stop_ids(target, tokenizer) -> set[int]:
    """Every id that ends an answer (`Stops`). target: `TextTarget` or `Description`."""
    return Stops.of(target, tokenizer).ids


def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Messages up to the last user turn -> ids that end with the opening of the assistant's turn."""
    return render(tokenizer, messages, add_generation_prompt=True)["input_ids"]


def render(tokenizer, messages: list[dict], **options):
    """apply_chat_template to ids; what the template or the tokenizer refuses becomes a UserError."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except (ValueError, TypeError, TemplateError) as error:
        raise UserError(f"chat template: {' '.join(str(error).split())[:200]}") from None


def encode_row(tokenizer, messages: list[dict], stops: set[int]) -> tuple[list[int], list[int]]:
    """A whole conversation -> (ids, token mask).

    Templates with generation blocks mark the answers themselves. Otherwise each answer is what follows the rendering of
    the turns before it (with the generation prompt), up to and including the first stop id. Raises UserError when that
    rendering is no prefix.
    """
    if "{% generation" in (tokenizer.chat_template or "") or "{%- generation" in (tokenizer.chat_template or ""):
        row = render(tokenizer, messages, return_assistant_tokens_mask=True)
        return row["input_ids"], row["assistant_masks"]
    ids = render(tokenizer, messages)["input_ids"]
    mask = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = encode_prompt(tokenizer, messages[:turn])
        through = render(tokenizer, messages[: turn + 1])["input_ids"]
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise UnstableTemplate(
                f"chat template: turn {turn} is not prefix-stable (rendering the turns before it gives other tokens)"
            )
        for at in range(len(before), len(through)):
            mask[at] = 1
            if ids[at] in stops:
                break
    return ids, mask
