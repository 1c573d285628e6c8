"""Scenes drawn by code: shapes and a short text in the cells of a 4 x 4 grid, as a picture, as questions with short
answers and as a long description.

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
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
ORDINALS = ("first", "second", "third", "fourth")
LONG = 205  # words and marks of a description, of which a tokenizer that joins no words makes at least as many tokens


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


@dataclass(frozen=True)
class Question:
    kind: str
    question: str
    answer: str


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


def _place(cell: tuple[int, int], rng: random.Random) -> str:
    row, column = cell
    return rng.choice((f"row {row + 1}, column {column + 1}", f"the {ORDINALS[row]} row, {ORDINALS[column]} column"))


def _named(item: Shape | Text | None) -> str:
    if item is None:
        return "nothing"
    return f"a {item}" if isinstance(item, Shape) else f"the {item}"


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of every kind that the scene allows, in a drawn order; the answer is short and without a full
    stop.
    """
    shape = rng.choice(scene.shapes)
    where = _place(shape.cell, rng)
    asked = [
        Question(
            "colour",
            rng.choice((f"What colour is the shape in {where}?", f"Which colour has the shape in {where}?")),
            shape.colour,
        ),
        Question(
            "shape",
            rng.choice((f"Which shape is in {where}?", f"What kind of shape do you see in {where}?")),
            shape.shape,
        ),
        Question("size", f"What size is the shape in {where}?", shape.size),
        Question(
            "background",
            rng.choice(("What colour is the background?", "Which colour lies behind the shapes?")),
            scene.background,
        ),
        Question(
            "count",
            rng.choice(("How many shapes are there?", "How many shapes does the picture show?")),
            str(len(scene.shapes)),
        ),
    ]
    kind = rng.choice(scene.shapes).shape if rng.random() < 0.75 else rng.choice(SHAPES)
    asked.append(
        Question("count shape", f"How many {_plural(kind)} are there?", str(sum(s.shape == kind for s in scene.shapes)))
    )
    colour = rng.choice(scene.shapes).colour if rng.random() < 0.75 else rng.choice(list(COLOURS))
    asked.append(
        Question("count colour", f"How many shapes are {colour}?", str(sum(s.colour == colour for s in scene.shapes)))
    )
    present = {s.pair for s in scene.shapes}
    absent = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in present]
    pair = rng.choice(sorted(present) if rng.random() < 0.5 else absent)
    asked.append(Question("exists", f"Is there {_a(pair)} in the picture?", "yes" if pair in present else "no"))
    cell = (
        rng.choice(sorted({(r, c) for r in range(GRID) for c in range(GRID)}))
        if rng.random() < 0.4
        else rng.choice(scene.shapes).cell
    )
    asked.append(
        Question(
            "content",
            rng.choice((f"What is in {_place(cell, rng)}?", f"What do you see in {_place(cell, rng)}?")),
            _named(scene.at(cell)),
        )
    )
    if scene.text is not None:
        asked.append(
            Question(
                "text", rng.choice(("What does the text say?", "What is written in the picture?")), scene.text.text
            )
        )
    if singles := scene.singles():
        one, other, single = (rng.choice(singles) for _ in range(3))
        asked.append(Question("where", f"Where is the {one.pair}?", f"row {one.row + 1}, column {one.column + 1}"))
        asked.append(Question("size by name", f"How large is the {other.pair}?", other.size))
        beside = {name: (single.row + r, single.column + c) for name, (r, c) in DIRECTIONS.items()}
        beside = {name: cell for name, cell in beside.items() if 0 <= min(cell) and max(cell) < GRID}
        full = [name for name, cell in beside.items() if scene.at(cell)]
        side = rng.choice(full if full and rng.random() < 0.6 else list(beside))
        asked.append(Question("beside", f"What is directly {side} the {single.pair}?", _named(scene.at(beside[side]))))
    rng.shuffle(asked)
    return asked


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _number(count: int, noun: str) -> str:
    return f"{NUMBERS[count]} {noun if count == 1 else _plural(noun)}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def request(rng: random.Random) -> str:
    """How a description is asked for."""
    return rng.choice(
        (
            "Describe the picture.",
            "Describe the picture in detail.",
            "What does the picture show?",
            "Tell me everything that you see.",
            "Please give a full description of this picture.",
        )
    )


def describe(scene: Scene, rng: random.Random) -> str:
    """A text of at least `LONG` words and marks: what lies where in reading order, what is next to what, counts, and
    empty cells.
    """
    total = _number(len(scene.shapes), "shape")
    sentences = [
        rng.choice(
            (
                f"This picture shows {total} on a {scene.background} background.",
                f"On a {scene.background} background there are {total}.",
                f"The background is {scene.background}, and {total} are drawn on it.",
            )
        )
    ]
    for row in range(GRID):
        items = [item for column in range(GRID) if (item := scene.at((row, column)))]
        if not items:
            sentences.append(rng.choice((f"The {ORDINALS[row]} row is empty.", f"Row {row + 1} holds nothing.")))
        sentences += [_sentence(item, rng) for item in items]
    sentences += _counts(scene, rng)
    facts = _beside(scene, rng) + [
        rng.choice((f"Nothing is drawn in {place}.", f"There is nothing in {place}."))
        for cell in rng.sample([(r, c) for r in range(GRID) for c in range(GRID)], GRID * GRID)
        if scene.at(cell) is None
        for place in [_place(cell, rng)]
    ]
    closing = rng.choice(
        ("That is all there is to see.", "There is nothing else in the picture.", "No other shapes are visible.")
    )
    words = lambda: sum(count_words(s) for s in (*sentences, closing))  # noqa: E731
    while facts and words() < LONG:
        sentences.append(facts.pop(0))
    return " ".join((*sentences, closing))


def count_words(text: str) -> int:
    """Words and punctuation marks."""
    return len("".join(f" {c} " if not c.isalnum() and not c.isspace() else c for c in text).split())


def _sentence(item: Shape | Text, rng: random.Random) -> str:
    place = _place(item.cell, rng)
    if isinstance(item, Text):
        what, text = str(item).split()
        return rng.choice(
            (
                f'In {place} the {what} "{text}" is written.',
                f'{place[0].upper()}{place[1:]} carries the {what} "{text}".',
                f'The {what} "{text}" can be read in {place}.',
            )
        )
    return rng.choice(
        (
            f"In {place} there is a {item}.",
            f"A {item} sits in {place}.",
            f"{place[0].upper()}{place[1:]} holds a {item}.",
            f"In {place} we find a {item.shape} that is {item.size} and {item.colour}.",
            f"The {item.shape} in {place} is {item.colour}, and it is {item.size}.",
            f"Next, in {place}, comes {_a(item.pair)} of {item.size} size.",
        )
    )


def _counts(scene: Scene, rng: random.Random) -> list[str]:
    shapes = [_number(n, name) for name in SHAPES if (n := sum(s.shape == name for s in scene.shapes))]
    colours = [f"{NUMBERS[n]} {name}" for name in COLOURS if (n := sum(s.colour == name for s in scene.shapes))]
    sizes = [f"{NUMBERS[n]} {name}" for name in SIZES if (n := sum(s.size == name for s in scene.shapes))]
    return rng.sample(
        [
            rng.choice((f"By shape there are {_listed(shapes)}.", f"Sorted by shape, we count {_listed(shapes)}.")),
            rng.choice(
                (f"Of the shapes, {_listed(colours)} can be counted.", f"By colour there are {_listed(colours)}.")
            ),
            rng.choice((f"By size there are {_listed(sizes)}.", f"As for size, there are {_listed(sizes)}.")),
        ],
        3,
    )


def _beside(scene: Scene, rng: random.Random) -> list[str]:
    """A sentence for every two shapes in neighbouring cells that their names tell from all others."""
    singles = scene.singles()
    pairs = [
        (a, b, name)
        for a in singles
        for b in singles
        for name, (r, c) in DIRECTIONS.items()
        if (b.row + r, b.column + c) == a.cell
    ]
    pairs = [
        rng.choice(pair)
        for pair in {
            frozenset((a.cell, b.cell)): [(a, b, n), next(p for p in pairs if p[:2] == (b, a))] for a, b, n in pairs
        }.values()
    ]
    rng.shuffle(pairs)
    return [
        rng.choice(
            (f"The {a.pair} is directly {name} the {b.pair}.", f"Directly {name} the {b.pair} stands the {a.pair}.")
        )
        for a, b, name in pairs
    ]
