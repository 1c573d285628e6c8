"""From conversations to prompts: ids that end with the opening of the assistant's turn, and the pictures among them.

`reader`: as `Renderer.of` takes it: the target's template with its variables, or the tokenizer alone.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from draftsmith.eval.measurement.suites import Conversation, read_suite
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import Reader, check_marks, encode_prompt, marks
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import ImagePrompt


@dataclass(frozen=True)
class Prompt:
    """name (of a later turn with `/TURN` behind it), category, messages, and what the target decodes from; turn: of its
    conversation, from 0.
    """

    name: str
    category: str
    messages: list[dict]
    tokens: list[int] | ImagePrompt
    pictures: tuple[Path | bytes, ...] = ()
    tools: list[dict] | None = None
    turn: int = 0

    @property
    def identity(self) -> list:
        """What tells this prompt from another."""
        return [
            *self.tokens,
            *(str(p) if isinstance(p, Path) else hashlib.sha256(p).hexdigest() for p in self.pictures),
        ]


def read_prompts(file: str | Path, reader, limit: int | None = None) -> list[Prompt]:
    """The first turn of every conversation. Raises UserError naming file and row."""
    return [first_turn(c, reader, file) for c in read_suite(file, limit)]


def first_turn(conversation: Conversation, reader, file: str | Path) -> Prompt:
    if isinstance(Renderer.of(reader).reader, Reader):
        asked = [message for turn in conversation.turns for message in turn]
        try:
            check_marks([*conversation.before, *asked], conversation.pictures)
        except UserError as error:
            raise UserError(f"{file} row {conversation.row}: {error}") from None
    return rendered(conversation, [*conversation.before, *conversation.turns[0]], reader, file, turn=0)


def next_turn(conversation: Conversation, prompt: Prompt, answer: str, reader, file: str | Path) -> Prompt:
    """The turn behind `prompt`, to which the target's own answer was `answer`."""
    said, turn = {"role": "assistant", "content": answer}, prompt.turn + 1
    return rendered(conversation, [*prompt.messages, said, *conversation.turns[turn]], reader, file, turn)


def rendered(conversation: Conversation, messages: list[dict], reader, file: str | Path, turn: int) -> Prompt:
    pictures = conversation.pictures
    try:
        if isinstance(Renderer.of(reader).reader, Reader):
            pictures = pictures[: marks(messages)]  # others stand in later turns
        elif pictures:
            raise UserError("found a picture, expected text alone: this target does not see")
        tokens = encode_prompt(reader, messages, pictures, conversation.tools)
    except (UserError, RecursionError) as error:
        raise UserError(
            f"{file} row {conversation.row}: {'nested too deeply' if isinstance(error, RecursionError) else error}"
        ) from None
    name = conversation.name if turn == 0 else f"{conversation.name}/{turn + 1}"
    return Prompt(name, conversation.category, messages, tokens, pictures, conversation.tools, turn)


def all_turns(
    conversations: list[Conversation],
    reader,
    file: str | Path,
    answer: Callable[[list[Prompt]], list[str]],
    fits: Callable[[Prompt], bool] = lambda prompt: True,
) -> list[Prompt]:
    """Every turn as a prompt of its own. Behind a turn stands the target's own answer to it: `answer(prompts) -> texts`
    is called once a round (greedy and plain, so that all methods and temperatures get the same prompts). A conversation
    ends before the first prompt that does not fit.
    """
    going, prompts = [(c, first_turn(c, reader, file)) for c in conversations], []
    while going := [(c, prompt) for c, prompt in going if fits(prompt)]:
        prompts += [prompt for _, prompt in going]
        asked = [(c, prompt) for c, prompt in going if len(c.turns) > prompt.turn + 1]
        texts = answer([prompt for _, prompt in asked]) if asked else []
        going = [(c, next_turn(c, prompt, text, reader, file)) for (c, prompt), text in zip(asked, texts)]
    return prompts
