"""What a chat template leaves out of a conversation: it says nothing of it, and nobody would miss the text."""

from draftsmith.models.messages import reasoning_of
from draftsmith.models.templates import THOUGHT_TAG

CALLS = "conversations have calls of tools that the chat template does not show: the target is not told of them"
TOOLS = "conversations have tools that the chat template does not show"
GIVEN = "messages of {} are not shown by the chat template"
ANSWER = "answers have text that the chat template does not show: they are supervised without it"


def bare(text: str) -> str:
    """Without white space, which templates strip."""
    return "".join(text.split())


def texts(message: dict) -> str:
    """The content of a message as one text."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def pieces(message: dict) -> list[str]:
    """The texts of a message: something else may stand between parts, such as a picture."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part.get("text") or "" for part in content]


def tools_missing(tools: list[dict] | None, prompt: str) -> bool:
    """Whether none of the tools' names stands in a prompt."""
    functions = [function for tool in tools or () if isinstance(function := tool.get("function", tool), dict)]
    names = [function["name"] for function in functions if isinstance(function.get("name"), str)]
    return bool(names) and not any(name in prompt for name in names)


def answer_missing(message: dict, before: str, shown: str) -> bool:
    """Whether anything of an answer does not stand in what the template makes of it. before: the end of the prompt,
    where an answer may begin (it may open a thought) but not stand as a whole.
    """
    whole, behind = (bare(THOUGHT_TAG.sub("", text)) for text in (before + shown, shown))
    parts = [bare(THOUGHT_TAG.sub("", part)) for part in (*pieces(message), reasoning_of(message))]
    ends = [whole.rfind(part) + len(part) if part in whole else 0 for part in parts]
    return any(part and end <= len(whole) - len(behind) for part, end in zip(parts, ends))


def roles_missing(messages: list[dict], shown: str) -> set[str]:
    """The roles of messages beside answers and results of tools (which templates write in forms of their own) whose
    text does not stand in what the template makes of all.
    """
    asked = [m for m in messages if m["role"] not in ("assistant", "tool")]
    whole = bare(shown) if asked else ""
    hidden = {m["role"] for m in asked if any(bare(piece) not in whole for piece in pieces(m))}
    return {role if role in ("user", "system", "developer") else "other roles" for role in hidden}
