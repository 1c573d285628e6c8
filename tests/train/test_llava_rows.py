"""Rows with pictures: LLaVA-format JSON and data sets with image columns, their token masks, and one clear line for
everything that can be wrong.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from draftsmith.launch.scenes import write_scenes
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import Reader
from draftsmith.models.rendering import Renderer
from draftsmith.train import data
from draftsmith.train.pictures import Pictures
from draftsmith.train.recipe import read_recipe
from draftsmith.train.reference.pretrain_vision import PATCHES, VisionRecipe, first_model, make_processor
from draftsmith.train.reference.scenes import draw_scene, picture
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def recipe():
    return read_recipe(
        ROOT / "recipes" / "targets" / "shapes-vlm.yaml",
        VisionRecipe,
        [
            "vision.hidden_size=16",
            "vision.intermediate_size=24",
            "model.hidden_size=32",
            "model.intermediate_size=48",
            "model.head_dim=8",
        ],
    )


@pytest.fixture(scope="module")
def processor(recipe):
    return make_processor(recipe)


@pytest.fixture(scope="module")
def pictures(processor):
    return Pictures(Renderer(Reader(processor)), processor.image_token_id, 400_000)


@pytest.fixture
def llava(tmp_path):
    return write_scenes(str(tmp_path / "scenes"), 3, 0, held_out=False)


def read(file, processor, pictures, folder, max_length=1024, max_bad_rows=0.0, report=print):
    return data.prepare(
        [str(file)], max_length, max_bad_rows, processor.tokenizer, {2}, 768, folder / "rows", report, pictures
    )


def test_llava_rows_are_what_the_processor_makes_of_them(llava, tmp_path, processor, pictures):
    rows, records = read(llava, processor, pictures, tmp_path), json.loads(llava.read_text())
    assert len(rows) == 6
    for number, record in enumerate(records):
        tokens, mask = rows.row(number)
        asked = [turn["value"] for turn in record["conversations"][::2]]
        said = [turn["value"] for turn in record["conversations"][1::2]]
        text = "<|bos|>" + "".join(f"<|user|>{q}<|end|><|assistant|>{a}<|end|>" for q, a in zip(asked, said))
        image = Image.open(llava.parent / record["image"])
        assert tokens.tolist() == processor(text=text, images=image, return_tensors="pt")["input_ids"][0].tolist()
        assert processor.tokenizer.decode(tokens[mask]) == "".join(f"{a}<|end|>" for a in said)
        assert (tokens == processor.image_token_id).sum() == PATCHES >= 256 and not mask[
            tokens == processor.image_token_id
        ].any()
        assert rows.images(number) == [(llava.parent / record["image"]).resolve()]
        assert pictures.load(rows.images(number)[0]).tobytes() == image.convert("RGB").tobytes()
    assert all(rows.row(n)[1].sum() >= 200 for n in (0, 2, 4))  # descriptions


def test_the_mask_is_the_same_without_generation_blocks(llava, tmp_path, processor, pictures):
    want = [rows.tolist() for rows in read(llava, processor, pictures, tmp_path / "a").row(1)]
    kept = processor.chat_template
    try:
        processor.chat_template = kept.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert [rows.tolist() for rows in read(llava, processor, pictures, tmp_path / "b").row(1)] == want
    finally:
        processor.chat_template = kept


def test_image_columns_of_datasets_hold_the_pictures(llava, tmp_path, processor, pictures):
    import datasets

    records = json.loads(llava.read_text())
    images = [
        Image.open(llava.parent / r["image"]).copy() for r in records
    ]  # without their file: the data set stores what it encodes
    talks = [r["conversations"] for r in records]
    messages = [
        [{"role": "user" if t["from"] == "human" else "assistant", "content": t["value"]} for t in talk]
        for talk in talks
    ]
    want = read(llava, processor, pictures, tmp_path / "want")
    for name, columns in {
        "one": {"image": images, "conversations": talks},
        "list": {"images": [[i] for i in images], "messages": messages},
    }.items():
        features = datasets.Dataset.from_dict(columns | ({"images": columns["images"]} if name == "list" else {}))
        kind = datasets.List(datasets.Image()) if name == "list" else datasets.Image()
        features.cast_column(next(iter(columns)), kind).to_parquet(str(tmp_path / f"{name}.parquet"))
        rows = read(tmp_path / f"{name}.parquet", processor, pictures, tmp_path / name)
        assert [r.tolist() for n in range(6) for r in rows.row(n)] == [
            r.tolist() for n in range(6) for r in want.row(n)
        ]
        for number, image in enumerate(images):
            (place,) = rows.images(number)
            assert place.parent == rows.folder / "pictures" and pictures.load(place).tobytes() == image.tobytes()


def test_several_pictures_stand_where_their_marks_are(llava, tmp_path, processor, pictures):
    record = {
        "image": ["pictures/000000.png", "pictures/000001.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nHow many shapes are there?\n<image>"},
            {"from": "gpt", "value": "7"},
        ],
    }
    file = llava.parent / "two.json"
    file.write_text(json.dumps([record]))
    rows = read(file, processor, pictures, tmp_path)
    assert [place.name for place in rows.images(0)] == ["000000.png", "000001.png"]
    assert (rows.row(0)[0] == processor.image_token_id).sum() == 2 * PATCHES


def test_text_rows_keep_their_tokens_and_their_key(folder, tmp_path, tokenizer, processor, pictures):
    text = data.prepare([str(folder / "rows.jsonl")], 64, 0.0, tokenizer, {2}, 300, tmp_path / "a")
    assert {p.name for p in text.folder.iterdir()} == {
        "conversations.npy",
        "notes.json",
        "temperatures.json",
        "laws.json",
        "tokens.bin",
        "mask.bin",
        "borders.npy",
        "counts.npy",
    } and text.images(0) == []
    plain = data.prepare([str(folder / "rows.jsonl")], 256, 0.0, processor.tokenizer, {2}, 768, tmp_path / "b")
    seeing = read(folder / "rows.jsonl", processor, pictures, tmp_path / "c", max_length=256)
    assert (
        np.array_equal(plain.tokens, seeing.tokens)
        and np.array_equal(plain.mask, seeing.mask)
        and seeing.images(3) == []
        and plain.key != seeing.key
    )


TURNS = [{"from": "human", "value": "<image>\nHow many shapes are there?"}, {"from": "gpt", "value": "7"}]


def image_file(kind, folder):
    place = folder / f"{kind}.png"
    if kind == "corrupt":
        whole = folder / "whole.png"
        picture(draw_scene(0)).save(whole)
        place.write_bytes(whole.read_bytes()[:400])
    elif kind == "not a picture":
        place.write_text("hello")
    elif kind == "huge":
        Image.new("1", (1000, 1000)).save(place)
    elif kind == "good":
        picture(draw_scene(0)).save(place)
    return place.name


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("missing", {}, r"rows.json row 2: .*missing.png: no such file, expected a picture"),
        ("corrupt", {}, r"rows.json row 2: .*corrupt.png: the picture cannot be decoded \("),
        ("not a picture", {}, r"rows.json row 2: .*not a picture.png: found no picture in it, expected PNG, JPEG"),
        (
            "huge",
            {},
            r"rows.json row 2: .*huge.png: found 1000 x 1000 pixels, "
            r"expected at most 400,000 in all \(data.max_image_pixels\)",
        ),
        (
            "good",
            {"conversations": [{"from": "human", "value": "How many?"}, TURNS[1]]},
            r"rows.json row 2: found 0 <image> in the conversation and 1 picture, expected as many",
        ),
        (
            "good",
            {"conversations": [TURNS[0], TURNS[1], *TURNS]},
            r"row 2: found 2 <image> in the conversation and 1 picture, expected as many",
        ),
        ("good", {"image": None}, r"row 2: found 1 <image> in the conversation and 0 pictures, expected as many"),
        ("good", {"image": 7}, r"row 2: image: found int, expected a file name or a picture"),
        (
            "good",
            {"conversations": None, "tokens": [1, 3, *[767] * 255, 9, 9, 9], "prompt_length": 257},
            r"row 2: found 255 image tokens, expected 256 for 1 picture",
        ),
        (
            "good",
            {"conversations": None, "text": "no <image> here"},
            r"row 2: found 1 image tokens, expected 256 for 1 picture",
        ),
        (
            "good",
            {"conversations": [{"from": "human", "value": "Describe. " * 100 + "<image>"}, TURNS[1]]},
            r"row 2: found \d+ of 256 image tokens within data.max_length 300, expected all of them",
        ),
    ],
)
def test_bad_pictures_are_one_line_with_the_row(kind, change, message, tmp_path, processor, pictures):
    good = {"image": image_file("good", tmp_path), "conversations": TURNS}
    (tmp_path / "rows.json").write_text(
        json.dumps([good, {"image": image_file(kind, tmp_path), "conversations": TURNS} | change])
    )
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / "rows.json", processor, pictures, tmp_path, max_length=300)
    assert "\n" not in str(raised.value)
    said = []
    assert (
        len(
            read(
                tmp_path / "rows.json",
                processor,
                pictures,
                tmp_path,
                max_length=300,
                max_bad_rows=0.5,
                report=said.append,
            )
        )
        == 1
    )
    assert "1 of 2 rows cannot be used and are left out" in said[0]


def test_a_corrupt_picture_inside_a_data_set_is_its_rows_error(tmp_path, processor, pictures):
    import datasets

    picture(draw_scene(0)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    images = [{"bytes": whole, "path": None}, {"bytes": whole[:300], "path": None}]
    rows = datasets.Dataset.from_dict({"image": images, "conversations": [TURNS, TURNS]})
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "p.parquet"))
    with pytest.raises(UserError, match=r"p.parquet row 2: picture 1 of the row: the picture cannot be decoded"):
        read(tmp_path / "p.parquet", processor, pictures, tmp_path)


def test_a_target_that_does_not_see_refuses_rows_with_pictures(llava, tmp_path, processor):
    with pytest.raises(UserError, match="row 1: found a picture, expected text alone: this target does not see"):
        read(llava, processor, None, tmp_path)


def test_pixels_change_the_features_behind_the_picture_and_only_those(llava, tmp_path, recipe, processor, pictures):
    rows = read(llava, processor, pictures, tmp_path)
    torch.manual_seed(0)
    model = first_model(recipe, processor.image_token_id).eval()
    tokens = torch.from_numpy(rows.row(1)[0].astype(np.int64))[None]

    @torch.no_grad()
    def features(image):
        return model(
            input_ids=tokens,
            pixel_values=processor.image_processor(image, return_tensors="pt")["pixel_values"],
            output_hidden_states=True,
        ).hidden_states[-1][0]

    own, again, other = (features(pictures.load(rows.images(n)[0])) for n in (1, 1, 2))
    first, last = (tokens[0] == processor.image_token_id).nonzero().flatten()[[0, -1]].tolist()
    assert torch.equal(own, again) and torch.equal(own[:first], other[:first])
    moved = (own[last + 1 :] - other[last + 1 :]).abs().amax(-1)
    assert len(moved) > 20 and moved.min() > 1e-6, moved.min()
