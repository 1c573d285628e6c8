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
from draftsmith.models.pictures import picture_sources


@dataclass(frozen=True)
class Conversation:
    """One row of a file (counted from 1). before: messages that are given; turns: what the user says, each answered by
    the target before the next; pictures stand where the text has `<image>`.
    """

    row: int
    name: str
    category: str
    before: list[dict]
    turns: list[str]
    pictures: tuple[Path | bytes, ...] = ()


def _messages(row: dict) -> tuple[list[dict], list[str]] | None:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        return None
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # a recorded answer
    if not messages or not isinstance(messages[-1]["content"], str):
        return None
    return messages[:-1], [messages[-1]["content"]]


def _turns(row: dict) -> tuple[list[dict], list[str]] | None:
    turns = row["turns"]
    return ([], turns) if isinstance(turns, list) and turns and all(isinstance(t, str) for t in turns) else None


def _conversations(row: dict) -> tuple[list[dict], list[str]] | None:
    said = row["conversations"]
    if not isinstance(said, list) or not all(isinstance(m, dict) and isinstance(m.get("value"), str) for m in said):
        return None
    turns = [m["value"] for m in said if m.get("from") in ("human", "user")]
    return (
        ([{"role": "system", "content": m["value"]} for m in said if m.get("from") == "system"], turns)
        if turns
        else None
    )


def _text(*keys: str, opening: str = "") -> Callable[[dict], tuple[list[dict], list[str]] | None]:
    """The texts of `keys` (empty ones left out), joined by a blank line behind `opening`."""

    def read(row):
        texts = [row.get(key) or "" for key in keys]
        if not all(isinstance(text, str) for text in texts) or not texts[0]:
            return None
        return [], [opening + "\n\n".join(text for text in texts if text)]

    return read


def _conversation(key: str) -> Callable[[dict], tuple[list[dict], list[str]] | None]:
    """What `messages` are elsewhere."""
    return lambda row: _messages(row | {"messages": row[key]})


def _prompt(row: dict) -> tuple[list[dict], list[str]] | None:
    return (_conversation("prompt") if isinstance(row["prompt"], list) else _text("prompt"))(row)


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


def read_suite(file: str | Path, limit: int | None = None) -> list[Conversation]:
    """The first `limit` conversations. Raises UserError naming file and row."""
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
        conversation = reader(row)
        if conversation is None:
            raise UserError(
                f"{place}: {key}: found {json.dumps(row[key], default=str)[:60]}, expected text that is not empty"
            )
        name = next((row[key] for key in NAMES if row.get(key) is not None), number)
        try:
            pictures = tuple(picture_sources(row, path.parent))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        found.append(Conversation(number, str(name), str(row.get("category") or ""), *conversation, pictures))
    if not found:
        raise UserError(f"{path}: found no prompts, expected at least one")
    return found


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
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip("\ufeff \t\r"):  # the mark of UTF-8 stands inside where files were put together
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
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
