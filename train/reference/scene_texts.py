"""What is said of a scene (`scenes`): questions with short answers, and a long description."""

import random
from dataclasses import dataclass

from draftsmith.train.reference.scenes import COLOURS, GRID, SHAPES, SIZES, Scene, Shape, Text

DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
ORDINALS = ("first", "second", "third", "fourth")
LONG = 205  # words and marks of a description, of which a tokenizer that joins no words makes at least as many tokens


@dataclass(frozen=True)
class Question:
    kind: str
    question: str
    answer: str


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
