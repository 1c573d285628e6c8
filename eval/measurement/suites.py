"""Suites: files of conversations in the formats that evaluation sets ship, one reader per format, chosen by the keys of
a row.

Files are JSONL, a JSON array, either of them gzipped, or Parquet. Nothing here knows a tokenizer or a model:
`prompts.py` renders.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from draftsmith.models.errors import UserError
from draftsmith.models.messages import GIVEN, check_text, messages_of, system_of, tools_of
from draftsmith.models.pictures import picture_sources

Read = tuple[list[dict], list[list[dict]]]  # messages that are given, and turns


@dataclass(frozen=True)
class Conversation:
    """One row of a file (counted from 1). before: messages that are given; turns: messages of the user and of tools,
    each turn answered by the target before the next; pictures stand where the text has `<image>`; tools: functions that
    the target may call.
    """

    row: int
    name: str
    category: str
    before: list[dict]
    turns: list[list[dict]]
    pictures: tuple[Path | bytes, ...] = ()
    tools: list[dict] | None = None


def turns_of(messages: list[dict]) -> Read:
    """A conversation without the answers that are recorded in it: the target gives its own. A recorded call stays: the
    result of a tool belongs to it. Where no answer is recorded, every message of the user is a turn.

    Raises UserError for a conversation that ends with the system's message, or in which nobody asks anything.
    """
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] in GIVEN:
        found = messages[-1]["role"] if messages else "assistant"
        raise UserError(f"messages: found the last one of the {found}, expected one that the target answers")
    start = next(n for n, m in enumerate(messages) if m["role"] not in (*GIVEN, "assistant"))
    recorded = any(m["role"] == "assistant" for m in messages[start:])
    turns, turn = [], []
    for message in messages[start:]:
        answered = message["role"] == "assistant" and not message.get("tool_calls")
        if answered or (not recorded and turn and message["role"] != "tool" and turn[-1]["role"] not in GIVEN):
            turns += [turn] if turn else []
            turn = []
        if not answered:
            turn.append(message)
    return messages[:start], [*turns, turn] if turn else turns


def _messages(row: dict, every: bool, key: str = "messages") -> Read:
    messages = messages_of(row, key)
    before, turns = turns_of(messages)
    if every or key != "messages" or type(row.get("turn")) is not int:  # WildChat's `turn` is how many there are
        return before, turns
    while messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages[: len(messages) - len(turns[-1])], turns[-1:]


def _conversations(row: dict, every: bool) -> Read:
    return turns_of(messages_of(row, "conversations"))


def _turns(row: dict, every: bool) -> Read | None:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        return None
    return [], [[_asked(text, f"turns[{number}]")] for number, text in enumerate(turns)]


def _asked(text: str, name: str) -> dict:
    check_text(text, name)
    return {"role": "user", "content": text}


def _text(*keys: str, opening: str = "") -> Callable[[dict, bool], Read | None]:
    """The texts of `keys` (empty ones left out), joined by a blank line behind `opening`."""

    def read(row, every):
        texts = [row.get(key) or "" for key in keys]
        if not all(isinstance(text, str) for text in texts) or not texts[0]:
            return None
        return [], [[_asked(opening + "\n\n".join(text for text in texts if text), keys[0])]]

    return read


def _conversation(key: str) -> Callable[[dict, bool], Read]:
    """What `messages` are elsewhere."""
    return lambda row, every: _messages(row, every, key)


def _prompt(row: dict, every: bool) -> Read | None:
    return (_conversation("prompt") if isinstance(row["prompt"], list) else _text("prompt"))(row, every)


# format -> (the key that tells it, reader). The first whose key a row has is taken.
FORMATS = {
    "messages": ("messages", _messages),
    "LLaVA": ("conversations", _conversations),
    "Spec-Bench, MT-bench": ("turns", _turns),
    "HumanEval, preferences": ("prompt", _prompt),
    "Alpaca": ("instruction", _text("instruction", "input")),
    "GSM8K": ("question", _text("question")),
    "CNN/DM": ("article", _text("article", opening="Summarize: ")),
    "LMSYS-Chat, WildChat": ("conversation", _conversation("conversation")),
    "Chatbot Arena": ("conversation_a", _conversation("conversation_a")),  # both sides were asked the same first
    "preferences without a prompt": ("chosen", _conversation("chosen")),
}
NAMES = ("name", "question_id", "task_id", "id")


def read_suite(file: str | Path, limit: int | None = None, every: bool = False) -> list[Conversation]:
    """The first `limit` conversations, each with every turn that it has. Of `messages` with the number of a `turn`, as
    `longbench` and `regenerate` write them, the last one alone is asked, behind what is recorded; every: all of them
    are. Raises UserError naming file and row.
    """
    path, found = Path(file), []
    for number, row in read_rows(path):
        if limit is not None and len(found) >= limit:
            break
        place = f"{path} row {number}"
        expected = "expected " + ", ".join(key for key, _ in FORMATS.values())
        if not isinstance(row, dict):
            raise UserError(f"{place}: found {type(row).__name__}, {expected}")
        key, reader = next((known for known in FORMATS.values() if known[0] in row), (None, None))
        if reader is None:
            raise UserError(f"{place}: found {sorted(row)}, {expected}")
        try:
            conversation = reader(row, every)
            if conversation is None:
                raise UserError(f"{key}: found {ascii(row[key])[:60]}, expected text that is not empty")
            if (system := system_of(row)) and not _has_system(conversation):
                conversation = [system, *conversation[0]], conversation[1]
            tools, pictures = tools_of(row), tuple(picture_sources(row, path.parent))
        except (UserError, RecursionError) as error:
            raise UserError(f"{place}: {'nested too deeply' if isinstance(error, RecursionError) else error}") from None
        name = next((row[key] for key in NAMES if row.get(key) is not None), number)
        found.append(Conversation(number, str(name), str(row.get("category") or ""), *conversation, pictures, tools))
    if not found:
        raise UserError(f"{path}: found no prompts, expected at least one")
    return found


def _has_system(conversation: Read) -> bool:
    before, turns = conversation
    return any(message["role"] in GIVEN for messages in (before, *turns) for message in messages)


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, row) of a file of any of the forms."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a suite of prompts (JSONL, JSON, either gzipped, or Parquet)")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), 1)
        return
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip("\ufeff \t\r"):  # the mark of UTF-8 stands inside where files were put together
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} row {number}: not valid JSON ({error})") from None


def _parquet(path: Path) -> Iterator[dict]:
    """Group by group: logs of conversations do not fit the memory."""
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; expected it installed, or the suite as JSONL"
        ) from None
    try:
        for rows in pyarrow.parquet.ParquetFile(path).iter_batches(4096):
            yield from rows.to_pylist()
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise UserError(f"{path}: not valid Parquet ({error})") from None
