"""Pictures on their way from files to features: what is refused, with which line, and that the target does see them."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from draftsmith.launch.inspect import inspect
from draftsmith.launch.training import main
from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.heads import HEADS, DreamConfig
from draftsmith.models.pictures import load_renderer
from draftsmith.models.targets import ImagePrompt, TextTarget, describe
from draftsmith.train import data
from draftsmith.train.features import Cached, Online
from draftsmith.train.pictures import answers_apart, cut_for, load_pictures, whole
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import ROOT
from tests.tiny_vision import draw, saved_llava

SPEC, VOCAB = FeatureSpec((0, 2)), 320
TALK = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A square."}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A LLaVA with its processor: a picture takes four tokens."""
    return saved_llava(tmp_path_factory.mktemp("llava"), VOCAB)


def rows_of(records, place, folder, max_length=64, max_pixels=64, cut=whole):
    """(rows, pictures) of a LLaVA-format file in `folder`."""
    described = describe(place)
    pictures = load_pictures(load_renderer(place, described), described, max_pixels, cut)
    (folder / "data.json").write_text(json.dumps(records))
    rows = data.prepare(
        [str(folder / "data.json")],
        max_length,
        0.0,
        pictures.processor.tokenizer,
        {2},
        VOCAB,
        folder / "rows",
        pictures=pictures,
    )
    return rows, pictures


def test_pixels_change_the_features(place, tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 2), ("c.png", 1)):
        draw(tmp_path / name, seed)
    rows, pictures = rows_of(
        [{"image": name, "conversations": TALK} for name in ("a.png", "b.png", "c.png")], place, tmp_path
    )
    tokens, _ = rows.pack([0])
    assert int((tokens == pictures.image_token).sum()) == 4 and all(
        rows.row(0)[0].tolist() == rows.row(n)[0].tolist() for n in (1, 2)
    )
    assert [[path.name for path in rows.images(n)] for n in range(3)] == [["a.png"], ["b.png"], ["c.png"]]
    target = TextTarget.load(place, device="cpu")
    first, other, same = (Online(target, rows, SPEC, pictures)([n]) for n in range(3))
    assert torch.equal(first.hidden, same.hidden) and torch.equal(first.teacher.final, same.teacher.final)
    assert not torch.allclose(first.hidden, other.hidden, atol=1e-4) and not torch.allclose(
        first.teacher.final, other.teacher.final, atol=1e-4
    )
    seen = tokens == pictures.image_token
    assert torch.equal(
        first.hidden[: int(seen.nonzero()[0])], other.hidden[: int(seen.nonzero()[0])]
    )  # what stands before sees no picture
    both = Online(target, rows, SPEC, pictures)([1, 0])  # each document with its own
    assert torch.allclose(both.hidden, torch.cat([other.hidden, first.hidden]), atol=1e-5)


def test_a_prompt_has_the_pictures_that_stand_in_it(place, tmp_path):
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "b.png", 2)
    rows, pictures = rows_of([{"image": ["a.png", "b.png"], "conversations": TALK * 2}], place, tmp_path)
    prompt = pictures.prompt(rows.prompt(0), rows.images(0))
    assert isinstance(prompt, ImagePrompt) and torch.equal(
        prompt.images["pixel_values"], pictures.pixels(rows.images(0)[:1])["pixel_values"]
    )
    assert pictures.pixels(rows.images(0))["pixel_values"].shape == (2, 3, 8, 8) and pictures.prompt(
        [3, 4], rows.images(0)
    ) == [3, 4]


def test_bad_pictures_are_one_line_with_file_and_row(place, tmp_path):
    draw(tmp_path / "good.png", 1)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:80])
    Image.new("RGB", (9, 8)).save(tmp_path / "large.png")
    good = {"image": "good.png", "conversations": TALK}
    for record, said in (
        (good | {"image": "gone.png"}, r"gone\.png: no such file, expected a picture"),
        (good | {"image": "text.png"}, r"text\.png: found no picture in it"),
        (good | {"image": "cut.png"}, r"cut\.png: the picture cannot be decoded"),
        (
            good | {"image": "large.png"},
            r"large\.png: found 9 x 8 pixels, expected at most 64 in all \(data\.max_image_pixels\)",
        ),
        (good | {"image": ["good.png", "good.png"]}, r"found 1 <image> in the conversation and 2 pictures"),
        ({"conversations": TALK}, r"found 1 <image> in the conversation and 0 pictures"),
        (
            {"tokens": [3, 4, 5, 6], "prompt_length": 1, "image": "good.png"},
            r"found 0 image tokens, expected 4 for 1 picture",
        ),
    ):
        with pytest.raises(
            UserError, match=rf"data\.json: found 1 of 2 rows .* the first: \S*data\.json row 2: .*{said}"
        ) as found:
            rows_of([good, record], place, tmp_path)
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match=r"found \d of 4 image tokens within data\.max_length 4, expected all of them"):
        rows_of([good], place, tmp_path, max_length=4)


def test_rows_with_pictures_want_a_target_that_sees_and_no_cache(place, tmp_path):
    draw(tmp_path / "a.png", 1)
    rows, pictures = rows_of([{"image": "a.png", "conversations": TALK}], place, tmp_path)
    target = TextTarget.load(place, device="cpu")
    with pytest.raises(UserError, match="found rows with pictures, expected text alone"):
        Online(target, rows, SPEC)
    with pytest.raises(UserError, match="data.features: found cached, expected online for rows with pictures"):
        Cached(target, rows, SPEC, tmp_path / "features", 0)
    with pytest.raises(UserError, match="row 1: found a picture, expected text alone: this target does not see"):
        data.prepare(
            [str(tmp_path / "data.json")], 64, 0.0, pictures.processor.tokenizer, {2}, VOCAB, tmp_path / "blind"
        )


def test_text_for_a_target_that_sees_makes_the_rows_that_it_makes_for_any(place, tmp_path):
    rows, pictures = rows_of([{"text": "What is this?"}], place, tmp_path)
    blind = data.prepare(
        [str(tmp_path / "data.json")], 64, 0.0, pictures.processor.tokenizer, {2}, VOCAB, tmp_path / "blind"
    )
    assert (
        np.array_equal(rows.tokens, blind.tokens)
        and np.array_equal(rows.mask, blind.mask)
        and not rows.seen
        and not blind.seen
    )
    target = TextTarget.load(place, device="cpu")
    assert torch.equal(Online(target, rows, SPEC, pictures)([0]).hidden, Online(target, blind, SPEC)([0]).hidden)


THREE = [
    *TALK,
    {"from": "human", "value": "What?"},
    {"from": "gpt", "value": "A circle, this."},
    *TALK,
]  # pictures in the first and the last turn


def test_a_conversation_becomes_a_row_an_answer(place, tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 2)):
        draw(tmp_path / name, seed)
    records = [
        {"image": "b.png", "conversations": TALK},
        {"image": ["a.png", "b.png"], "conversations": THREE},
        {"conversations": THREE[2:4] * 2},
        {"text": "What is this?"},
    ]
    long, pictures = rows_of(records, place, tmp_path, 128)
    rows, _ = rows_of(records, place, tmp_path, 128, cut=answers_apart)
    decode = pictures.processor.tokenizer.decode
    assert (
        len(rows) == 6
        and rows.conversations.tolist() == [0, 1, 1, 1, 2, 3]
        and long.conversations.tolist() == [0, 1, 2, 3]
    )
    for mine, its in ((0, 0), (4, 2), (5, 3)):  # one answer; text with two answers; text alone
        assert all(np.array_equal(a, b) for a, b in zip(rows.row(mine), long.row(its))) and rows.images(
            mine
        ) == long.images(its)
    tokens, mask = long.row(1)
    ends = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
    assert len(ends) == 3 and ends[-1] == len(tokens)
    for number, (end, answer, names) in enumerate(
        zip(ends, THREE[1::2], (["a.png"], ["a.png"], ["a.png", "b.png"])), 1
    ):
        cut, supervised = rows.row(number)
        assert (
            np.array_equal(cut, tokens[:end])
            and supervised[-1]
            and decode(cut[supervised]) == f"{answer['value']}<|end|>"
        )
        assert np.flatnonzero(supervised).tolist() == list(range(end - supervised.sum(), end))  # one run
        assert [picture.name for picture in rows.images(number)] == names and (
            cut == pictures.image_token
        ).sum() == 4 * len(names)
        assert rows.prompt(number) == tokens[: end - supervised.sum()].tolist()
    assert torch.equal(rows.counts, long.counts) and rows.key != long.key  # every answer is supervised once


def test_a_row_an_answer_ends_with_it_and_at_the_longest_length(place, tmp_path):
    assert answers_apart([3, 9, 4, 5, 6, 9, 7, 8, 6], [0, 0, 0, 1, 0, 0, 1, 1, 0], ["a", "b"], [2, 6]) == [
        ([3, 9, 4, 5], [0, 0, 0, 1], ["a"]),
        ([3, 9, 4, 5, 6, 9, 7, 8], [0, 0, 0, 0, 0, 0, 1, 1], ["a", "b"]),
    ]
    draw(tmp_path / "a.png", 1)
    records = [{"image": "a.png", "conversations": THREE[:4]}]
    rows, _ = rows_of(records, place, tmp_path, cut=answers_apart)
    first, second = rows.lengths.tolist()
    shorter, _ = rows_of(records, place, tmp_path, second - 1, cut=answers_apart)
    assert shorter.lengths.tolist() == [first, second - 1]
    assert (
        len(rows_of(records, place, tmp_path, first + 1, cut=answers_apart)[0]) == 1
    )  # the second answer begins behind it


def test_only_heads_that_choose_by_columns_have_a_row_an_answer(place):
    config = describe(place).config
    for name, kind in HEADS.items():
        assert cut_for(kind.Config.for_target(config)) is (answers_apart if name == "dream" else whole), name
    assert cut_for(DreamConfig.for_target(config, keep_ratio=1.0)) is whole


def test_a_run_of_dream_learns_from_a_row_an_answer_and_measures_a_conversation_once(place, tmp_path, capsys):
    draw(tmp_path / "a.png", 1)
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": THREE[:4]}] * 4))
    changes = [
        f"target={place}",
        f"data.files=[{tmp_path / 'data.json'}]",
        f"output={tmp_path / 'run'}",
        "data.max_length=64",
        "data.max_image_pixels=64",
        "optimization.batch_tokens=64",
        "optimization.accumulation=1",
        "optimization.epochs=1",
        "engine.zero_stage=0",
        "engine.dtype=fp32",
        "engine.config=null",
        "evaluation.rows=1",
        "evaluation.times=1",
        "evaluation.max_new_tokens=4",
        "evaluation.tree=chain:2",
        "wandb=null",
    ]
    recipe = str(ROOT / "recipes" / "dream-llava-1.5-7b.yaml")
    for ratio, rows in (("0.75", 8), ("1", 4)):
        console = Console(width=200, file=io.StringIO())
        inspect(read_recipe(recipe, DrafterRecipe, [*changes, f"head.keep_ratio={ratio}"]), 0, console)
        assert console.file.getvalue().startswith(f"{rows} rows")
    capsys.readouterr()
    assert main([recipe, *changes]) == 0
    said = capsys.readouterr().out
    assert "6 rows, " in said and "on 1 held-out prompts" in said, said
