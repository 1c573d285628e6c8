"""Prompts for decoding: JSONL rows with `messages` (a trailing answer is dropped), `turns` (the first is taken) or `prompt`."""

import json
from dataclasses import dataclass
from pathlib import Path

from draftsmith.models.chat import encode_prompt
from draftsmith.models.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """name, messages and the rendered ids that end with the opening of the assistant's turn."""

    name: str
    messages: list[dict]
    tokens: list[int]


def read_prompts(file: str | Path, tokenizer, limit: int | None = None) -> list[Prompt]:
    """Raises UserError naming file and row."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected JSONL prompts")
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and len(prompts) >= limit:
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} row {number}: not valid JSON ({error})") from None
        messages = to_messages(record, f"{path} row {number}")
        try:
            tokens = encode_prompt(tokenizer, messages)
        except UserError as error:
            raise UserError(f"{path} row {number}: {error}") from None
        prompts.append(Prompt(str(record.get("name", record.get("question_id", number))), messages, tokens))
    if not prompts:
        raise UserError(f"{path}: found no prompts, expected at least one")
    return prompts


def to_messages(record, place: str) -> list[dict]:
    if isinstance(record, dict):
        messages, turns, prompt = record.get("messages"), record.get("turns"), record.get("prompt")
        if isinstance(messages, list) and messages and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            if messages:
                return [{"role": m["role"], "content": m["content"]} for m in messages]
        if isinstance(turns, list) and turns and isinstance(turns[0], str):
            return [{"role": "user", "content": turns[0]}]
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise UserError(f"{place}: found {found}, expected messages, turns or prompt")
