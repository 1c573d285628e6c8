"""Scenes: seeded, split by content, and drawn as they say."""

import json
import random
from itertools import islice

import pytest
from PIL import Image

from draftsmith.launch.scenes import write_scenes
from draftsmith.models.errors import UserError
from draftsmith.train.reference.scene_texts import describe, questions
from draftsmith.train.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    GRID,
    SHAPES,
    SIDE,
    SIZES,
    SLOT,
    WORDS,
    Shape,
    Text,
    draw_scene,
    is_held_out,
    picture,
    scenes,
)
from tests.train.reference.test_scene_texts import SCENES, answer


def test_a_seed_gives_the_same_scene_picture_questions_and_text():
    for n in range(5):
        scene = draw_scene(n)
        assert (
            scene == SCENES[n]
            and scene.digest == SCENES[n].digest
            and picture(scene).tobytes() == picture(SCENES[n]).tobytes()
        )
        assert questions(scene, random.Random(n)) == questions(scene, random.Random(n)) and describe(
            scene, random.Random(n)
        ) == describe(scene, random.Random(n)) != describe(scene, random.Random(n + 1))
    assert len({scene.digest for scene in SCENES}) == len(SCENES)
    assert draw_scene(0).digest.startswith("6ea7ca7fafaa08f9")  # on every machine


def test_splits_are_disjoint_by_content_and_of_their_share():
    held, train = ({s.digest for s in islice(scenes(0, which, 0.2), 200)} for which in (True, False))
    assert len(held) == len(train) == 200 and not held & train
    assert all(is_held_out(s, 0.2) for s in islice(scenes(3, True, 0.2), 20))
    assert abs(sum(is_held_out(draw_scene(n), 0.2) for n in range(2000)) / 2000 - 0.2) < 0.04


def test_a_scene_is_what_it_promises():
    for scene in SCENES:
        items = [*scene.shapes, *([scene.text] if scene.text else [])]
        assert 5 <= len(scene.shapes) <= 9 and len({item.cell for item in items}) == len(items)
        assert [s.cell for s in scene.shapes] == sorted(s.cell for s in scene.shapes)
        assert scene.text is None or scene.text.text in WORDS or 10 <= int(scene.text.text) <= 99
    assert {len(s.shapes) for s in SCENES} == {5, 6, 7, 8, 9} and 0 < sum(s.text is None for s in SCENES) < 30


def box(shape, image):
    """Left, top, right, bottom of the pixels that have the shape's colour in its slot."""
    x, y = shape.centre[0] // SLOT * SLOT, shape.centre[1] // SLOT * SLOT
    found = [
        (i, j)
        for i in range(x, x + SLOT)
        for j in range(y, y + SLOT)
        if image.getpixel((i, j)) == COLOURS[shape.colour]
    ]
    return min(i for i, _ in found), min(j for _, j in found), max(i for i, _ in found), max(j for _, j in found)


def test_pixels_show_colour_size_place_and_background():
    for scene in SCENES:
        image, inked = picture(scene), 0
        for shape in scene.shapes:
            assert image.getpixel(shape.centre) == COLOURS[shape.colour]
            left, top, right, bottom = box(shape, image)
            radius = SIZES[shape.size]
            assert (
                abs(bottom - top + 1 - (2 * radius + 1)) <= 2
                and left >= shape.centre[0] - radius
                and right <= shape.centre[0] + radius
            ), shape
            assert shape.cell == (shape.centre[1] // (SIDE // GRID), shape.centre[0] // (SIDE // GRID))
        for x in range(0, SIDE, SLOT):  # nothing leaves its slot: as many slots are inked as there are things
            for y in range(0, SIDE, SLOT):
                colours = image.crop((x, y, x + SLOT, y + SLOT)).getcolors()
                inked += len(colours) > 1
                assert any(colour == BACKGROUNDS[scene.background] for _, colour in colours)
        assert inked == len(scene.shapes) + (scene.text is not None)


def test_every_shape_and_every_text_looks_different():
    looks = {
        picture(SCENES[0].__class__("white", (Shape(0, 0, (0, 0), (0, 0), shape, "red", size),), None)).tobytes()
        for shape in SHAPES
        for size in SIZES
    }
    assert len(looks) == len(SHAPES) * len(SIZES)
    texts = [*WORDS, *map(str, range(10, 100))]
    assert len(
        {picture(SCENES[0].__class__("black", (), Text(1, 1, (0, 0), (0, 0), text))).tobytes() for text in texts}
    ) == len(texts)


def test_scenes_are_written_as_llava_json(tmp_path):
    place = write_scenes(str(tmp_path / "out"), 3, 0, held_out=True)
    rows = json.loads(place.read_text())
    assert len(rows) == 6 and all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows)
    assert all(sum(turn["value"].count("<image>") for turn in row["conversations"]) == 1 for row in rows)
    scene = next(scenes(1000, True, 0.03))
    assert Image.open(place.parent / rows[0]["image"]).tobytes() == picture(scene).tobytes()
    said = [turn["value"].removeprefix("<image>\n") for turn in rows[1]["conversations"]]
    assert all(told == answer(scene, asked) for asked, told in zip(said[::2], said[1::2]))
    with pytest.raises(UserError, match="exists; expected a new place"):
        write_scenes(str(tmp_path / "out"), 3, 0, held_out=True)
