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


def answer_missing(message: dict, shown: str) -> bool:
    """Whether anything of an answer does not stand in what the template makes of it (the end of the prompt included,
    which may open a thought).
    """
    shown = bare(THOUGHT_TAG.sub("", shown))
    return any(bare(THOUGHT_TAG.sub("", part)) not in shown for part in (*pieces(message), reasoning_of(message)))


def roles_missing(messages: list[dict], shown: str) -> set[str]:
    """The roles of messages beside answers and results of tools (which templates write in forms of their own) whose
    text does not stand in what the template makes of all.
    """
    asked = [m for m in messages if m["role"] not in ("assistant", "tool")]
    whole = bare(shown) if asked else ""
    hidden = {m["role"] for m in asked if any(bare(piece) not in whole for piece in pieces(m))}
    return {role if role in ("user", "system", "developer") else "other roles" for role in hidden}
