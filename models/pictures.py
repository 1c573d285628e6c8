"""Pictures in conversations: opened with clear errors, set where their marks stand, and read by the target's own
processor together with the text.
"""

from __future__ import annotations  # names of Pillow's are looked up by nobody: it is needed for pictures alone

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from draftsmith.models.chat import check_tokenizer, load_tokenizer
from draftsmith.models.errors import UserError
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import ImagePrompt, locate
from draftsmith.models.targets.vision import FAMILIES

if TYPE_CHECKING:
    from PIL import Image

MARK = "<image>"
INPUTS = {
    name for names in FAMILIES.values() for name in names
}  # what targets take of what processors make of pictures
MAX_PIXELS = 2**26  # of one picture, where a recipe does not say


def pillow(name: str):
    """`PIL.Image`. Raises UserError naming the picture or target that needs it where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError(
            f"{name}: pictures need the package pillow, found none; pip install 'draftsmith[train]'"
        ) from None
    return Image


def open_picture(source: Path | bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB. Raises UserError for a file that is missing, no picture, cut off, or of more than `max_pixels` pixels (found
    before they are decoded).
    """
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"{name}: no such file, expected a picture")
    Image = pillow(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{name}: found {width} x {height} pixels, expected at most {max_pixels:,} in all "
                    f"(data.max_image_pixels)"
                )
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{name}: found a picture too large to be opened ({error}), expected at most {max_pixels:,} pixels "
            f"(data.max_image_pixels)"
        ) from None
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{name}: found no picture in it, expected PNG, JPEG or another format that Pillow reads"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for broken files
        raise UserError(f"{name}: the picture cannot be decoded ({' '.join(str(error).split())[:120]})") from None


def picture_sources(record: dict, base: Path) -> list[Path | bytes]:
    """Files (relative names start from `base`) or encoded pictures of a record's `image` or `images`; none where it has
    none.
    """
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


def open_pictures(sources: Sequence[Path | bytes], max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    return [
        open_picture(source, str(source) if isinstance(source, Path) else f"picture {number} of the row", max_pixels)
        for number, source in enumerate(sources, 1)
    ]


def counted(images: Sequence) -> str:
    return f"{len(images)} picture{'' if len(images) == 1 else 's'}"


def marks(messages: list[dict]) -> int:
    """How many pictures stand in messages."""
    return sum(part["type"] == "image" for message in messages for part in _parts(message["content"]))


def check_marks(messages: list[dict], pictures: Sequence) -> None:
    if (found := marks(messages)) != len(pictures):
        raise UserError(
            f"found {found} {MARK} in the conversation and {counted(pictures)}, expected as many of one as of the other"
        )


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
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError(f"content: found {ascii(content)[:60]}, expected text or a list of parts")
    for part in content:
        if part.get("type") != "image" and (part.get("type") != "text" or not isinstance(part.get("text"), str)):
            raise UserError(f"content: found a part of type {part.get('type')}, expected image or text")
    return [{"type": part["type"]} | ({"text": part["text"]} if part["type"] == "text" else {}) for part in content]


class Reader:
    """A target's processor in the place of its tokenizer. Messages get their pictures by `placed`, which asks the image
    processor once for each.
    """

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.decode, self.eos_token_id = processor.tokenizer.decode, processor.tokenizer.eos_token_id
        self.convert_ids_to_tokens = processor.tokenizer.convert_ids_to_tokens
        self.mark = str(getattr(processor, "boi_token", None) or processor.image_token)  # of the template's text

    @property
    def chat_template(self) -> str:
        return self.processor.chat_template or ""

    def placed(self, messages: list[dict], images: list[Image.Image]) -> list[dict]:
        """Messages whose content is a list of parts; what the processor writes for every picture stands where its mark
        does. Raises UserError when marks and pictures differ in number.
        """
        check_marks(messages, images)
        waiting = iter(images)
        return [
            message
            | {
                "content": [
                    part | {"image": "", "written": self.written(next(waiting))} if part["type"] == "image" else part
                    for part in _parts(message["content"])
                ]
            }
            for message in messages
        ]

    def written(self, image: Image.Image) -> str:
        """What the processor puts in the place of a picture's mark: its image tokens, and what stands around them."""
        made = self.processor(text=[self.mark], images=[[image]], add_special_tokens=False)["input_ids"][0]
        ids, added = list(map(int, made)), self.tokenizer.added_tokens_decoder
        runs = [(known, list(run)) for known, run in groupby(ids, added.__contains__)]
        text = "".join(
            "".join(added[token].content for token in run) if known else self.decode(run) for known, run in runs
        )
        if list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) != ids:
            raise UserError(f"processor: what it writes for a picture is not the text {text[:40]!r}, as expected")
        return text

    def expanded(self, text: str, spans: list[tuple[int, int]], messages: list[dict]) -> tuple[str, list]:
        """A template's text with what stands for the pictures of `placed` messages, and places in it moved along."""
        parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
        written = [part["written"] for part in parts if part["type"] == "image"]
        starts = [found.start() for found in re.finditer(re.escape(self.mark), text)]
        if len(starts) != len(written):
            raise UserError(f"chat template: shows {self.mark} {len(starts)} times, expected it for {counted(written)}")
        pieces = text.split(self.mark)
        text = pieces[0] + "".join(picture + piece for picture, piece in zip(written, pieces[1:]))

        def moved(at: int) -> int:
            return at + sum(len(w) - len(self.mark) for w, start in zip(written, starts) if start < at)

        return text, [(moved(start), moved(stop)) for start, stop in spans]

    def pixels(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the processor makes of one document's pictures, as targets take it; {} of none."""
        if not images:
            return {}
        made = self.processor.image_processor(images=[images], return_tensors="pt")
        return {name: value for name, value in made.items() if name in INPUTS}


def encode_prompt(
    reader, messages: list[dict], sources: Sequence[Path | bytes] = (), tools: list[dict] | None = None
) -> list[int] | ImagePrompt:
    """Messages up to a turn that the target answers, with marks where pictures stand -> what it decodes from. reader:
    as `Renderer.of` takes it.
    """
    renderer = Renderer.of(reader)
    reader = renderer.reader
    if not isinstance(reader, Reader):
        return renderer.prompt(messages, tools)
    images = open_pictures(sources)
    tokens = renderer.prompt(reader.placed(messages, images), tools)
    return ImagePrompt(tokens, reader.pixels(images)) if images else tokens


def load_processor(name: str | Path):
    """The processor of a target that sees. Raises UserError when none lies beside the target."""
    pillow(f"processor {name}")
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(locate(name), trust_remote_code=False)
        check_tokenizer(processor.tokenizer, name)
        return processor
    except UserError:
        raise
    except Exception as error:  # as in `load_tokenizer`
        raise UserError(f"processor {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None


def load_reader(name: str | Path, described):
    """The tokenizer of a target of text, the `Reader` of one that sees. described: `TextTarget` or `Description`."""
    return load_tokenizer(name) if described.image_token is None else Reader(load_processor(name))


def load_renderer(name: str | Path, described, variables: Mapping = {}) -> Renderer:
    """The chat template of a target with these variables, over the `load_reader` of it."""
    return Renderer(load_reader(name, described), variables, None, str(name), described.vocab_size)
