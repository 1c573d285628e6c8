"""A conversation in the terminal: what was said, as prompts that fit the target's context, and the commands of whoever
types.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from draftsmith.models.errors import UserError
from draftsmith.models.messages import check_text
from draftsmith.models.pictures import MARK, Reader, encode_prompt, marks
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import ImagePrompt

COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


class Conversation:
    """Turns of a user's message and the answer to it, behind a system message if there is one. room: tokens that a
    prompt may take; reader: as `Renderer.of` takes it; pictures belong to the first message.
    """

    def __init__(self, reader, room: int, system: str | None = None, pictures: Sequence[Path] = ()):
        self.renderer = Renderer.of(reader)
        if pictures and not isinstance(self.renderer.reader, Reader):
            raise UserError(f"--image: found {pictures[0]}, expected text alone: this target does not see")
        if system is not None:
            check_text(system, "--system")
        self.room, self.pictures = room, list(pictures)
        self.before = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[list[dict]] = []

    def prompt(self, text: str) -> tuple[list[int] | ImagePrompt, int]:
        """What the target decodes from to answer `text`, and how many of the oldest turns are left out of it since they
        do not fit. Raises UserError where the text alone does not, and for what is no text. Nothing is said until
        `add`.
        """
        check_text(text, "prompt")
        if not self.turns:
            text = "\n".join([MARK] * len(self.pictures) + [text])
        asked = {"role": "user", "content": text}
        for dropped in range(len(self.turns) + 1):
            messages = [*self.before, *(m for turn in self.turns[dropped:] for m in turn), asked]
            tokens = self._encode(messages)
            if len(tokens) <= self.room:
                self.asked = self.turns[dropped:], asked
                return tokens, dropped
        raise UserError(
            f"prompt: found {len(tokens)} tokens, expected at most {self.room} (the target's context without the new "
            f"tokens and the tree)"
        )

    def add(self, answer: str) -> None:
        """The answer to the last prompt; the turns that were left out there are forgotten."""
        turns, asked = self.asked
        self.turns = [*turns, [asked, {"role": "assistant", "content": answer}]]

    def reset(self) -> None:
        self.turns = []

    def _encode(self, messages):
        shown = self.pictures[: marks(messages)] if self.pictures else []
        return encode_prompt(self.renderer, messages, shown)


def chat(conversation: Conversation, answer: Callable[[str], None], read: Callable[[], str], note) -> None:
    """Answers what `read` gives until it raises EOFError or gives /exit. note(line) tells the user."""
    while True:
        try:
            text = read()
            if text.strip() == "/exit":
                return
            if text.strip() == "/reset":
                conversation.reset()
                note("forgotten")
            elif text.startswith("/") and len(text.split()) == 1:
                note(f"no such command: {text.strip()}; {COMMANDS}")
            elif text.strip():
                answer(text)
        except EOFError:
            return note("")
        except KeyboardInterrupt:
            note(f"\n{COMMANDS}")
        except UserError as error:
            note(f"error: {error}")
