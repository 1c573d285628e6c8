"""Training records with pictures, for targets that see: conversations encoded by the target's own processor, pictures
kept beside the rows.

Two forms: LLaVA's JSON (`image`, a file or a list of them, and `conversations` with `<image>` where they stand), and
data sets of the Hub whose column `image` or `images` holds the pictures themselves. Every picture is decoded once here,
so that a bad one is found before training and with its row; a row remembers where its pictures lie, and the target
reads their pixels when it needs them.

A conversation is one row, or one for each answer where a head chooses among the pieces of pictures anew for every
prompt, as decoding does.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.messages import messages_of, tools_of
from draftsmith.models.pictures import (
    Reader,
    counted,
    open_picture,
    open_pictures,
    picture_sources,
)
from draftsmith.models.rendering import Renderer
from draftsmith.models.row_encoder import check_ids
from draftsmith.models.targets import Description, ImagePrompt
from draftsmith.train.records import encode_record, is_conversation

if TYPE_CHECKING:  # needed for pictures alone
    from PIL import Image

Row = tuple[list[int], list[int], list[Path | bytes]]  # token ids, token mask, pictures in the order of the text
Cut = Callable[[list[int], list[int], list[Path | bytes], list[int]], list[Row]]  # how a conversation becomes rows


def whole(ids: list[int], mask: list[int], pictures: list[Path | bytes], ends: list[int]) -> list[Row]:
    """A conversation as one row."""
    return [(ids, mask, pictures)]


def answers_apart(ids: list[int], mask: list[int], pictures: list[Path | bytes], ends: list[int]) -> list[Row]:
    """One row for each answer: all up to its end, and it alone is supervised; answers before it are prompt. pictures:
    in the order of the text; ends: how many tokens stand up to the end of each. Text alone stays one row: there is
    nothing to choose from in it.
    """
    if not pictures:
        return whole(ids, mask, pictures, ends)
    answers = np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2).tolist()  # [start, stop) of each run of ones
    return [
        (ids[:stop], [0] * start + [1] * (stop - start), [p for p, end in zip(pictures, ends) if end <= stop])
        for start, stop in answers
    ]


def cut_for(config) -> Cut:
    """How conversations become rows for a head of this config (`Config.for_target`)."""
    return answers_apart if config.columns else whole


class Pictures:
    """Reads pictures and encodes records with them. renderer: of the target's `Reader`; image_token: the id that stands
    for pictures in its rows.
    """

    def __init__(self, renderer: Renderer, image_token: int, max_pixels: int, cut: Cut = whole):
        self.renderer, self.image_token, self.max_pixels, self.cut = renderer, image_token, max_pixels, cut
        self.reader: Reader = renderer.reader
        self.processor = self.reader.processor

    @property
    def key(self) -> list:
        """What rows depend on beside files, tokenizer and template."""
        apart = [] if self.cut is whole else [self.cut.__name__]
        return [self.image_token, self.max_pixels, self.processor.to_json_string(), *apart]

    def load(self, place: Path) -> "Image.Image":
        """A picture of `Rows.images`."""
        return open_picture(place, str(place), self.max_pixels)

    def pixels(self, places: list[Path]) -> dict[str, torch.Tensor]:
        """What the processor makes of a row's pictures, as `TextTarget.features` takes it of one document; {} of
        none.
        """
        return self.reader.pixels([self.load(place) for place in places])

    def prompt(self, tokens: list[int], places: list[Path]) -> list[int] | ImagePrompt:
        """The beginning of a row, with the pictures that stand in it: the first of `places`."""
        left, kept = tokens.count(self.image_token), []
        while left > 0:
            kept.append(places[len(kept)])
            left -= self.tokens_of(self.load(kept[-1]))
        return ImagePrompt(tokens, self.pixels(kept)) if kept else tokens

    def encode(
        self, record, base: Path, renderer: Renderer, stops: set[int], vocab_size: int, max_length: int
    ) -> tuple[list[Row], Counter]:
        """The rows of a record, and what is to be told of it. base: the folder that relative file names start from;
        renderer: of records that are no conversations.

        Raises UserError saying what was found and expected.
        """
        sources = picture_sources(record, base) if isinstance(record, dict) else []
        images = open_pictures(sources, self.max_pixels)
        if is_conversation(record):
            messages = self.reader.placed(messages_of(record), images)
            counts = [self._count(part["written"]) for m in messages for part in m["content"] if "written" in part]
            found = self.renderer.encode(messages, tools_of(record), stops)
            for ids, _ in found.rows:
                check_ids(ids, self.reader.tokenizer, vocab_size)
        else:
            counts = [self.tokens_of(image) for image in images]
            found = encode_record(record, renderer, stops, vocab_size)
            if found.rows and (held := found.rows[0][0].count(self.image_token)) != sum(counts):
                raise UserError(f"found {held} image tokens, expected {sum(counts)} for {counted(images)}")
        rows = [row for ids, mask in found.rows for row in self._rows(ids, mask, sources, counts, max_length)]
        return rows, found.notes

    def _rows(self, ids: list[int], mask: list[int], sources: list, counts: list[int], max_length: int) -> list[Row]:
        """counts: image tokens of each picture; a row has the first ones, as far as its text goes."""
        total, ends = ids.count(self.image_token), [0, *accumulate(counts)]
        if total not in ends:
            raise UserError(f"found {total} image tokens, expected {ends[-1]} for {counted(sources)}")
        if (kept := ids[:max_length].count(self.image_token)) < total:
            raise UserError(
                f"found {kept} of {total} image tokens within data.max_length {max_length}, expected all of them"
            )
        number = ends.index(total)
        behind = [0, *(place + 1 for place, token in enumerate(ids) if token == self.image_token)]
        return self.cut(ids, mask, sources[:number], [behind[end] for end in ends[1 : number + 1]])

    def tokens_of(self, image: "Image.Image") -> int:
        """How many image tokens a picture takes."""
        return self._count(self.reader.written(image))

    def _count(self, written: str) -> int:
        return list(self.reader.tokenizer(written, add_special_tokens=False)["input_ids"]).count(self.image_token)

    @staticmethod
    def store(sources: list[Path | bytes], folder: Path) -> list[str]:
        """Where each picture can be read: the absolute path of a file, or a path below `folder` to which encoded
        pictures are written.
        """
        kept = []
        for source in sources:
            if isinstance(source, Path):
                kept.append(str(source.resolve()))
                continue
            name = f"pictures/{hashlib.sha256(source).hexdigest()[:32]}"
            (folder / "pictures").mkdir(exist_ok=True)
            (folder / name).write_bytes(source)
            kept.append(name)
        return kept


def load_pictures(renderer: Renderer, described: Description, max_pixels: int, cut: Cut = whole) -> Pictures | None:
    """For a target that sees; None for any other."""
    if described.image_token is None:
        return None
    return Pictures(renderer, described.image_token, max_pixels, cut)
