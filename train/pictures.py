"""Training records with pictures, for targets that see: conversations encoded by the target's own processor, pictures kept beside the rows.

Two forms: LLaVA's JSON (`image`, a file or a list of them, and `conversations` with `<image>` where they stand), and data sets of the Hub
whose column `image` or `images` holds the pictures themselves. Every picture is decoded once here, so that a bad one is found before
training and with its row; a row remembers where its pictures lie, and the target reads their pixels when it needs them.

A conversation is one row, or one for each answer where a head chooses among the pieces of pictures anew for every prompt, as decoding does.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoProcessor

from draftsmith.models.chat import render
from draftsmith.models.errors import UserError
from draftsmith.models.targets import Description, ImagePrompt, locate
from draftsmith.models.targets.vision import FAMILIES
from draftsmith.train.data import encode_answers, encode_record, messages_of

MARK = "<image>"
INPUTS = {name for names in FAMILIES.values() for name in names}  # what targets take of what processors make of pictures

Row = tuple[list[int], list[int], list[Path | bytes]]  # token ids, token mask, pictures in the order of the text
Cut = Callable[[list[int], list[int], list[Path | bytes], list[int]], list[Row]]  # how a conversation becomes rows


def whole(ids: list[int], mask: list[int], pictures: list[Path | bytes], ends: list[int]) -> list[Row]:
    """A conversation as one row."""
    return [(ids, mask, pictures)]


def answers_apart(ids: list[int], mask: list[int], pictures: list[Path | bytes], ends: list[int]) -> list[Row]:
    """One row for each answer: all up to its end, and it alone is taught; answers before it are prompt. pictures: in the order of the text;
    ends: how many tokens stand up to the end of each. Text alone stays one row: there is nothing to choose from in it."""
    if not pictures:
        return whole(ids, mask, pictures, ends)
    answers = np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2).tolist()  # [start, stop) of each run of ones
    return [(ids[:stop], [0] * start + [1] * (stop - start), [p for p, end in zip(pictures, ends) if end <= stop]) for start, stop in answers]


def cut_for(config) -> Cut:
    """How conversations become rows for a head of this config (`Config.for_target`)."""
    return answers_apart if getattr(config, "columns", False) else whole


def open_picture(source: Path | bytes, name: str, max_pixels: int) -> Image.Image:
    """RGB. Raises UserError for a file that is missing, no picture, cut off, or of more than `max_pixels` pixels (found before they are decoded)."""
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"{name}: no such file, expected a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{name}: found {width} x {height} pixels, expected at most {max_pixels:,} in all (data.max_image_pixels)")
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: found a picture too large to be opened ({error}), expected at most {max_pixels:,} pixels (data.max_image_pixels)") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: found no picture in it, expected PNG, JPEG or another format that Pillow reads") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for broken files
        raise UserError(f"{name}: the picture cannot be decoded ({' '.join(str(error).split())[:120]})") from None


@dataclass(frozen=True)
class _Renderer:
    """What `encode_row` needs of a tokenizer, answered by the processor: ids with as many image tokens as the pictures take."""

    processor: object

    @property
    def chat_template(self) -> str:
        return self.processor.chat_template or ""

    def apply_chat_template(self, messages, **options) -> dict:
        return {key: value[0] for key, value in self.processor.apply_chat_template(messages, **options).items() if key in ("input_ids", "assistant_masks")}


class Pictures:
    """Reads pictures and encodes records with them. processor: the target's; image_token: the id that stands for pictures in its rows."""

    def __init__(self, processor, image_token: int, max_pixels: int, cut: Cut = whole):
        self.processor, self.image_token, self.max_pixels, self.cut = processor, image_token, max_pixels, cut
        self.renderer = _Renderer(processor)

    @property
    def key(self) -> list:
        """What rows depend on beside files and tokenizer."""
        apart = [] if self.cut is whole else [self.cut.__name__]
        return [self.image_token, self.max_pixels, self.renderer.chat_template, self.processor.to_json_string(), *apart]

    def load(self, place: Path) -> Image.Image:
        """A picture of `Rows.images`."""
        return open_picture(place, str(place), self.max_pixels)

    def pixels(self, places: list[Path]) -> dict[str, torch.Tensor]:
        """What the processor makes of a row's pictures, as `TextTarget.features` takes it of one document; {} of none."""
        if not places:
            return {}
        made = self.processor.image_processor(images=[[self.load(place) for place in places]], return_tensors="pt")
        return {name: value for name, value in made.items() if name in INPUTS}

    def prompt(self, tokens: list[int], places: list[Path]) -> list[int] | ImagePrompt:
        """The beginning of a row, with the pictures that stand in it: the first of `places`."""
        left, kept = tokens.count(self.image_token), []
        while left > 0:
            kept.append(places[len(kept)])
            left -= self.tokens_of(self.load(kept[-1]))
        return ImagePrompt(tokens, self.pixels(kept)) if kept else tokens

    def encode(self, record: dict, base: Path, stops: set[int], vocab_size: int, max_length: int) -> list[Row]:
        """The rows of a record. base: the folder that relative file names start from.

        Raises UserError saying what was found and expected.
        """
        sources = picture_sources(record, base) if isinstance(record, dict) else []
        images = [open_picture(source, _name(source, n), self.max_pixels) for n, source in enumerate(sources, 1)]
        if isinstance(record, dict) and record.get("tokens") is None and (record.get("messages") or record.get("conversations")) is not None:
            ids, mask = encode_answers(self.renderer, _placed(messages_of(record), images), stops)
        else:
            ids, mask = encode_record(record, self.processor.tokenizer, stops, vocab_size)
        counts, found = [self.tokens_of(image) for image in images], ids.count(self.image_token)
        if found != sum(counts):
            raise UserError(f"found {found} image tokens, expected {sum(counts)} for {_count(images)}")
        if (kept := ids[:max_length].count(self.image_token)) < found:
            raise UserError(f"found {kept} of {found} image tokens within data.max_length {max_length}, expected all of them")
        behind = [0, *(place + 1 for place, token in enumerate(ids) if token == self.image_token)]
        return self.cut(ids, mask, sources, [behind[count] for count in accumulate(counts)])

    def tokens_of(self, image: Image.Image) -> int:
        """How many image tokens a picture takes."""
        alone = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        return list(render(self.renderer, alone)["input_ids"]).count(self.image_token)

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


def load_pictures(name: str | Path, described: Description, max_pixels: int, cut: Cut = whole) -> Pictures | None:
    """For a target that sees; None for any other. Raises UserError when no processor lies beside the target."""
    if described.image_token is None:
        return None
    try:
        return Pictures(AutoProcessor.from_pretrained(locate(name)), described.image_token, max_pixels, cut)
    except (OSError, ValueError) as error:
        raise UserError(f"processor {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None


def picture_sources(record: dict, base: Path) -> list[Path | bytes]:
    """Files or encoded pictures of a record; none where it has none."""
    found = record.get("images") if record.get("images") else record.get("image")
    found = list(found) if isinstance(found, (list, tuple)) else [found] if found else []
    return [_source(item, base) for item in found]


def _source(item, base: Path) -> Path | bytes:
    if isinstance(item, str):
        return base / item
    if isinstance(item, dict) and isinstance(item.get("bytes"), bytes):
        return item["bytes"]
    if isinstance(item, dict) and isinstance(item.get("path"), str):
        return base / item["path"]
    raise UserError(f"image: found {type(item).__name__}, expected a file name or a picture")


def _name(source: Path | bytes, number: int) -> str:
    return str(source) if isinstance(source, Path) else f"picture {number} of the row"


def _count(images: Sequence) -> str:
    return f"{len(images)} picture{'' if len(images) == 1 else 's'}"


def _placed(messages: list[dict], images: list[Image.Image]) -> list[dict]:
    """Messages whose content is a list of parts, every picture where its mark stands. Raises UserError when marks and pictures differ in number."""
    parts = [_parts(message["content"]) for message in messages]
    marks = sum(part["type"] == "image" for listed in parts for part in listed)
    if marks != len(images):
        raise UserError(f"found {marks} {MARK} in the conversation and {_count(images)}, expected as many of one as of the other")
    waiting = iter(images)
    return [{"role": message["role"], "content": [part | {"image": next(waiting)} if part["type"] == "image" else part for part in listed]}
            for message, listed in zip(messages, parts)]


def _parts(content) -> list[dict]:
    if isinstance(content, str):
        texts = content.split(MARK)
        found = []
        for number, text in enumerate(texts):
            if number:
                found.append({"type": "image"})
                text = text.removeprefix("\n")  # the template sets what stands between a picture and the text
            if number < len(texts) - 1:
                text = text.removesuffix("\n")
            if text:
                found.append({"type": "text", "text": text})
        return found
    if not isinstance(content, list) or not all(isinstance(part, dict) and part.get("type") in ("image", "text") for part in content):
        raise UserError("content: expected a text or a list of parts of type image or text")
    return [{"type": "image"} if part["type"] == "image" else {"type": "text", "text": part.get("text") or ""} for part in content]
