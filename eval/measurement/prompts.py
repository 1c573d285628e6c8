"""From conversations to prompts: ids that end with the opening of the assistant's turn, and the pictures among them.

`tokenizer` is the target's, or the `Reader` of one that sees (`load_reader`).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from draftsmith.eval.measurement.suites import Conversation, read_suite
from draftsmith.models.chat import encode_prompt
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import Reader, check_marks, marks
from draftsmith.models.targets import ImagePrompt


@dataclass(frozen=True)
class Prompt:
    """name (of a later turn with `/TURN` behind it), category, messages, and what the target decodes from."""

    name: str
    category: str
    messages: list[dict]
    tokens: list[int] | ImagePrompt
    pictures: tuple[Path | bytes, ...] = ()

    @property
    def identity(self) -> list:
        """What tells this prompt from another."""
        return [
            *self.tokens,
            *(str(p) if isinstance(p, Path) else hashlib.sha256(p).hexdigest() for p in self.pictures),
        ]


def read_prompts(file: str | Path, tokenizer, limit: int | None = None) -> list[Prompt]:
    """The first turn of every conversation. Raises UserError naming file and row."""
    return [first_turn(c, tokenizer, file) for c in read_suite(file, limit)]


def first_turn(conversation: Conversation, tokenizer, file: str | Path) -> Prompt:
    asked = [{"role": "user", "content": turn} for turn in conversation.turns]
    messages = [*conversation.before, asked[0]]
    if isinstance(tokenizer, Reader):
        try:
            check_marks([*conversation.before, *asked], conversation.pictures)
        except UserError as error:
            raise UserError(f"{file} row {conversation.row}: {error}") from None
    return rendered(conversation, messages, tokenizer, file, turn=1)


def rendered(conversation: Conversation, messages: list[dict], tokenizer, file: str | Path, turn: int) -> Prompt:
    pictures = ()
    try:
        if isinstance(tokenizer, Reader):
            pictures = conversation.pictures[: marks(messages)]  # others stand in later turns
            tokens = tokenizer.prompt(messages, pictures)
        elif conversation.pictures:
            raise UserError("found a picture, expected text alone: this target does not see")
        else:
            tokens = encode_prompt(tokenizer, messages)
    except UserError as error:
        raise UserError(f"{file} row {conversation.row}: {error}") from None
    name = conversation.name if turn == 1 else f"{conversation.name}/{turn}"
    return Prompt(name, conversation.category, messages, tokens, pictures)


def all_turns(
    conversations: list[Conversation], tokenizer, file: str | Path, answer: Callable[[list[Prompt]], list[str]]
) -> list[Prompt]:
    """Every turn as a prompt of its own. Behind a turn stands the target's own answer to it: `answer(prompts) -> texts`
    is called once a round (greedy and plain, so that all methods and temperatures get the same prompts).
    """
    going, prompts = [(c, first_turn(c, tokenizer, file)) for c in conversations], []
    turn = 1
    while going:
        prompts += [prompt for _, prompt in going]
        asked = [(c, prompt) for c, prompt in going if len(c.turns) > turn]
        texts = answer([prompt for _, prompt in asked]) if asked else []
        turn += 1
        going = [
            (
                c,
                rendered(
                    c,
                    [
                        *prompt.messages,
                        {"role": "assistant", "content": text},
                        {"role": "user", "content": c.turns[turn - 1]},
                    ],
                    tokenizer,
                    file,
                    turn,
                ),
            )
            for (c, prompt), text in zip(asked, texts)
        ]
    return prompts
