"""Chat templates: Jinja as Hugging Face runs it, with a clock that is given, and with the places of what `generation`
blocks mark.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache

from jinja2 import Template, meta, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from draftsmith.models.errors import UserError

THOUGHTS = "think|thinking|thought|reason|reasoning|analysis|reflection|scratchpad"
THOUGHT_TAG = re.compile(rf"</?(?:{THOUGHTS})>")
OPENED, CLOSED = "\ufdd0", "\ufdd1"  # around a generation block: noncharacters, which no message may have
CLOCK = "strftime_now"
# What rendering gives every template, besides special tokens
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", CLOCK}


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what the target writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller) -> str:
        return OPENED + caller() + CLOSED


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    made.globals["raise_exception"] = _refuse
    return made


def _refuse(message: str) -> None:
    raise TemplateError(message)


def refusal(error: Exception) -> UserError:
    return UserError(f"chat template: {' '.join(str(error).split())[:200]}")


@lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """Raises UserError for a template that is no Jinja."""
    try:
        return environment().from_string(source)
    except TemplateError as error:
        raise refusal(error) from None


def rendered(source: str, clock: Callable[[str], str], values: dict) -> tuple[str, list[tuple[int, int]]]:
    """(text, [start, end) of what generation blocks mark). Raises UserError for what the template refuses."""
    try:
        text = compiled(source).render({CLOCK: clock, "documents": None, **values})
    except (TemplateError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise refusal(error) from None
    if OPENED not in text:
        return text, []
    pieces, spans, at = text.replace(CLOSED, OPENED).split(OPENED), [], 0
    for number, piece in enumerate(pieces):
        if number % 2:
            spans.append((at, at + len(piece)))
        at += len(piece)
    return "".join(pieces), spans


def source_of(reader, tools: list[dict] | None = None) -> str:
    """The template of a tokenizer or a `models.pictures.Reader`; of several the one for these tools. Raises UserError
    where there is none.
    """
    found = reader.chat_template
    if isinstance(found, dict):
        found = found.get("tool_use") if tools and "tool_use" in found else found.get("default")
    if not found:
        raise UserError("chat template: the target has none, expected one")
    return found


def variables_of(source: str) -> set[str]:
    """What a template reads besides the conversation and special tokens, such as `enable_thinking`."""
    made, uses = environment(), {}
    try:
        parsed = made.parse(source)
        names = meta.find_undeclared_variables(parsed)
    except TemplateError as error:
        raise refusal(error) from None
    _first_uses(parsed, uses)
    names -= GIVEN | set(made.globals) | {name for name, use in uses.items() if use == "store"}
    return {name for name in names if not name.endswith("_token")}


def _first_uses(node: nodes.Node, uses: dict[str, str]) -> None:
    """What is first done with every name, in the order of the template: "load" or "store"."""
    if isinstance(node, nodes.Name):
        uses.setdefault(node.name, node.ctx)
    parts = list(node.iter_child_nodes())
    if isinstance(node, (nodes.Assign, nodes.AssignBlock, nodes.For)):  # the value is read before its name is given
        parts.sort(key=lambda part: part is node.target)
    if isinstance(node, nodes.For):
        parts.sort(key=lambda part: (part is not node.iter, part is not node.target))
    for part in parts:
        _first_uses(part, uses)


def tells_the_time(source: str) -> bool:
    return CLOCK in source
