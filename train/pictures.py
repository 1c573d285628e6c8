"""Training records with pictures, for targets that see: conversations encoded by the target's own processor, pictures kept beside the rows.

Two forms: LLaVA's JSON (`image`, a file or a list of them, and `conversations` with `<image>` where they stand), and data sets of the Hub
whose column `image` or `images` holds the pictures themselves. Every picture is decoded once here, so that a bad one is found before
training and with its row; a row remembers where its pictures lie, and the target reads their pixels when it needs them.
"""

import hashlib
from pathlib import Path

import torch
from PIL import Image

from draftsmith.models.chat import render
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import Reader, counted, load_processor, open_picture, open_pictures, picture_sources, placed
from draftsmith.models.targets import Description, ImagePrompt
from draftsmith.train.data import encode_answers, encode_record, messages_of


class Pictures:
    """Reads pictures and encodes records with them. processor: the target's; image_token: the id that stands for pictures in its rows."""

    def __init__(self, processor, image_token: int, max_pixels: int):
        self.processor, self.image_token, self.max_pixels = processor, image_token, max_pixels
        self.reader = Reader(processor)

    @property
    def key(self) -> list:
        """What rows depend on beside files and tokenizer."""
        return [self.image_token, self.max_pixels, self.reader.chat_template, self.processor.to_json_string()]

    def load(self, place: Path) -> Image.Image:
        """A picture of `Rows.images`."""
        return open_picture(place, str(place), self.max_pixels)

    def pixels(self, places: list[Path]) -> dict[str, torch.Tensor]:
        """What the processor makes of a row's pictures, as `TextTarget.features` takes it of one document; {} of none."""
        return self.reader.pixels([self.load(place) for place in places])

    def prompt(self, tokens: list[int], places: list[Path]) -> list[int] | ImagePrompt:
        """The beginning of a row, with the pictures that stand in it: the first of `places`."""
        left, kept = tokens.count(self.image_token), []
        while left > 0:
            kept.append(places[len(kept)])
            left -= self.tokens_of(self.load(kept[-1]))
        return ImagePrompt(tokens, self.pixels(kept)) if kept else tokens

    def encode(self, record: dict, base: Path, stops: set[int], vocab_size: int, max_length: int) -> tuple[list[int], list[int], list[Path | bytes]]:
        """(token ids, token mask, pictures in the order of the text). base: the folder that relative file names start from.

        Raises UserError saying what was found and expected.
        """
        sources = picture_sources(record, base) if isinstance(record, dict) else []
        images = open_pictures(sources, self.max_pixels)
        if isinstance(record, dict) and record.get("tokens") is None and (record.get("messages") or record.get("conversations")) is not None:
            ids, mask = encode_answers(self.reader, placed(messages_of(record), images), stops)
        else:
            ids, mask = encode_record(record, self.processor.tokenizer, stops, vocab_size)
        expected, found = sum(self.tokens_of(image) for image in images), ids.count(self.image_token)
        if found != expected:
            raise UserError(f"found {found} image tokens, expected {expected} for {counted(images)}")
        if (kept := ids[:max_length].count(self.image_token)) < found:
            raise UserError(f"found {kept} of {found} image tokens within data.max_length {max_length}, expected all of them")
        return ids, mask, sources

    def tokens_of(self, image: Image.Image) -> int:
        """How many image tokens a picture takes."""
        alone = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        return list(render(self.reader, alone)["input_ids"]).count(self.image_token)

    @staticmethod
    def store(sources: list[Path | bytes], folder: Path) -> list[str]:
        """Where each picture can be read: the absolute path of a file, or a path below `folder` to which encoded pictures are written."""
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


def load_pictures(name: str | Path, described: Description, max_pixels: int) -> Pictures | None:
    """For a target that sees; None for any other. Raises UserError when no processor lies beside the target."""
    if described.image_token is None:
        return None
    return Pictures(load_processor(name), described.image_token, max_pixels)
