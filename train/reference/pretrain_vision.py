"""Trains the bundled `shapes-vlm` target: a small LLaVA (CLIP tower, two-layer projector, Llama) on scenes drawn by
code.

Two steps, as large models of this kind are made. First the vision encoder (tower and projector) learns to say at every
patch what it shows and where that is (probes that are thrown away). Then they are frozen, since the loss of answers
alone unlearns reading before it needs it, and the language model learns to answer questions and to describe. From stage
to stage it grows in depth, the scenes in content, and the share of empty patches that it is shown: to find one patch
among 256 is not learnt from answers, to find one of four among 16 is. A row is one picture and many conversations about
it: each sees the picture and itself only, at the positions that it would have alone, so that the picture is encoded
once and no answer can be copied from another. The loss covers what the assistant says.
"""

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from draftsmith.models.errors import UserError
from draftsmith.models.files import usual_modes
from draftsmith.train.recipe import Place, Strict
from draftsmith.train.reference import pretrain as text
from draftsmith.train.reference.pretraining_run import Optimizer, PretrainingRun, make_optimizer
from draftsmith.train.reference.scene_texts import Question, describe, questions, request
from draftsmith.train.reference.scenes import SIDE, SLOT, Scene, picture, scenes
from draftsmith.train.reference.vision_encoder import PATCHES, VisionEncoderStage, pixels, train_vision_encoder
from draftsmith.train.reference.vision_rows import Batch, Rows, talk

IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ "
    "part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] "
    "}}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Vision(Strict):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


class VisionStage(Strict):
    """shapes: fewest and most in a scene; patches: visual tokens of a row, all those that hold something among them;
    kinds: of questions (null: all); descriptions: share of rows with a description before the questions; length: tokens
    of a row.
    """

    layers: int = Field(gt=0)
    shapes: tuple[int, int] = Field(strict=False)
    patches: int = Field(PATCHES, gt=0, le=PATCHES)
    kinds: list[str] | None = None
    descriptions: float = Field(ge=0, le=1)
    length: int = Field(gt=0)
    batch: int = Field(gt=0)
    rows: int = Field(gt=0)


class VisionRecipe(Strict):
    seed: int
    held_out: float = Field(gt=0, lt=1)
    vision: Vision
    model: text.Architecture
    vision_encoder: VisionEncoderStage
    stages: list[VisionStage] = Field(min_length=1)
    optimizer: Optimizer
    evaluation: int = Field(gt=0)
    save_minutes: float = Field(gt=0)
    output: Place

    @model_validator(mode="after")
    def _fits(self):
        if self.model.family != "llama":
            raise ValueError(f"model.family: found {self.model.family}, expected llama under a vision encoder")
        for before, after in zip(self.stages, self.stages[1:]):
            if after.layers % before.layers:
                raise ValueError(f"stages: found {before.layers} layers before {after.layers}, expected a multiple")
        for stage in self.stages:
            shortest = stage.patches + (320 if stage.descriptions else 60)
            if stage.length < shortest:
                raise ValueError(
                    f"stages: found length {stage.length}, expected at least {shortest} (a picture and what is said "
                    f"of it)"
                )
            if stage.patches <= stage.shapes[1]:
                raise ValueError(
                    f"stages: found {stage.patches} patches, expected more than the {stage.shapes[1]} shapes and the "
                    f"text"
                )
        if self.stages[-1].patches < PATCHES:
            raise ValueError(f"stages: found {self.stages[-1].patches} patches in the last, expected all {PATCHES}")
        return self


def make_processor(recipe: VisionRecipe) -> LlavaProcessor:
    """Tokenizer, trained on questions and descriptions of the train split, and the image processor, of one size."""
    rng, corpus = random.Random(recipe.seed), []
    for scene in islice(scenes(recipe.seed, False, recipe.held_out), 600):
        corpus += [
            describe(scene, rng),
            request(rng),
            *(part for q in questions(scene, rng) for part in ("\n" + q.question, q.answer)),
        ]
    tokenizer = text.train_tokenizer(corpus, recipe.model.vocab_size - 1)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = CHAT_TEMPLATE
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=SLOT,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def first_model(recipe: VisionRecipe, image_token: int) -> LlavaForConditionalGeneration:
    """A random LLaVA of the first stage's depth."""
    language = recipe.model.config(recipe.stages[0].layers)
    vision = CLIPVisionConfig(**recipe.vision.model_dump(), image_size=SIDE, patch_size=SLOT, hidden_act="gelu")
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=language,
            image_token_id=image_token,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=PATCHES,
            tie_word_embeddings=True,
        )
    )


def deepen(model: LlavaForConditionalGeneration, layers: int) -> LlavaForConditionalGeneration:
    """The same function with more layers in the language model."""
    language = LlamaForCausalLM(model.config.text_config)
    language.model, language.lm_head = model.model.language_model, model.lm_head
    grown = text.grow(language, layers)
    model.config.text_config = grown.config
    model.model.language_model, model.lm_head = grown.model, grown.lm_head
    return model


def hidden_states(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """[B, L, h] after the final norm."""
    seen = torch.stack(list(model.get_image_features(batch.images).pooler_output))
    seen = seen.gather(1, batch.shown[..., None].expand(-1, -1, seen.size(-1)))
    words = model.get_input_embeddings()(batch.tokens)
    whole = words.masked_scatter((batch.tokens == model.config.image_token_id)[..., None], seen)
    return model.model.language_model(
        inputs_embeds=whole, attention_mask=batch.mask, position_ids=batch.positions
    ).last_hidden_state


def answer_loss(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy (nats per token) of what the assistant says."""
    said = batch.said[:, 1:]
    hidden = hidden_states(model, batch)[:, :-1][said]
    return F.cross_entropy(model.lm_head(hidden).float(), batch.tokens[:, 1:][said])


# What it is worth.


@torch.no_grad()
def right_answers(
    model, rows: Rows, drawn: list[Scene], shown: list[Scene | None], asked: list[list[Question]]
) -> list[tuple[str, bool]]:
    """(kind, whether greedy decoding gives exactly the answer and then ends) of every question about `drawn` with the
    pictures of `shown` (None: a grey one). Greedy decoding gives a text if and only if each of its tokens is the most
    probable after those before it.
    """
    found = []
    for start in range(0, len(drawn), 8):
        part = slice(start, start + 8)
        batch = rows.batch(drawn[part], [[[q] for q in listed] for listed in asked[part]])
        images = [torch.zeros(1, 3, SIDE, SIDE) if s is None else pixels([picture(s)]) for s in shown[part]]
        batch = replace(batch, images=torch.cat(images))
        best = model.lm_head(hidden_states(model, batch)[:, :-1]).argmax(-1)
        wrong = batch.said[:, 1:] & (best != batch.tokens[:, 1:])
        for number, listed in enumerate(asked[part]):
            for k, question in enumerate(listed, 1):
                found.append((question.kind, not wrong[number][batch.conversation[number, 1:] == k].any().item()))
    return found


def share(found: list[tuple[str, bool]]) -> float:
    return sum(right for _, right in found) / len(found)


def majority(asked: list[list[Question]], learnt: Iterator[list[Question]]) -> float:
    """The accuracy of always giving the most frequent answer to this kind of question in `learnt`."""
    seen = defaultdict(Counter)
    for listed in learnt:
        for question in listed:
            seen[question.kind][question.answer] += 1
    best = {kind: counts.most_common(1)[0][0] for kind, counts in seen.items()}
    flat = [question for listed in asked for question in listed]
    return sum(best.get(q.kind) == q.answer for q in flat) / len(flat)


@torch.no_grad()
def described(model, rows: Rows, drawn: list[Scene], shown: list[Scene], seed: int) -> float:
    """Nats per token of descriptions of `drawn` beside the pictures of `shown`."""
    losses, rng = [], random.Random(seed)
    for start in range(0, len(drawn), 8):
        part = slice(start, start + 8)
        texts = [[[Question("describe", request(rng), describe(scene, rng))]] for scene in drawn[part]]
        losses.append(answer_loss(model, rows.batch(shown[part], texts)).item())
    return sum(losses) / len(losses)


def evaluate(model, rows: Rows, recipe: VisionRecipe, count: int) -> dict:
    """Figures on `count` held-out scenes, blind ones beside them: the majority answer, another scene's picture, a grey
    picture.
    """
    shapes, rng = recipe.stages[-1].shapes, random.Random(recipe.seed)
    drawn = list(islice(scenes(recipe.seed, True, recipe.held_out, shapes), count))
    others, asked = [*drawn[1:], drawn[0]], [questions(scene, rng) for scene in drawn]
    model.eval()
    seeing = right_answers(model, rows, drawn, drawn, asked)
    by_kind = defaultdict(list)
    for kind, right in seeing:
        by_kind[kind].append(right)
    figures = {
        "held_out_scenes": count,
        "questions": len(seeing),
        "accuracy": share(seeing),
        "blind_majority_answer": majority(
            asked, (questions(s, rng) for s in islice(scenes(recipe.seed, False, recipe.held_out, shapes), 2000))
        ),
        "blind_other_picture": share(right_answers(model, rows, drawn, others, asked)),
        "blind_grey_picture": share(right_answers(model, rows, drawn, [None] * count, asked)),
        "description_nats_per_token": described(model, rows, drawn, drawn, recipe.seed),
        "description_nats_per_token_other_picture": described(model, rows, drawn, others, recipe.seed),
        "accuracy_by_kind": {kind: sum(rights) / len(rights) for kind, rights in sorted(by_kind.items())},
    }
    model.train()
    return {
        key: round(value, 4)
        if isinstance(value, float)
        else {k: round(v, 3) for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in figures.items()
    }


def save_snapshot(folder: Path, model, optimizer, run: PretrainingRun) -> None:
    """Weights (fp32) and what else a run that is killed goes on from; complete or not there."""
    partial = folder / ".checkpoint"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    torch.save(
        {"optimizer": optimizer.state_dict(), "seen": run.seen, "steps": run.steps, "minutes": run.minutes},
        partial / "state.pt",
    )
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    partial.rename(folder / "checkpoint")


def pretrain_vision(recipe: VisionRecipe, log=print) -> Path:
    """Trains the vision encoder, then runs all stages; `recipe.output` appears when complete: bf16 safetensors,
    processor, held-out figures.

    Until then everything is in `output.partial`, with a snapshot (`checkpoint`) every `save_minutes`, from which a
    killed run goes on: row n of a run is the same whenever it is drawn. Raises UserError when `output` exists or the
    loss stops being finite.
    """
    if Path(recipe.output).exists():
        raise UserError(f"output: {recipe.output} exists; expected a new place")
    torch.manual_seed(recipe.seed)
    folder = Path(f"{recipe.output}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    processor = make_processor(recipe)
    processor.save_pretrained(folder)
    rows = Rows(processor.tokenizer, processor.image_token_id)
    run = PretrainingRun(recipe.optimizer, sum(stage.rows for stage in recipe.stages), recipe.save_minutes, log)
    if (folder / "checkpoint").is_dir():
        model = LlavaForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=torch.float32).train()
        state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
        run.go_on(state["seen"], state["steps"], state["minutes"])
    else:
        model, state = first_model(recipe, processor.image_token_id), None
        train_vision_encoder(
            model,
            recipe.vision_encoder,
            recipe.optimizer,
            scenes(recipe.seed + 1, False, recipe.held_out, recipe.stages[-1].shapes),
            log,
        )
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    log(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} ids, {run.seen} "
        f"rows done"
    )
    end = 0
    for number, stage in enumerate(recipe.stages, 1):
        start, end = end, end + stage.rows
        if run.seen >= end:
            continue
        if stage.layers != model.config.text_config.num_hidden_layers:
            model, state = deepen(model, stage.layers), None
        optimizer = make_optimizer(model, recipe.optimizer)
        if state is not None and run.seen > start:
            optimizer.load_state_dict(state["optimizer"])
        source = islice(scenes(recipe.seed + 1 + number, False, recipe.held_out, stage.shapes), run.seen - start, None)
        while run.seen < end:
            rng, drawn = random.Random(f"{recipe.seed} row {run.seen}"), list(islice(source, stage.batch))
            batch = rows.batch(
                drawn,
                [talk(scene, rng, stage.descriptions, stage.kinds) for scene in drawn],
                stage.length,
                stage.patches,
            )
            run.step(model, optimizer, answer_loss(model, batch), len(drawn), f"stage {number} layers {stage.layers}")
            if run.due():
                log(json.dumps(evaluate(model, rows, recipe, min(16, recipe.evaluation))))
                save_snapshot(folder, model, optimizer, run)
    model.config.text_config.use_cache = True
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    figures = evaluate(model.float(), rows, recipe, recipe.evaluation) | {
        "rows": run.seen,
        "minutes": round(run.minutes, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (folder / "training.json").write_text(json.dumps(figures, indent=1))
    log(json.dumps(figures))
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    usual_modes(folder)
    return folder.rename(recipe.output)
