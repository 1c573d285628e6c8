"""From the texts of a conversation to token ids: rows with their token mask (1 = written by the target)."""

from dataclasses import dataclass
from functools import cached_property

from draftsmith.models.errors import UserError


@dataclass
class Row:
    """A row while its conversation goes on. text: what its first `told` ids say, up to an end marker."""

    ids: list[int]
    mask: list[int]
    text: str = ""
    told: int = 0
    joined: bool = False  # parts were encoded by themselves


class RowEncoder:
    """reader: a tokenizer, or the `models.pictures.Reader` of a target that sees."""

    def __init__(self, reader):
        self.reader, self.tokenizer = reader, getattr(reader, "tokenizer", reader)

    def ids(self, text: str) -> list[int]:
        """Without special tokens beside those of the text; a processor adds the first one where the text has none."""
        bos = self.tokenizer.bos_token
        adds = self.reader is not self.tokenizer and not (bos and text.startswith(bos))
        return list(self.tokenizer(text, add_special_tokens=adds)["input_ids"])

    def _piece(self, text: str) -> list[int]:
        """Of a text that stands behind another one."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def ends(self, stops: set[int]) -> list[str]:
        """The texts of those stop ids that a text is split at, whatever stands around them."""
        return [self._added[stop].content for stop in sorted(stops) if stop in self._added]

    @cached_property
    def _added(self) -> dict:
        return self.tokenizer.added_tokens_decoder

    @cached_property
    def markers(self) -> frozenset[int]:
        """The ids of special tokens: what templates are built of."""
        return frozenset({*self.tokenizer.all_special_ids, *(i for i, token in self._added.items() if token.special)})

    def rows(self, pieces: list[tuple[str, str, str, bool]], stops: set[int], shared: bool = True) -> list[Row]:
        """pieces: (prompt, given, answer, whether it ends with an end marker) of each answer in order.

        shared: the ids of a prompt that goes on behind a row are those of the row and of the rest, since texts are
        split at end markers. That is checked at the end, and where it does not hold each prompt is encoded by itself.
        """
        rows = []
        for asked, given, answer, ended in pieces:
            row = rows[-1] if rows else Row([], [])
            if shared and row.told and row.told == len(row.ids) and asked.startswith(row.text):
                prompt, written = self._continued(asked[len(row.text) :] + given, answer, self._piece)
                row.joined = True
            else:
                prompt, written = self._continued(asked + given, answer, self.ids)
                if not rows or prompt[: len(row.ids)] != row.ids:
                    row = Row([], [])
                    rows.append(row)
                prompt = prompt[len(row.ids) :]
            stop = next((at for at, token in enumerate(written, 1) if token in stops), len(written))
            row.ids += prompt + written[:stop]
            row.mask += [0] * len(prompt) + [1] * stop
            if ended and stop == len(written):
                row.text, row.told = asked + given + answer, len(row.ids)
        if shared and any(self.ids(row.text) != row.ids[: row.told] for row in rows if row.joined):
            return self.rows(pieces, stops, shared=False)
        return rows

    def _continued(self, prompt: str, answer: str, encode) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and those that stand behind it: cut there, even where encoding both together would merge
        across.
        """
        ids, together = encode(prompt), encode(prompt + answer)
        if together[: len(ids)] == ids:
            return ids, together[len(ids) :]
        alone = self._piece(answer)
        if self.tokenizer.decode([*ids, *alone]) != self.tokenizer.decode(together):
            raise UserError(f"tokenizer: gives no ids for {answer[:40]!r} behind a prompt, expected some that say it")
        return ids, alone


def check_ids(ids: list[int], tokenizer, vocab_size: int) -> None:
    """Raises UserError for an id that a target's embedding does not have."""
    if wrong := next((token for token in ids if not 0 <= token < vocab_size), None):
        name = tokenizer.convert_ids_to_tokens(wrong) if 0 < wrong < 2**31 else None
        raise UserError(f"found token id {wrong}{f' ({name!a})' if name else ''}, expected 0..{vocab_size - 1}")
