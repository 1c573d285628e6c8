"""Tiny random vision-language models of every supported family, and pictures as their processors would give them. fp32,
seeded.

States are of order one, so that rounding stays near 1e-5; norms, biases and the like are moved off their ones and
zeros. Every picture makes four tokens, the wide one of Qwen eight, those of LLaVA-1.6 fourteen: themselves, and two
tiles of two rows with a mark at the end of each.
"""

from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image
from transformers import AutoModelForImageTextToText

from draftsmith.models.targets import TextTarget
from draftsmith.train.reference import pretrain_vision
from draftsmith.train.reference.pretrain import train_tokenizer

IMAGE, START, END = 50, 51, 52  # token ids: a visual token, and Qwen's markers around them
TEXT = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.15,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION_ENCODER = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=4,
    initializer_range=0.15,
)
CONFIGS = {
    "llava": lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**VISION_ENCODER, image_size=8, projection_dim=16),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ),
    "llava_next": lambda: hf.LlavaNextConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**VISION_ENCODER, image_size=8, projection_dim=16),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        text_config=dict(
            TEXT, rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
        ),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=53,
    ),
    "idefics3": lambda: hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=dict(VISION_ENCODER, image_size=16),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=dict(VISION_ENCODER, image_size=16),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    ),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=dict(
            TEXT,
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=24,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        ),
        vision_config=dict(VISION_ENCODER, image_size=16),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    ),
}


def tiny_model(family: str):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    decoder = {id(p) for p in [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.3, 0.3)
            elif id(parameter) not in decoder:
                parameter.normal_(
                    std=0.3
                )  # families start some of them at zero, or so small that pictures hardly matter
    return model


def tiny_vision(family: str) -> TextTarget:
    return TextTarget(tiny_model(family), family)


def pictures(family: str, count: int, seed: int = 0, wide: bool = False) -> dict[str, torch.Tensor]:
    """What the processor of a family gives beside ids and masks for a prompt of `count` pictures."""
    draw = torch.Generator().manual_seed(seed)
    if count == 0:
        return {}
    if family == "qwen2_5_vl":
        width = 8 if wide else 4
        return {
            "pixel_values": torch.randn(count * 4 * width, 3 * 2 * 4 * 4, generator=draw),
            "image_grid_thw": torch.tensor([[1, 4, width]] * count),
        }
    if family in ("idefics3", "smolvlm"):
        mask = torch.ones(1, count, 16, 16, dtype=torch.int64)
        mask[:, 0, :, 12:] = 0  # the first is narrow, and padded
        return {"pixel_values": torch.randn(1, count, 3, 16, 16, generator=draw), "pixel_attention_mask": mask}
    if family == "llava_next":
        return {
            "pixel_values": torch.randn(count, 3, 3, 8, 8, generator=draw),
            "image_sizes": torch.tensor([[8, 16]] * count),
        }
    size = 8 if family == "llava" else 16
    return {"pixel_values": torch.randn(count, 3, size, size, generator=draw)}


def document(
    family: str, lengths: list[int], seed: int = 0, wide: bool = False
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """(ids, pictures): runs of text of these lengths with a picture between each two."""
    draw = torch.Generator().manual_seed(seed + 100)
    run = [IMAGE] * (8 if wide and family == "qwen2_5_vl" else 14 if family == "llava_next" else 4)
    if family in ("qwen2_5_vl", "gemma3"):
        run = [START, *run, END]
    ids = []
    for number, length in enumerate(lengths):
        ids += [*(run if number else []), *torch.randint(3, 50, (length,), generator=draw).tolist()]
    return ids, pictures(family, len(lengths) - 1, seed, wide)


def plain(model, ids: list[int], images: dict, **options):
    """The model's own forward over one document, with what its processor would say of the kinds of tokens."""
    family, tokens = model.config.model_type, torch.tensor([ids])
    kinds = {"qwen2_5_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}.get(family)
    if kinds and images:
        options[kinds] = (tokens == IMAGE).long()
    with torch.no_grad():
        return model(tokens, **images, use_cache=False, **options)


def saved_llava(folder: Path, vocab: int) -> Path:
    """A LLaVA with its processor: a picture of 8 x 8 pixels takes four tokens."""
    tokenizer = train_tokenizer(["What is this? A square."] * 4, 290)
    tokenizer.add_special_tokens({"additional_special_tokens": [pretrain_vision.IMAGE]})
    tokenizer.chat_template = pretrain_vision.CHAT_TEMPLATE
    side = {"height": 8, "width": 8}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size=side, crop_size=side),
        tokenizer,
        patch_size=4,
        image_token=pretrain_vision.IMAGE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=pretrain_vision.CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**TEXT | {"vocab_size": vocab}),
            vision_config=hf.CLIPVisionConfig(**VISION_ENCODER, image_size=8, projection_dim=16),
            image_token_id=processor.image_token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    ).save_pretrained(folder)
    return folder


def draw(path: Path, seed: int) -> None:
    """A picture of 8 x 8 random pixels."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
