"""The bundled target that sees, and its drafters: it answers by what the picture shows, and decoding with a drafter
changes no text.
"""

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from draftsmith.eval.measurement.measure import decode_batches, tau
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.scenes import write_scenes
from draftsmith.models.chat import stop_ids
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.formats import load_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.pictures import load_reader
from draftsmith.models.targets import TextTarget, locate
from draftsmith.train.reference.pretrain_vision import right_answers, share
from draftsmith.train.reference.scene_texts import questions
from draftsmith.train.reference.scenes import scenes
from draftsmith.train.reference.vision_rows import Rows

NAME = "bundled:targets/shapes-vlm"
DRAFTERS = sorted(place.name for place in (Path(locate("bundled:targets")).parent / "drafters").glob("*-shapes*"))


def test_it_is_small_and_answers_by_what_it_sees():
    """More than chance would give on 16 held-out scenes: the same questions beside another scene's picture."""
    folder = Path(locate(NAME))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    rows, rng, drawn = (
        Rows(processor.tokenizer, processor.image_token_id),
        random.Random(0),
        list(islice(scenes(77, True, 0.03), 16)),
    )
    asked = [questions(scene, rng) for scene in drawn]
    seeing, blind = (
        share(right_answers(model, rows, drawn, shown, asked)) for shown in (drawn, [*drawn[1:], drawn[0]])
    )
    assert seeing > blind + 0.15


@pytest.fixture(scope="module")
def decoding(tmp_path_factory):
    """(target, stop ids, held-out prompts, their plain greedy texts)."""
    target = TextTarget.load(NAME)
    reader = load_reader(NAME, target)
    file = write_scenes(str(tmp_path_factory.mktemp("scenes") / "held-out"), 2, 5, held_out=True)
    prompts, stops = [p.tokens for p in read_prompts(file, reader)], stop_ids(target, reader)
    return target, stops, prompts, decode_batches(target, NoDrafter(), prompts, Sampling(), 96, stops, 4)


def test_there_are_drafters():
    assert DRAFTERS


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters_change_no_text(name, decoding):
    target, stops, prompts, plain = decoding
    head = load_drafter(f"bundled:drafters/{name}", target.shared, target.layers)
    found = decode_batches(target, HeadDrafter(head, parse_tree("dynamic:6x5x24")), prompts, Sampling(), 96, stops, 4)
    assert [t.tokens for t in found] == [t.tokens for t in plain] and tau(found) > 1.3
