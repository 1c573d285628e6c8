"""From messages to token ids, for every command alike: prompts for decoding, and training rows with their token mask
(1 = written by the target).

What is supervised is what the target would write: the ids of the prompt, as decoding is asked, and behind them the ids
of the answer. Where a chat template shows an answer differently once other turns follow, every such answer has a row of
its own behind the history as it was shown then; else the answers of a conversation share one row.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property

from draftsmith.models.errors import UserError
from draftsmith.models.messages import REASONING, WEIGHT, as_text, reasoning_of, says_something
from draftsmith.models.row_encoder import RowEncoder, check_ids
from draftsmith.models.shown import (
    ANSWER,
    CALLS,
    GIVEN,
    TOOLS,
    answer_missing,
    bare,
    roles_missing,
    texts,
    tools_missing,
)
from draftsmith.models.templates import CLOCK, THOUGHTS, rendered, source_of, tells_the_time, variables_of

PLACE, OTHER = "\ufdd2", "\ufdd3"  # noncharacters in the place of a text: they show where a template puts it
# Something that is opened and closed with nothing in it, and a thought that is opened, at the end of a text
EMPTY = re.compile(r"(?:<\|?([\w]+)\|?>\s*<\|?/\1\|?>|\[(\w+)\]\s*\[/\2\])\s*$")
THOUGHT = re.compile(rf"<({THOUGHTS})>\s*$")


SHOWN = 200  # characters of a prompt's end in which an answer may begin
EMPTY_ANSWER = "answers say nothing: they are not supervised"
WEIGHTLESS = "answers have the weight 0: they are context alone"
END_INSIDE = "answers have an end marker inside: they are supervised up to it"


@dataclass(frozen=True)
class Encoded:
    """rows: (token ids, token mask) of each; notes: how often something occurred that whoever reads of the rows should
    know.
    """

    rows: list[tuple[list[int], list[int]]] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)


class Renderer:
    """The chat template of a target, with the values that its variables have and one clock.

    reader: the target's tokenizer, or the `models.pictures.Reader` of one that sees; variables: by name, among them
    `strftime_now`, a date (ISO 8601) in the place of the clock's; now: what the clock shows else; target, vocab_size:
    the target's name, and how many ids its embedding has. Raises UserError for variables that the template does not
    read.
    """

    def __init__(
        self,
        reader,
        variables: Mapping = {},
        now: datetime | None = None,
        target: str | None = None,
        vocab_size: int | None = None,
    ):
        self.reader, self.now = reader, now or datetime.now()
        self.target, self.vocab_size = target, vocab_size
        self.encoder = RowEncoder(reader)
        self.tokenizer = self.encoder.tokenizer
        self.hidden: Counter = Counter()
        self.variables = {name: value for name, value in variables.items() if name != CLOCK}
        self.fixed = variables.get(CLOCK) is not None  # the clock is given
        if self.fixed:
            self.now = _moment(variables[CLOCK])
        if self.variables:
            known = variables_of(source_of(reader))
            if unknown := sorted(self.variables.keys() - known):
                raise UserError(
                    f"chat template: reads no variable {unknown[0]}, expected {', '.join(sorted(known)) or 'none'}"
                )

    @classmethod
    def of(cls, reader) -> "Renderer":
        """A tokenizer or a `Reader` with the defaults of its template; a Renderer is one already."""
        return reader if isinstance(reader, cls) else cls(reader)

    def passed_over(self) -> list[str]:
        """A line for each kind of thing that the template did not show of the prompts until now, once."""
        lines = [f"{count} {note}" for note, count in (+self.hidden).items()]
        self.hidden.clear()
        return lines

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell the tokenizer from others."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        return hashlib.sha256((fast.to_str() if fast else repr(self.tokenizer)).encode()).hexdigest()[:16]

    @property
    def clock(self) -> str | None:
        """The time that rows depend on; None where the template does not ask for it."""
        sources = self.reader.chat_template or ""
        sources = sources.values() if isinstance(sources, dict) else [sources]
        return self.now.isoformat(timespec="seconds") if any(map(tells_the_time, sources)) else None

    def at(self, clock: str | None) -> "Renderer":
        """The same with another time (as `clock` gave it), where its own is not given."""
        return (
            self
            if clock is None or self.fixed
            else Renderer(self.reader, self.variables, _moment(clock), self.target, self.vocab_size)
        )

    @property
    def key(self) -> list:
        """What ids depend on beside the messages and the tokenizer."""
        return [self.reader.chat_template, self.variables, self.clock]

    def told(self) -> dict:
        """Every variable of the template with its value, None where it is left to the template's default."""
        if not self.reader.chat_template:
            return {}
        values = {name: self.variables.get(name) for name in sorted(variables_of(source_of(self.reader)))}
        return values if self.clock is None else values | {CLOCK: self.clock}

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Messages up to a turn that the target answers -> ids that end with the opening of the assistant's turn.
        Raises UserError for an id that the target's embedding does not have. What the template does not show is counted
        in `hidden`.
        """
        messages = self._ready(messages)
        text = self._text(messages, tools, asked=True)[0]
        hidden = [self._hidden_call(messages[: n + 1], tools) for n in range(len(messages))]
        self.hidden[CALLS] += any(name is not None for name in hidden)
        self.hidden[TOOLS] += tools_missing(tools, text)
        self.hidden.update(GIVEN.format(role) for role in roles_missing(messages, text))
        ids = self.encoder.ids(text)
        if self.vocab_size is not None:
            check_ids(ids, self.tokenizer, self.vocab_size)
        return ids

    def encode(self, messages: list[dict], tools: list[dict] | None, stops: set[int]) -> Encoded:
        """Rows of a whole conversation. Answers that stand before any other turn are not supervised: no prompt leads to
        them. Raises UserError where nobody answers, and for an answer that the template does not show.
        """
        messages, notes = self._ready(messages), Counter()
        begun = next((n for n, m in enumerate(messages) if m["role"] not in ("assistant", "system", "developer")), None)
        turns = [n for n, m in enumerate(messages) if m["role"] == "assistant" and begun is not None and n > begun]
        if not turns:
            raise UserError("found no answer in it, expected a turn of the assistant behind one that it answers")
        for number, message in enumerate(messages[: turns[-1] + 1]):
            if message["role"] == "assistant" and "tool_calls" in message:
                self._check_calls(messages[: number + 1], tools)
        ends, pieces = self.encoder.ends(stops), []
        for turn in turns:
            if not says_something(messages[turn]):
                notes[EMPTY_ANSWER] += 1
                continue
            if messages[turn].get(WEIGHT) == 0:
                notes[WEIGHTLESS] += 1
                continue
            asked, given, answer = self._answer(messages[: turn + 1], tools)
            written, ended = _until(answer, ends)
            if not _without(written, ends).strip():  # the template shows nothing of what it says
                notes[EMPTY_ANSWER] += 1
                continue
            if any(end in texts(messages[turn]) for end in ends):
                notes[END_INSIDE] += 1
            notes[ANSWER] += answer_missing(messages[turn], asked[-SHOWN:], given + answer)
            pieces.append((asked, given, written, ended))
        if pieces:
            notes[TOOLS] += tools_missing(tools, pieces[-1][0])
            notes.update(GIVEN.format(role) for role in roles_missing(messages[: turns[-1]], "".join(pieces[-1][:2])))
        rows = self.encoder.rows(pieces, stops)
        return Encoded([(row.ids, row.mask) for row in rows], +notes)

    def _ready(self, messages: list[dict]) -> list[dict]:
        """With reasoning under all the names that templates know; a target of text gets texts alone."""
        messages = messages if self.reader is not self.tokenizer else as_text(messages)
        return [
            m | {"reasoning_content": reasoning, "thinking": reasoning} if (reasoning := reasoning_of(m)) else m
            for m in messages
        ]

    def _text(self, messages: list[dict], tools, asked: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """What the template makes of messages, and what its generation blocks mark."""
        source = source_of(self.reader, tools)
        values = {**self.tokenizer.special_tokens_map, **self.variables, "tools": tools, "add_generation_prompt": asked}
        try:
            text, spans = rendered(source, self.now.strftime, values | {"messages": messages})
        except UserError:
            if not any("tool_calls" in message for message in messages):
                raise
            written = [_with_written_arguments(message) for message in messages]
            text, spans = rendered(source, self.now.strftime, values | {"messages": written})
        return (text, spans) if self.reader is self.tokenizer else self.reader.expanded(text, spans, messages)

    def _answer(self, messages: list[dict], tools) -> tuple[str, str, str]:
        """(the prompt, what the template itself puts behind it, the answer) of the last message."""
        *before, last = messages
        asked, (said, spans) = self._text(before, tools, asked=True)[0], self._text(messages, tools)
        if not said.startswith(asked):
            return asked, "", self._behind(asked, said, messages, tools)
        given, answer = "", said[len(asked) :]
        if spans and spans[-1][1] > len(asked):
            given = said[len(asked) : max(len(asked), spans[-1][0])]
            answer = answer[len(given) :]
        block = self._empty_block
        if block and answer.startswith(block) and not texts(last).lstrip().startswith(block.strip()):
            given, answer = given + block, answer[len(block) :]
        elif (thought := self._thought(asked)) and thought not in answer:
            raise UserError(self._without_reasoning(len(before), thought))
        return asked, given, answer

    def _behind(self, asked: str, said: str, messages: list[dict], tools) -> str:
        """The answer where what the template shows of the conversation does not begin with the prompt: from the
        answer's own text on. A thought that the prompt opens must be in it, as the target writes it.
        """
        *before, last = messages
        head, found, tail = self._text([*before, last | {"content": self._content(PLACE)}], tools)[0].partition(PLACE)
        if thought := self._thought(asked):
            content, opening = texts(last), "<" + thought.removeprefix("</")
            if thought not in content or not found:
                raise UserError(self._without_reasoning(len(before), thought))
            if content.lstrip().startswith(opening):
                content = content.lstrip().removeprefix(opening).removeprefix("\n")
            return content + tail
        if not found or not said.startswith(head):
            raise UserError(
                f"chat template: shows the answer in turn {len(before)} in another way than behind its prompt, "
                f"expected its text there"
            )
        return said[len(head) :]

    def _without_reasoning(self, turn: int, thought: str) -> str:
        return (
            f"turn {turn}: found an answer without {thought}, expected the reasoning that the prompt opens "
            f"(`draftsmith regenerate` makes answers with it; data.chat_template_kwargs may turn it off)"
        )

    def _check_calls(self, messages: list[dict], tools) -> None:
        """Raises UserError for a call of the last message that the template does not show: the target would be taught
        that it said nothing.
        """
        if (name := self._hidden_call(messages, tools)) is not None:
            raise UserError(
                f"chat template: does not show the call of {ascii(name)[1:-1]} in turn {len(messages) - 1}, expected "
                f"it in the answer"
            )

    def _hidden_call(self, messages: list[dict], tools) -> str | None:
        """The first function whose call in the last message the template does not show."""
        *before, last = messages
        for number, call in enumerate(last.get("tool_calls", [])):
            calls = list(last["tool_calls"])
            calls[number] = call | {"function": call["function"] | {"name": PLACE}}
            if PLACE not in self._text([*before, last | {"tool_calls": calls}], tools)[0]:
                return call["function"]["name"]
        return None

    @cached_property
    def _empty_block(self) -> str:
        """What the template puts between the prompt and an answer that has no reasoning, where that is an empty place
        for it; "" where it puts nothing, or what every answer has.
        """
        asked, put, _ = self._example({})
        if not put:
            return ""
        if EMPTY.search(asked + put):
            return put
        _, filled, reasoned = self._example(dict.fromkeys(REASONING, OTHER))
        return put if OTHER in filled and bare(filled.replace(OTHER, "")) == bare(put) else ""

    @cached_property
    def _closing(self) -> str:
        """What ends a thought that every prompt opens, by what the template shows of one; "" where none is opened."""
        _, filled, _ = self._example(dict.fromkeys(REASONING, OTHER))
        return filled.strip().removeprefix(OTHER).strip() if filled.strip().startswith(OTHER) else ""

    def _thought(self, asked: str) -> str:
        """What ends the thought that a prompt opens, or ""."""
        found = THOUGHT.search(asked)
        return f"</{found.group(1)}>" if found else self._closing

    def _example(self, more: dict) -> tuple[str, str, str]:
        """(prompt, what stands between it and the answer's own text, what stands behind) of a conversation of one turn;
        ("", "", "") where they do not follow one another.
        """
        question, answer = (
            {"role": role, "content": self._content(text)} for role, text in (("user", "a"), ("assistant", PLACE))
        )
        try:
            asked = self._text([question], None, asked=True)[0]
            said = self._text([question, answer | more], None)[0]
        except UserError:
            return "", "", ""
        head, found, tail = said.partition(PLACE)
        return (asked, head[len(asked) :], tail) if found and head.startswith(asked) else ("", "", "")

    def _content(self, text: str):
        return text if self.reader is self.tokenizer else [{"type": "text", "text": text}]


def _without(text: str, ends: list[str]) -> str:
    for end in ends:
        text = text.replace(end, "")
    return text


def _until(answer: str, ends: list[str]) -> tuple[str, bool]:
    """An answer up to its first end marker, and whether there is one."""
    found = [at + len(end) for end in ends if (at := answer.find(end)) >= 0]
    return (answer[: min(found)], True) if found else (answer, False)


def _with_written_arguments(message: dict) -> dict:
    """Some templates want the arguments of a call as JSON text."""
    calls = []
    for call in message.get("tool_calls", []):
        function = call["function"]
        if not isinstance(function.get("arguments", ""), str):
            function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        calls.append(call | {"function": function})
    return message | {"tool_calls": calls} if calls else message


def _moment(value) -> datetime:
    if isinstance(value, datetime):
        return value
    try:
        return datetime.fromisoformat(value.isoformat() if isinstance(value, date) else value)
    except (TypeError, ValueError):
        raise UserError(f"{CLOCK}: found {value!r}, expected a date or a time as in 2026-01-31T09:30:00") from None
