"""Conversations that the target answers turn by turn, every turn behind its own answers to those before it."""

import hashlib
import json
from collections.abc import Mapping

from draftsmith.eval.measurement.prompts import Prompt, first_turn, next_turn
from draftsmith.eval.measurement.suites import Conversation
from draftsmith.models.errors import UserError
from draftsmith.models.rendering import Renderer


class Talks:
    """The conversations of a file; their first prompts are made at once. Raises UserError naming file and row."""

    def __init__(self, conversations: list[Conversation], renderer: Renderer, file: str):
        self.conversations, self.renderer, self.file = conversations, renderer, file
        self.prompts = [first_turn(conversation, renderer, file) for conversation in conversations]

    @property
    def digest(self) -> str:
        """What tells them from others."""
        asked = [[p.identity, c.turns[1:]] for p, c in zip(self.prompts, self.conversations)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def request(self, number: int, turn: int) -> int:
        """The number of a turn's request: noise is keyed by it, and that of a first turn is the conversation's own."""
        return number + turn * len(self.conversations)

    def place(self, request: int) -> tuple[int, int]:
        """(conversation, turn) of a request."""
        turn, number = divmod(request, len(self.conversations))
        return number, turn

    def label(self, number: int, turn: int) -> dict:
        """What a row says of its place."""
        return {"row": number} | ({"turn": turn} if len(self.conversations[number].turns) > 1 else {})

    def first(self, room: int, report) -> dict[int, Prompt]:
        """The first turns by conversation; those that do not fit into `room` tokens are left out."""
        found = {number: prompt for number, prompt in enumerate(self.prompts) if len(prompt.tokens) <= room}
        for line in self.renderer.passed_over():
            report(line)
        if left := len(self.prompts) - len(found):
            report(f"{left} prompts of more than {room} tokens are left out")
        return found

    def following(self, going: dict[int, Prompt], said: Mapping[int, str], room: int, report) -> dict[int, Prompt]:
        """The turns behind these, to which the target said what `said` tells. A conversation ends early where its next
        prompt does not fit, or where the template refuses the target's own answer.
        """
        found, reasons = {}, []
        for number, prompt in going.items():
            conversation = self.conversations[number]
            if prompt.turn + 1 == len(conversation.turns):
                continue
            try:
                behind = next_turn(conversation, prompt, said[number], self.renderer, self.file)
                if len(behind.tokens) > room:
                    raise UserError(
                        f"{self.file} row {conversation.row}: found {len(behind.tokens)} tokens in turn "
                        f"{behind.turn + 1}, expected at most {room}"
                    )
                found[number] = behind
            except UserError as error:
                reasons.append(str(error))
        if reasons:
            report(f"{len(reasons)} conversations end before their last turn; the first: {reasons[0]}")
        return found
