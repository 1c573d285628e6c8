"""Scenes drawn by code: shapes and a short text in the cells of a 4 x 4 grid, and their pictures; what is said of them
is in `scene_texts`.

A scene is data (`Scene`); the picture, every question and every sentence are functions of it, so that an answer can be
checked against the scene and against the pixels. Wording is drawn from a small grammar by a seed of its own. Scenes are
split into train and held-out by a hash of their content: the same scene can never be in both. Nothing is stored; a seed
gives the same scene on every machine.

A cell has 4 x 4 slots, and what it holds stands in one of them, a little off its middle. A vision tower whose patches
are the slots sees each thing in one patch: what is to be learnt is reading, not putting together, which a model trained
in an hour on one core has no time for.
"""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from PIL import Image, ImageDraw, ImageFont

GRID = 4  # cells a side
SLOTS = 4  # slots a side of a cell
SLOT = 20  # pixels a side of a slot
CELL = SLOTS * SLOT
SIDE = GRID * CELL
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 64),
    "blue": (40, 84, 224),
    "yellow": (240, 212, 40),
    "purple": (144, 56, 184),
    "orange": (246, 134, 28),
    "cyan": (64, 208, 216),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (128, 128, 128), "black": (12, 12, 12)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = {"small": 4, "medium": 6, "large": 9}  # pixels from the centre to the rim
WORDS = (
    "ant",
    "bee",
    "cat",
    "dog",
    "elk",
    "fox",
    "hen",
    "owl",
    "pig",
    "rat",
    "sun",
    "map",
    "key",
    "box",
    "pen",
    "cup",
    "bus",
    "gem",
    "ink",
    "jug",
    "oak",
    "tie",
    "van",
    "wax",
)


@dataclass(frozen=True)
class Item:
    """row, column: its cell, from 0; slot: (row, column) in the cell; off: pixels (x, y) that its centre lies off that
    of the slot.
    """

    row: int
    column: int
    slot: tuple[int, int]
    off: tuple[int, int]

    @property
    def cell(self) -> tuple[int, int]:
        return self.row, self.column

    @property
    def centre(self) -> tuple[int, int]:
        """Pixel (x, y)."""
        (down, right), (x, y) = self.slot, self.off
        return self.column * CELL + right * SLOT + SLOT // 2 + x, self.row * CELL + down * SLOT + SLOT // 2 + y


@dataclass(frozen=True)
class Shape(Item):
    shape: str
    colour: str
    size: str

    @property
    def pair(self) -> str:
        return f"{self.colour} {self.shape}"

    def __str__(self) -> str:
        return f"{self.size} {self.pair}"


@dataclass(frozen=True)
class Text(Item):
    """A word of WORDS or a number of two digits."""

    text: str

    def __str__(self) -> str:
        return f"{'number' if self.text.isdigit() else 'word'} {self.text}"


@dataclass(frozen=True)
class Scene:
    """shapes in reading order; text: None where nothing is written. No two share a cell."""

    background: str
    shapes: tuple[Shape, ...]
    text: Text | None

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def at(self, cell: tuple[int, int]) -> Shape | Text | None:
        return next((item for item in (*self.shapes, *([self.text] if self.text else [])) if item.cell == cell), None)

    def singles(self) -> list[Shape]:
        """Shapes whose colour and form together name them."""
        counts = Counter(s.pair for s in self.shapes)
        return [s for s in self.shapes if counts[s.pair] == 1]


def draw_scene(seed: int, shapes: tuple[int, int] = (5, 9)) -> Scene:
    """A random scene with between `shapes[0]` and `shapes[1]` shapes; three in four carry a text."""
    rng = random.Random(f"scene {seed}")
    count = rng.randint(*shapes)
    cells = rng.sample([(r, c) for r in range(GRID) for c in range(GRID)], count + 1)
    drawn = []
    for row, column in sorted(cells[1:]):
        size = rng.choice(list(SIZES))
        drawn.append(
            Shape(
                row,
                column,
                *_spot(rng, min(2, SLOT // 2 - 1 - SIZES[size])),
                rng.choice(SHAPES),
                rng.choice(list(COLOURS)),
                size,
            )
        )
    text = rng.choice(WORDS) if rng.random() < 0.6 else str(rng.randint(10, 99))
    written = Text(*cells[0], *_spot(rng, 1), text)
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(drawn), written if rng.random() < 0.75 else None)


def _spot(rng: random.Random, slack: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(slot, pixels off its centre)."""
    return (rng.randrange(SLOTS), rng.randrange(SLOTS)), (rng.randint(-slack, slack), rng.randint(-slack, slack))


def is_held_out(scene: Scene, share: float) -> bool:
    """Whether the scene belongs to the held-out split, by a hash of its content."""
    return int(scene.digest[:8], 16) / 2**32 < share


def scenes(seed: int, held_out: bool, share: float, shapes: tuple[int, int] = (5, 9)) -> Iterator[Scene]:
    """Scenes of one split without end, in an order that the seed fixes."""
    number = seed * 10**9
    while True:
        scene = draw_scene(number, shapes)
        if is_held_out(scene, share) == held_out:
            yield scene
        number += 1


def picture(scene: Scene) -> Image.Image:
    """RGB, SIDE pixels a side, no antialiasing: a pixel has the colour of a shape, of the text or of the background."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        (x, y), r, colour = shape.centre, SIZES[shape.size], COLOURS[shape.colour]
        if shape.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif shape.shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        elif shape.shape == "cross":
            arm = max(1, r // 3)
            pen.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
            pen.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
        else:
            pen.polygon([(x + dx * r, y + dy * r) for dx, dy in _corners(shape.shape)], fill=colour)
    if scene.text is not None:
        _write(image, scene.text, (255, 255, 255) if scene.background == "black" else (0, 0, 0))
    return image


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners in a circle of radius 1."""
    if shape == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if shape == "diamond":
        return [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)]
    turns = [(k * math.pi / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for angle, r in turns]


def _write(image: Image.Image, text: Text, colour: tuple[int, int, int]) -> None:
    """In the bitmap font that Pillow carries."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = font.getbbox(text.text)
    x, y = text.centre
    ImageDraw.Draw(image).text((x - (left + right) // 2, y - (top + bottom) // 2), text.text, font=font, fill=colour)
