"""The bundled target that sees: rows of many conversations, growth in depth, and its recipe from start to end at a tiny
size.
"""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from draftsmith.models.errors import UserError
from draftsmith.train.recipe import has_section, read_recipe
from draftsmith.train.reference.pretrain_vision import (
    VisionRecipe,
    deepen,
    first_model,
    hidden_states,
    majority,
    make_processor,
    pretrain_vision,
    right_answers,
)
from draftsmith.train.reference.scene_texts import Question, describe, questions
from draftsmith.train.reference.scenes import GRID, SHAPES, SLOTS, draw_scene, picture, scenes
from draftsmith.train.reference.vision_encoder import (
    FACTS,
    PATCHES,
    Probes,
    chosen,
    facts,
    pixels,
    train_vision_encoder,
)
from draftsmith.train.reference.vision_rows import Rows, talk
from tests.conftest import ROOT

RECIPE = ROOT / "recipes" / "targets" / "shapes-vlm.yaml"
SMALL = [
    "vision.hidden_size=16",
    "vision.intermediate_size=24",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.head_dim=8",
]


@pytest.fixture(scope="module")
def recipe():
    return read_recipe(RECIPE, VisionRecipe, SMALL)


@pytest.fixture(scope="module")
def processor(recipe):
    return make_processor(recipe)


@pytest.fixture
def model(recipe, processor):
    torch.manual_seed(0)
    model = first_model(recipe, processor.image_token_id).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_the_saved_processor_makes_the_rows_of_training(recipe, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded, scene = AutoProcessor.from_pretrained(tmp_path), draw_scene(1)
    asked, answer = "How many shapes are there?", "8"
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]},
        {"role": "assistant", "content": answer},
    ]
    made = loaded(text=loaded.apply_chat_template(messages), images=picture(scene), return_tensors="pt")
    batch = Rows(processor.tokenizer, processor.image_token_id).batch([scene], [[[Question("count", asked, answer)]]])
    assert torch.equal(made["input_ids"], batch.tokens) and torch.equal(made["pixel_values"], batch.images)
    assert (batch.tokens == processor.image_token_id).sum() == PATCHES == 256
    assert loaded.tokenizer.decode(batch.tokens[batch.said]) == "8<|end|>"
    assert (
        min(
            len(loaded.tokenizer(describe(s, random.Random(0)))["input_ids"]) for s in islice(scenes(0, True, 0.03), 20)
        )
        >= 200
    )


def test_conversations_of_a_row_see_the_picture_and_themselves_only(processor, model):
    rows, scene, rng = Rows(processor.tokenizer, processor.image_token_id), draw_scene(2), random.Random(0)
    listed = talk(scene, rng, 0.0)[:6]
    together = rows.batch([scene], [listed])
    with torch.no_grad():
        states = hidden_states(model, together)[0]
        for number, turns in enumerate(listed, 1):
            alone = rows.batch([scene], [[turns]])
            want = model.model(input_ids=alone.tokens, pixel_values=alone.images).last_hidden_state[0]
            assert (states[together.conversation[0] == number] - want[alone.conversation[0] == 1]).abs().max() < 1e-4


def test_rows_keep_to_their_length(processor):
    rows, scene, rng = Rows(processor.tokenizer, processor.image_token_id), draw_scene(2), random.Random(0)
    batch = rows.batch([scene], [talk(scene, rng, 1.0)], 640)
    assert batch.tokens.shape == batch.conversation.shape == (1, 640) and batch.said[0].sum() >= 200
    assert (batch.conversation[0] == -1).sum() < 40 and not batch.said[batch.conversation < 1].any()


def test_a_deeper_model_computes_the_same(processor, model):
    scene = draw_scene(3)
    batch = Rows(processor.tokenizer, processor.image_token_id).batch(
        [scene], [[[q] for q in questions(scene, random.Random(0))]]
    )
    with torch.no_grad():
        before = hidden_states(model, batch)
        grown = deepen(model, 8)
        assert (
            grown.config.text_config.num_hidden_layers == 8
            and (hidden_states(grown, batch) - before).abs().max() < 1e-5
        )


def test_right_answers_are_those_that_greedy_decoding_gives(processor, model):
    """A random model is asked for what it says itself, and for something else."""
    rows, scene, question = (
        Rows(processor.tokenizer, processor.image_token_id),
        draw_scene(4),
        "How many shapes are there?",
    )
    end, word = processor.tokenizer.convert_tokens_to_ids("<|end|>"), processor.tokenizer("red")["input_ids"]
    batch = rows.batch([scene], [[[Question("count", question, "red")]]])
    with torch.no_grad():
        states = hidden_states(model, batch)[0]
        before = int(batch.said[0].nonzero()[0]) - 1
        head = torch.zeros_like(model.lm_head.weight)
        wanted = [*word, end]  # an output head that says just this after just these states
        for k, token in enumerate(wanted):
            head[token] = torch.linalg.pinv(states[before : before + len(wanted)])[:, k]
        model.lm_head.weight = torch.nn.Parameter(head)  # no longer the input embedding
    prompt = processor(
        text=f"<|bos|><|user|><image>\n{question}<|end|><|assistant|>", images=picture(scene), return_tensors="pt"
    )
    said = model.generate(**prompt, max_new_tokens=len(wanted), do_sample=False, eos_token_id=None)[
        0, -len(wanted) :
    ].tolist()
    assert said == wanted
    for answer, right in (("red", True), ("blue", False), ("red circle", False)):
        assert right_answers(model, rows, [scene], [scene], [[Question("count", question, answer)]]) == [
            ("count", right)
        ]
    assert right_answers(model, rows, [scene], [None], [[Question("count", question, "red")]]) == [
        ("count", False)
    ]  # other pixels, other states


def test_facts_name_what_stands_in_every_slot():
    scene = draw_scene(5)
    found = facts(scene)
    assert found.shape[:2] == (GRID * SLOTS,) * 2 and (found[..., -3] == 0).sum() == len(scene.shapes) + (
        scene.text is not None
    )
    for shape in scene.shapes:
        x, y = (c // 20 for c in shape.centre)
        assert SHAPES[found[y, x, 0]] == shape.shape and found[y, x, -2:].tolist() == list(shape.cell)


def test_few_patches_hold_all_that_a_scene_holds(processor, model):
    """And at all patches the rows are those of the model's own forward."""
    rows, scene = Rows(processor.tokenizer, processor.image_token_id), draw_scene(5)
    full = (facts(scene)[..., list(FACTS).index("empty")] == 0).flatten().nonzero().flatten()
    for count in (16, 64, PATCHES):
        places = chosen(scene, count)
        assert len(places) == count and set(full.tolist()) <= set(places.tolist()) and places.diff().min() > 0
    batch = rows.batch([scene], [[[Question("count", "How many shapes are there?", "8")]]], patches=16)
    assert (batch.tokens == processor.image_token_id).sum() == 16 and hidden_states(model, batch).shape[
        :2
    ] == batch.tokens.shape


def test_the_trained_vision_encoder_hands_on_features_of_mean_square_one(recipe, processor, model):
    lines, rng = [], torch.random.get_rng_state()
    torch.manual_seed(0)
    train_vision_encoder(
        model,
        recipe.vision_encoder.model_copy(update={"pictures": 6, "batch": 3}),
        recipe.optimizer,
        scenes(0, False, 0.03),
        lines.append,
    )
    torch.random.set_rng_state(rng)
    drawn = list(islice(scenes(0, False, 0.03), 6))[3:]
    assert abs(Probes(model).features(pixels([picture(s) for s in drawn])).square().mean() - 1) < 1e-3


def test_the_majority_answer_knows_the_kind_of_a_question_alone():
    q = lambda kind, answer: Question(kind, "?", answer)  # noqa: E731
    assert (
        majority(
            [[q("a", "1"), q("a", "2")], [q("b", "1"), q("c", "1")]],
            iter([[q("a", "1"), q("a", "1"), q("a", "2"), q("b", "2")]]),
        )
        == 0.25
    )


def test_a_tiny_run_goes_to_its_end_and_one_that_was_killed_to_the_same(tmp_path):
    changes = [
        *SMALL,
        "vision_encoder.pictures=4",
        "vision_encoder.batch=2",
        "evaluation=2",
        "save_minutes=0.000001",
        "stages=[{layers: 1, shapes: [2, 3], descriptions: 0.5, length: 580, batch: 2, rows: 4}, "
        "{layers: 2, shapes: [5, 9], descriptions: 1.0, length: 580, batch: 2, rows: 4}]",
    ]
    place = pretrain_vision(
        read_recipe(RECIPE, VisionRecipe, [*changes, f"output={tmp_path / 'whole'}"]), lambda line: None
    )
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.bfloat16),
        AutoProcessor.from_pretrained(place),
    )
    assert model.config.text_config.num_hidden_layers == 2 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    figures = json.loads((place / "training.json").read_text())
    assert {
        "accuracy",
        "blind_majority_answer",
        "blind_other_picture",
        "blind_grey_picture",
    } <= figures.keys() and figures["rows"] == 8
    assert processor.tokenizer.chat_template and not (place / "checkpoint").exists()
    with pytest.raises(UserError, match="exists; expected a new place"):
        pretrain_vision(read_recipe(RECIPE, VisionRecipe, [*changes, f"output={place}"]))

    def die(line):
        if line.startswith("{"):
            seen.append(line)
            if len(seen) == 4:  # three snapshots are complete
                raise KeyboardInterrupt

    seen, killed = [], read_recipe(RECIPE, VisionRecipe, [*changes, f"output={tmp_path / 'killed'}"])
    with pytest.raises(KeyboardInterrupt):
        pretrain_vision(killed, die)
    early = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "killed.partial" / "checkpoint", dtype=torch.bfloat16
    )
    towers = zip(early.model.vision_tower.parameters(), model.model.vision_tower.parameters())
    assert all(torch.equal(a, b) for a, b in towers)  # frozen once it has learnt to read
    resumed = LlavaForConditionalGeneration.from_pretrained(
        pretrain_vision(killed, lambda line: None), dtype=torch.bfloat16
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))


def test_recipes_are_told_apart_and_checked():
    assert (
        has_section(RECIPE, "vision")
        and not has_section(RECIPE.with_name("code.yaml"), "vision")
        and not has_section(Path("none.yaml"), "vision")
    )
    assert read_recipe(RECIPE, VisionRecipe).stages[-1].layers >= 7
    with pytest.raises(UserError, match="found length 300, expected at least 576"):
        read_recipe(
            RECIPE,
            VisionRecipe,
            ["stages=[{layers: 1, shapes: [2, 3], descriptions: 0.5, length: 300, batch: 2, rows: 4}]"],
        )
