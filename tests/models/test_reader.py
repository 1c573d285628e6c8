"""Rows with pictures have the ids that a family's own processor gives, and cost one pass of it a picture."""

import json

import numpy as np
import pytest
import transformers as hf
from PIL import Image

from draftsmith.models.errors import UserError
from draftsmith.models.pictures import Reader, load_processor
from draftsmith.models.rendering import Renderer
from draftsmith.train.reference.pretrain import train_tokenizer

TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}"
    "{% for part in m.content %}{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def tokenizer_with(*markers: str):
    tokenizer = train_tokenizer(["What is this? A square."] * 4, 290)
    tokenizer.add_special_tokens({"additional_special_tokens": list(markers)})
    return tokenizer


def llava():
    side = {"height": 28, "width": 28}
    images = hf.CLIPImageProcessor(size=side, crop_size=side)
    options = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return hf.LlavaProcessor(images, tokenizer_with("<image>"), **options), "<image>\\n"


def llava_next():
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    options = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return hf.LlavaNextProcessor(images, tokenizer_with("<image>"), **options), "<image>\\n"


def idefics3():
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    markers = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *ROWS)
    return hf.Idefics3Processor(images, tokenizer_with(*markers), image_seq_len=4), "<image>"


def gemma3():
    names = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    tokenizer = tokenizer_with(*names.values())
    for name, token in names.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    images = hf.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return hf.Gemma3Processor(images, tokenizer, image_seq_length=4), "<start_of_image>"


@pytest.fixture(params=[llava, llava_next, idefics3, gemma3], ids=lambda make: make.__name__)
def processor(request):
    made, mark = request.param()
    made.chat_template = TEMPLATE.replace("MARK", f"{{{{ '{mark}' }}}}")
    return made


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


TALK = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "A square."},
    {"role": "user", "content": "And\n<image>\n"},
    {"role": "assistant", "content": "A."},
]


def test_the_ids_are_those_of_the_processor(processor):
    images = [picture(84, 56), picture(200, 300)]
    renderer, waiting = Renderer(Reader(processor)), iter(images)
    placed = renderer.reader.placed(TALK, images)
    ((ids, mask),) = renderer.encode(placed, None, {2}).rows
    seen = [
        m | {"content": [p | {"image": next(waiting)} if p["type"] == "image" else p for p in m["content"]]}
        for m in placed
    ]
    own = processor.apply_chat_template(seen, tokenize=True, return_dict=True)["input_ids"][0]
    assert ids == list(map(int, own))
    assert processor.tokenizer.decode([t for t, m in zip(ids, mask) if m]) == "A square.<|end|>A.<|end|>"
    assert ids[: len(renderer.prompt(placed[:1]))] == renderer.prompt(placed[:1])


class Counting:
    """An image processor that counts its calls."""

    def __init__(self, own):
        self.own, self.calls = own, 0

    def __call__(self, *given, **options):
        self.calls += 1
        return self.own(*given, **options)

    def __getattr__(self, name):
        return getattr(self.own, name)


def test_a_picture_is_processed_once_whatever_is_asked_about_it(processor):
    processor.image_processor = counting = Counting(processor.image_processor)
    renderer = Renderer(Reader(processor))
    asked = [{"role": "user", "content": f"What is this, {number}?"} for number in range(20)]
    talk = [TALK[0], TALK[1], *(m for question in asked for m in (question, TALK[1]))]
    ((_, mask),) = renderer.encode(renderer.reader.placed(talk, [picture(84, 56)]), None, {2}).rows
    assert counting.calls == 1 and sum(b > a for a, b in zip([0, *mask], mask)) == 21


def test_a_template_that_does_not_show_a_picture_is_refused(processor):
    processor.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    renderer = Renderer(Reader(processor))
    with pytest.raises(UserError, match="chat template: shows .* 0 times, expected it for 1 picture"):
        renderer.prompt(renderer.reader.placed(TALK[:1], [picture(84, 56)]))


def test_a_processor_whose_tokenizer_cuts_at_random_is_refused(tmp_path):
    processor, _ = llava()
    processor.save_pretrained(tmp_path)
    assert load_processor(tmp_path).tokenizer("a b")["input_ids"] == processor.tokenizer("a b")["input_ids"]
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["model"]["dropout"] = 0.5
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="found model.dropout 0.5 in tokenizer.json, expected none"):
        load_processor(tmp_path)
