"""Pictures on their way into decoding: suites in LLaVA's form, the target's own answers to them, and training on
those.
"""

import json

import pytest
import torch
from transformers import AutoProcessor

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.methods import Methods
from draftsmith.launch.regenerate import regenerate
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.pictures import load_reader, load_renderer
from draftsmith.models.targets import ImagePrompt, TextTarget
from draftsmith.train import data
from draftsmith.train.pictures import load_pictures
from tests.train.test_pictures import TALK, VOCAB, draw, place  # noqa: F401  (a fixture)


@pytest.fixture
def suite(tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 2)):
        draw(tmp_path / name, seed)
    talk = [*TALK, {"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A square."}]
    rows = [
        {"id": "one", "image": "a.png", "conversations": TALK},
        {"id": "two", "image": "b.png", "conversations": talk},
        {"id": "none", "conversations": [{"from": "human", "value": "What is this?"}]},
    ]
    (tmp_path / "suite.json").write_text(json.dumps(rows))
    return tmp_path / "suite.json"


def test_a_suite_with_pictures_makes_the_prompts_of_the_rows_of_training(place, suite, tmp_path):  # noqa: F811
    target = TextTarget.load(str(place))
    pictures = load_pictures(load_renderer(place, target), target, 64)
    rows = data.prepare(
        [str(suite)], 64, 0.5, pictures.processor.tokenizer, {2}, VOCAB, tmp_path / "rows", pictures=pictures
    )
    prompts = read_prompts(suite, load_reader(place, target))
    assert [p.name for p in prompts] == ["one", "two", "none"] and not isinstance(prompts[2].tokens, ImagePrompt)
    for number in (0, 1):
        want = pictures.prompt(rows.prompt(number), rows.images(number))
        assert prompts[number].tokens.tokens == want.tokens and torch.equal(
            prompts[number].tokens.images["pixel_values"], want.images["pixel_values"]
        )
    assert prompts[0].identity != prompts[1].identity  # the same ids, other pixels


def test_pictures_of_later_turns_wait_for_them(place, suite, tmp_path):  # noqa: F811
    ask = {"from": "human", "value": "<image>\nWhat is this?"}
    suite.write_text(json.dumps([{"images": ["a.png", "b.png"], "conversations": [ask, TALK[1], ask, TALK[1]]}]))
    prompts = Methods.open(["suffix"], str(place), "").prompts(str(suite), None, 8, 4, False, lambda line: None)
    assert [len(p.pictures) for p in prompts] == [1, 2] and [len(p.tokens.images["pixel_values"]) for p in prompts] == [
        1,
        2,
    ]
    suite.write_text(json.dumps([{"images": ["a.png", "b.png"], "conversations": TALK}]))
    with pytest.raises(
        UserError, match=r"suite.json row 1: found 1 <image> in the conversation and 2 pictures, expected as many"
    ):
        read_prompts(suite, load_reader(place, TextTarget.load(str(place))))


def test_answers_to_pictures_are_rows_for_training(place, suite, tmp_path):  # noqa: F811
    target, out = TextTarget.load(str(place)), tmp_path / "deep" / "answers.jsonl"
    regenerate(str(place), str(suite), str(out), [0.0], 12, 2, None, 0, lambda line: None)
    pictures, processor = load_pictures(load_renderer(place, target), target, 64), AutoProcessor.from_pretrained(place)
    stops = stop_ids(target, processor.tokenizer)
    rows = data.prepare([str(out)], 128, 0.0, processor.tokenizer, stops, VOCAB, tmp_path / "rows", pictures=pictures)
    said = []
    for number in (0, 1):
        tokens, mask = rows.row(number)
        prompt = pictures.prompt(rows.prompt(number), rows.images(number))
        assert rows.images(number) == [suite.parent / ("a.png", "b.png")[number]]
        (trace,) = generate(target, NoDrafter(), [prompt], Sampling(), 12, stops, [number])
        assert tokens[mask].tolist() == trace.tokens
        said.append(trace.tokens)
    assert rows.images(2) == rows.images(1) and rows.images(3) == []  # its second turn; no picture
    assert rows.conversations.tolist() == [0, 1, 1, 2]
    assert said[0] != said[1]  # a random target says other things of other pictures


def test_generate_of_the_library_is_refused_where_there_are_pictures(suite, place):  # noqa: F811
    methods = Methods.open(["plain", "hf-generate"], str(place), "")
    with pytest.raises(UserError, match="suite.json: found pictures, expected text alone for hf-generate"):
        methods.prompts(str(suite), 2, 8, 4, False, lambda line: None)
    assert len(Methods.open(["suffix"], str(place), "").prompts(str(suite), None, 8, 4, False, lambda line: None)) == 4


def test_a_target_of_text_refuses_a_suite_with_pictures(suite, place):  # noqa: F811
    with pytest.raises(UserError, match="suite.json row 1: found a picture, expected text alone"):
        read_prompts(suite, load_tokenizer(place))


def test_a_picture_that_is_not_there_is_named_with_its_row(suite, place):  # noqa: F811
    (suite.parent / "b.png").unlink()
    with pytest.raises(UserError, match=r"suite.json row 2: .*b.png: no such file, expected a picture"):
        read_prompts(suite, load_reader(place, TextTarget.load(str(place))))
