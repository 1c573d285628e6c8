"""Records of conversations as chat templates take them: roles, tool calls and names are kept, keys whose value is null
are dropped, and what is no text is refused by its kind.
"""

import json
import re

from draftsmith.models.errors import UserError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}  # of ShareGPT's `from`
GIVEN = ("system", "developer")  # roles that nobody answers
WEIGHT = "weight"  # 0: an answer that is not to be learned
SYSTEM = ("system", "system_prompt")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which messages bring their reasoning
UNWRITTEN = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufdd0-\ufdef]")


def check_text(text: str, name: str) -> None:
    """Raises UserError for half a surrogate pair, control characters and noncharacters: no tokenizer can be asked for
    the first, and nobody wrote the others.
    """
    if found := UNWRITTEN.search(text):
        code = ord(found.group())
        kind = "half of a surrogate pair" if 0xD800 <= code < 0xE000 else "a control character"
        kind = "a noncharacter" if code >= 0xFDD0 else kind
        raise UserError(f"{name}: found U+{code:04X}, {kind}, expected text")


def messages_of(record: dict, key: str | None = None) -> list[dict]:
    """`messages` (or what stands under the key) with role and content, or `conversations` with from and value, or with
    role and content; a list or its JSON. What the record says as the system goes first. Calls of the older form
    (`function_call`, role `function`) become those of today. Raises UserError saying what was found and expected.
    """
    key = key or ("messages" if record.get("messages") is not None else "conversations")
    turns = _parsed(record[key])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{key}: found {_shown(turns)}, expected a list of objects with role and content")
    turns = [_without_nulls(turn) for turn in turns]
    if key == "conversations" and not all("role" in turn for turn in turns):
        turns = [_shared(turn) for turn in turns]
    turns = [_without_what_json_has_not(turn) for turn in turns]
    for number, turn in enumerate(turns):
        name = f"{key}[{number}]"
        if not isinstance(turn.get("role"), str):
            raise UserError(f"{name}.role: found {_shown(turn.get('role'))}, expected text")
        if turn["role"] == "function":
            turn["role"] = "tool"
        call, calls = turn.pop("function_call", None), turn.pop("tool_calls", None)
        if calls := calls or ([call] if call else None):  # an empty list is no call, and templates take it for one
            turn["tool_calls"] = _calls(_parsed(calls), f"{name}.tool_calls")
        _check(turn, name)
        if turn.get("content") is None:
            if turn["role"] != "assistant":
                raise UserError(f"{name}.content: missing, expected text")
            turn["content"] = ""
    system = system_of(record)
    return turns if system is None or turns[0]["role"] in GIVEN else [system, *turns]


def system_of(record: dict) -> dict | None:
    """The system's message that a record has beside its conversation: `system` or `system_prompt`, a text."""
    for key in SYSTEM:
        found = record.get(key)
        if found is None or isinstance(found, str) and not found.strip():
            continue
        if not isinstance(found, str):
            raise UserError(f"{key}: found {_shown(found)}, expected text")
        check_text(found, key)
        return {"role": "system", "content": found}
    return None


def tools_of(record: dict) -> list[dict] | None:
    """The functions that the target may call: `tools`, a list or its JSON, or `functions` of the older form. None where
    there are none.
    """
    tools = record.get("tools")
    if tools in (None, "", []) and isinstance(functions := _parsed(record.get("functions")), list):
        tools = [{"type": "function", "function": function} for function in functions]
    if isinstance(tools, str) and tools.strip():
        check_text(tools, "tools")
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"tools: not valid JSON ({error})") from None
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"tools: found {_shown(tools)}, expected a list of objects, or its JSON")
    tools = _without_nulls(tools)
    _check(tools, "tools")
    return tools


def as_text(messages: list[dict]) -> list[dict]:
    """Messages for a target of text: contents given as parts are joined. Raises UserError naming the kind of a part
    that is no text, and for a content that is neither text nor parts.
    """
    return [
        message if isinstance(message["content"], str) else message | {"content": _joined(message["content"], number)}
        for number, message in enumerate(messages)
    ]


def says_something(message: dict) -> bool:
    """Whether there is anything in an answer but its end."""
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    return bool(content.strip() or message.get("tool_calls") or reasoning_of(message).strip())


def reasoning_of(message: dict) -> str:
    return next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")


def _joined(content, number: int) -> str:
    name = f"messages[{number}].content"
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError(f"{name}: found {_shown(content)}, expected text or a list of parts")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type")
            kind = kind if isinstance(kind, str) and kind.isidentifier() else _shown(kind)
            raise UserError(f"{name}: found a part of type {kind}, expected parts of text alone")
    return "".join(part["text"] for part in content)


def _shared(turn: dict) -> dict:
    """A turn as ShareGPT writes it. What a `function_call` says is JSON: {"name", "arguments"}, or a list of such."""
    who = turn.get("from")
    if not isinstance(who, str) or who not in ROLES or not isinstance(turn.get("value"), str):
        raise UserError(f"conversations: expected a list of objects with value and from (one of {', '.join(ROLES)})")
    role, text = ROLES[who], turn["value"]
    if who != "function_call":
        return {"role": role, "content": text} | ({WEIGHT: turn[WEIGHT]} if WEIGHT in turn else {})
    try:
        calls = json.loads(text)
    except ValueError:
        raise UserError(f"conversations: function_call: found {text[:40]!r}, expected JSON with a name") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _calls(calls, name: str) -> list[dict]:
    """Each with its function under `function`, and with arguments that are JSON text as objects: so serving engines
    hand them to templates.
    """
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{name}: found {_shown(calls)}, expected a list of objects with a function that has a name"
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function = function | {"arguments": json.loads(arguments) if arguments.strip() else {}}
            except ValueError:
                pass  # no JSON: as it was written
        found.append((call if "function" in call else {"type": "function"}) | {"function": function})
    return found


def _parsed(value):
    """A list that is written as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_what_json_has_not(turn: dict) -> dict:
    """Logs in Parquet have times and bytes beside the texts, which no template asks for."""
    return {
        key: value for key, value in turn.items() if value is None or isinstance(value, (str, int, float, list, dict))
    }


def _without_nulls(value):
    """Arrow gives every object all keys that any has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check(value, name: str) -> None:
    """`check_text` of every text in a value."""
    if isinstance(value, str):
        check_text(value, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(str(key), name)
            _check(item, f"{name}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check(item, f"{name}[{number}]")


def _shown(value) -> str:
    return ascii(value)[:60]
