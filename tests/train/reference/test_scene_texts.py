"""What is said of scenes: answers and sentences that the scene bears out."""

import random
import re

from draftsmith.train.reference.scene_texts import DIRECTIONS, LONG, NUMBERS, ORDINALS, count_words, describe, questions
from draftsmith.train.reference.scenes import (
    COLOURS,
    SHAPES,
    Text,
    draw_scene,
)

SCENES = [draw_scene(n) for n in range(60)]


def cell_of(text):
    if found := re.search(r"row (\d), column (\d)", text):
        return int(found[1]) - 1, int(found[2]) - 1
    found = re.search(r"the (\w+) row, (\w+) column", text)
    return ORDINALS.index(found[1]), ORDINALS.index(found[2])


def answer(scene, question):
    """The answer, worked out of the scene from the words of the question."""
    pair = next(iter(re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", question)), None)
    named = next((s for s in scene.shapes if pair == (s.colour, s.shape)), None)

    def called(item):
        return (
            "nothing"
            if item is None
            else f"the {item}"
            if isinstance(item, Text)
            else f"a {item.size} {item.colour} {item.shape}"
        )  # noqa: E731

    if question.startswith("How many"):
        colour, shape = (
            next((name for name in names if re.search(rf"\b{name}(s|es)?\b", question)), None)
            for names in (COLOURS, SHAPES)
        )
        return str(sum(colour in (None, s.colour) and shape in (None, s.shape) for s in scene.shapes))
    if question.startswith("Is there"):
        return "yes" if named else "no"
    if question.startswith("Where is"):
        return f"row {named.row + 1}, column {named.column + 1}"
    if question.startswith("How large"):
        return named.size
    if "directly" in question:
        row, column = next(step for name, step in DIRECTIONS.items() if f"directly {name}" in question)
        return called(scene.at((named.row + row, named.column + column)))
    if "text" in question or "written" in question:
        return scene.text.text
    if "background" in question or "behind" in question:
        return scene.background
    item = scene.at(cell_of(question))
    attribute = (
        "size" if "size" in question else "colour" if "colour" in question else "shape" if "shape" in question else None
    )
    return getattr(item, attribute) if attribute else called(item)


def test_answers_agree_with_the_scene():
    kinds = set()
    for number, scene in enumerate(SCENES):
        for question in questions(scene, random.Random(number)):
            assert question.answer == answer(scene, question.question), question
            kinds.add(question.kind)
    assert len(kinds) == 13


def test_descriptions_are_long_and_say_what_is_there():
    for number, scene in enumerate([*SCENES, *(draw_scene(n, (2, 2)) for n in range(20))]):
        text = describe(scene, random.Random(number))
        assert count_words(text) >= LONG
        assert (
            f"{NUMBERS[len(scene.shapes)]} shapes" in text
            and scene.background in text
            and (scene.text is None or f'"{scene.text.text}"' in text)
        )
        for sentence in text.split(". "):
            for shape in scene.shapes:
                if "column" in sentence and "othing" not in sentence and cell_of(sentence.lower()) == shape.cell:
                    assert shape.colour in sentence and shape.shape in sentence and shape.size in sentence
            for first, side, second in re.findall(
                r"The (\w+ \w+) is directly (left of|right of|above|below) the (\w+ \w+)", sentence
            ):
                a, b = (next(s for s in scene.shapes if s.pair == pair) for pair in (first, second))
                assert (a.row - b.row, a.column - b.column) == DIRECTIONS[side]
