"""What a line of a file should become, worked out a second time and otherwise: by putting texts together, without
Jinja, masks or token ids. What it says is compared with what training makes of the same line.

It knows the three templates below, a target of text with the stop id 2, and nothing of our code.
"""

import json
from dataclasses import dataclass

BOS, END, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"
MARK = "{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
# Shows contents alone
PLAIN = "{{ '<|bos|>' }}{% for m in messages %}" + MARK + "{{ m.content + '<|end|>' }}{% endfor %}" + ASKED
# Shows tools and calls
CALLING = (
    "{{ '<|bos|>' }}{% if tools %}{{ '<|user|>' + (tools | tojson) + '<|end|>' }}{% endif %}{% for m in messages %}"
    + MARK
    + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '(' + c.function.name + ' '"
    " + (c.function.arguments | tojson) + ')' }}{% endfor %}{{ '<|end|>' }}{% endfor %}" + ASKED
)
# Shows thoughts behind the last message of the user alone
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{{ '<|bos|>' }}{% for m in messages %}" + MARK + "{% if m.role == 'assistant' and "
    "loop.index0 < ns.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}"
    "{% endfor %}" + ASKED
)
TEMPLATES = {"plain": PLAIN, "calling": CALLING, "thinking": THINKING}
WRITTEN = set("\t\n\v\f\r")  # of the control characters, those that people write
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


MISSING = object()


class Bad(Exception):
    """The line cannot be used."""


@dataclass(frozen=True)
class Taught:
    """What is supervised: the text of an answer, and all that stands before it; tokens: both as ids, where the record
    gives ids.
    """

    before: str | tuple[int, ...]
    answer: str | tuple[int, ...]


def expected(line: bytes | str, template: str, vocab_size: int, tokenizer: str, marks: set[str]) -> list[Taught]:
    """marks: special tokens of more ids than the embedding has; tokenizer: its fingerprint. Raises Bad."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise Bad("no JSON") from None
    if not isinstance(record, dict) or record.get("image") or record.get("images"):
        raise Bad("no record of text")
    if record.get("tokens") is not None:
        return by_ids(record, vocab_size, tokenizer)
    if any(record.get(key) is not None for key in ("messages", "conversations")):
        return conversation(record, template, marks)
    if isinstance(record.get("text"), str):
        text = written(record["text"])
        if any(mark in text for mark in marks):
            raise Bad("an id beyond the embedding")
        return [Taught("", text)] if text.strip() else []
    raise Bad("nothing that we know")


def by_ids(record: dict, vocab_size: int, tokenizer: str) -> list[Taught]:
    ids, start = record["tokens"], record.get("prompt_length")
    whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not whole or not isinstance(start, int) or isinstance(start, bool) or start < 1 or start > len(ids):
        raise Bad("no ids with a border among them")
    if record.get("tokenizer") not in (None, tokenizer):
        raise Bad("ids of another tokenizer")
    prompt, answer = ids[:start], ids[start:]
    if 2 in answer:
        answer = answer[: answer.index(2) + 1]
    if answer in ([], [2]):
        return []
    if any(i < 0 or i >= vocab_size for i in prompt + answer):
        raise Bad("an id beyond the embedding")
    return [Taught(tuple(prompt), tuple(answer))]


def conversation(record: dict, template: str, marks: set[str]) -> list[Taught]:
    messages, tools = turns(record), tools_of(record)
    last_user = max((n for n, m in enumerate(messages) if m["role"] not in ("assistant", *NOBODY)), default=None)
    first = next((n for n, m in enumerate(messages) if m["role"] not in ("assistant", *NOBODY)), None)
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant" and first is not None and n > first]
    if last_user is None or not answers:
        raise Bad("nobody answers")
    if template != "calling" and any(m["calls"] for m in messages[: answers[-1] + 1] if m["role"] == "assistant"):
        raise Bad("a call that is not shown")
    answered = [m for m in messages[: answers[-1] + 1] if m["role"] == "assistant"]
    if any(arguments is MISSING for m in answered for _, arguments in m["calls"]):
        raise Bad("a call that the template fails at")
    found = []
    for n in answers:
        message = messages[n]
        if message["weight"] == 0 or not (message["text"].strip() or message["calls"] or message["thought"].strip()):
            continue
        before = shown(messages[:n], tools, template) + ASSISTANT
        answer = said(message, template) + END
        answer = answer[: answer.index(END) + len(END)]
        if answer.replace(END, "").strip():
            found.append(Taught(before, answer))
            if any(mark in before + answer for mark in marks):
                raise Bad("an id beyond the embedding")
    return found


NOBODY = ("system", "developer")


def shown(messages: list[dict], tools, template: str) -> str:
    text = BOS
    if template == "calling" and tools:
        text += USER + json.dumps(tools, ensure_ascii=False) + END
    asked = max((n for n, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for n, message in enumerate(messages):
        own = said(message, template)
        if template == "thinking" and message["role"] == "assistant" and n < asked:
            own = own.split("</think>")[-1]
        text += (ASSISTANT if message["role"] == "assistant" else USER) + own + END
    return text


def said(message: dict, template: str) -> str:
    if template != "calling":
        return message["text"]
    return message["text"] + "".join(f"({name} {json.dumps(a, ensure_ascii=False)})" for name, a in message["calls"])


def turns(record: dict) -> list[dict]:
    """[{role, text, thought, calls: [(name, arguments)], weight}]."""
    key = "messages" if record.get("messages") is not None else "conversations"
    given = listed(record[key])
    if not isinstance(given, list) or not given or not all(isinstance(turn, dict) for turn in given):
        raise Bad("no list of turns")
    given = [clean(turn) for turn in given]
    if key == "conversations" and any("role" not in turn for turn in given):
        given = [translated(turn) for turn in given]
    found = [turn_of(turn) for turn in given]
    for name in ("system", "system_prompt"):
        beside = record.get(name)
        if beside is None or isinstance(beside, str) and not beside.strip():
            continue
        if not isinstance(beside, str):
            raise Bad("a system's message that is no text")
        system = turn_of({"role": "system", "content": beside})
        return found if found[0]["role"] in NOBODY else [system, *found]
    return found


def turn_of(turn: dict) -> dict:
    every_text(turn)
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        raise Bad("a role that is no text")
    if content is None:
        if role != "assistant":
            raise Bad("nothing is said")
        content = ""
    if isinstance(content, list):
        right = [isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content]
        if not all(right):
            raise Bad("a part that is no text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Bad("a content that is no text")
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    names = ("reasoning_content", "thinking", "reasoning")
    return {
        "role": "tool" if role == "function" else role,
        "text": content,
        "thought": next((turn[name] for name in names if isinstance(turn.get(name), str)), ""),
        "calls": [call_of(call) for call in calls_of(calls)],
        "weight": turn.get("weight"),
    }


def calls_of(calls) -> list:
    calls = listed(calls)
    if not isinstance(calls, list):
        raise Bad("calls that are no list")
    every_text(calls)
    return calls


def call_of(call) -> tuple[str, object]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Bad("a call without a name")
    arguments = function.get("arguments", MISSING)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            pass
    every_text(arguments)
    return function["name"], arguments


def translated(turn: dict) -> dict:
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS or not isinstance(value, str):
        raise Bad("a turn of nobody")
    role = SPEAKERS[speaker]
    if speaker == "function_call":
        try:
            calls = json.loads(value)
        except (ValueError, RecursionError):
            raise Bad("a call that is no JSON") from None
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, dict) for call in calls):
            raise Bad("a call that is no object")
        return {"role": role, "tool_calls": [{"function": call} for call in calls]}
    return {"role": role, "content": value} | ({"weight": turn["weight"]} if "weight" in turn else {})


def tools_of(record: dict):
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(written(tools))
        except (ValueError, RecursionError):
            raise Bad("tools that are no JSON") from None
    if tools in (None, "", []):
        functions = listed(record.get("functions"))
        tools = [{"type": "function", "function": f} for f in functions] if isinstance(functions, list) else None
    if not tools and not isinstance(tools, (bool, int, float, dict)):
        if isinstance(tools, str) and tools:
            raise Bad("tools that are blank")
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Bad("tools that are no list of objects")
    tools = [clean(tool) for tool in tools]
    every_text(tools)
    return tools


def listed(value):
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def clean(value):
    """Without keys of null."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items() if item is not None}
    return [clean(item) for item in value] if isinstance(value, list) else value


def every_text(value) -> None:
    if isinstance(value, str):
        written(value)
    for item in (
        [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        every_text(item)


def written(text: str) -> str:
    for character in text:
        code = ord(character)
        if (
            code < 32
            and character not in WRITTEN
            or code == 127
            or 0xD800 <= code <= 0xDFFF
            or 0xFDD0 <= code <= 0xFDEF
        ):
            raise Bad("what nobody wrote")
    return text
