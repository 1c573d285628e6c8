"""From token ids to text while they come: a piece is given out only once no later token can change it."""

import re

INCOMPLETE = "\ufffd"  # what decoders set for bytes that are no character, or not yet
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer:
    """One text, piece by piece. All pieces together, `rest` last, are `tokenizer.decode` of all tokens.

    Characters may span tokens. A byte-level tokenizer ends a text inside a character with U+FFFD: that is held back.
    One that falls back to single bytes (`<0xE2>`) decodes a run of them together, and all of it to U+FFFD where a part
    is broken: the last run is held back. Spaces are never cleaned up, which would change what was given out before.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.given = 0  # characters

    def push(self, tokens: list[int]) -> str:
        """The text that these tokens complete."""
        self.tokens += tokens
        return self._give(self._decode(self.tokens[: len(self.tokens) - self._last_bytes()]).rstrip(INCOMPLETE))

    def rest(self) -> str:
        """What was held back, when no token follows."""
        return self._give(self._decode(self.tokens))

    def _give(self, text: str) -> str:
        piece = text[self.given :]
        self.given += len(piece)
        return piece

    def _last_bytes(self) -> int:
        """How many byte tokens the text ends with."""
        count = 0
        for token in reversed(self.tokens):
            if not BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(token) or ""):
                break
            count += 1
        return count

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
