"""The vision encoder of the bundled target that sees: tower and projector alone learn to say at every patch of a scene
what it shows and where that is, by linear probes that are thrown away.
"""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from transformers import LlavaForConditionalGeneration

from draftsmith.train.recipe import Strict
from draftsmith.train.reference.pretraining_run import Optimizer, PretrainingRun, make_optimizer
from draftsmith.train.reference.scenes import COLOURS, GRID, SHAPES, SIDE, SIZES, SLOT, SLOTS, Scene, Text, picture

PATCHES = (SIDE // SLOT) ** 2
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
FACTS = {
    "kind": len(SHAPES) + 1,
    "colour": len(COLOURS),
    "size": len(SIZES),
    **{f"letter {k}": len(LETTERS) + 1 for k in range(3)},
    "empty": 2,
    "row": GRID,
    "column": GRID,
}


class VisionEncoderStage(Strict):
    """The step of tower and projector alone, on pictures of the last stage's scenes."""

    pictures: int = Field(ge=0)
    batch: int = Field(gt=0)


def pixels(pictures: list) -> torch.Tensor:
    """[B, 3, side, side] fp32 in -1..1: what the image processor makes of pictures of the right size."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def facts(scene: Scene) -> torch.Tensor:
    """[GRID * SLOTS, GRID * SLOTS, len(FACTS)] int64: what each slot holds; -1 where there is nothing to say (the
    colour of an empty slot).
    """
    side = GRID * SLOTS
    found = torch.full((side, side, len(FACTS)), -1)
    found[..., -3] = 1
    found[..., -2], found[..., -1] = torch.arange(side)[:, None] // SLOTS, torch.arange(side)[None] // SLOTS
    for item in (*scene.shapes, *([scene.text] if scene.text else [])):
        if isinstance(item, Text):
            said = [
                len(SHAPES),
                -1,
                -1,
                *(LETTERS.index(item.text[k]) if k < len(item.text) else len(LETTERS) for k in range(3)),
            ]
        else:
            said = [
                SHAPES.index(item.shape),
                list(COLOURS).index(item.colour),
                list(SIZES).index(item.size),
                -1,
                -1,
                -1,
            ]
        found[item.row * SLOTS + item.slot[0], item.column * SLOTS + item.slot[1], :-2] = torch.tensor([*said, 0])
    return found


class Probes(torch.nn.Module):
    """Tower and projector with a linear reading of every fact at every patch."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.read_embed = torch.nn.Linear(model.config.text_config.hidden_size, sum(FACTS.values()))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] -> [B, PATCHES, h], what the language model gets."""
        return self.projector(self.tower(images, output_hidden_states=True).hidden_states[-1][:, 1:])

    def readings(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A tensor [..., answers] for each fact. The language model's first norm takes the length of features away, and
        so do the probes.
        """
        return self.read_embed(F.rms_norm(features, features.shape[-1:])).split(list(FACTS.values()), -1)

    def forward(self, images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S], wanted [B, slots, slots, facts] -> mean over the facts of their mean cross-entropies;
        full and empty slots weigh the same, though one in thirty is full.
        """
        wanted, losses = wanted.flatten(1, 2), []
        for part, fact in zip(self.readings(self.features(images)), wanted.unbind(-1)):
            for empty in (0, 1):
                known = (fact >= 0) & (wanted[..., list(FACTS).index("empty")] == empty)
                losses.append(F.cross_entropy(part[known], fact[known]) if known.any() else 0.0)
        return sum(losses) / len(FACTS)


def train_vision_encoder(
    model: LlavaForConditionalGeneration, spec: VisionEncoderStage, optimization: Optimizer, drawn: Iterator[Scene], log
) -> None:
    """Trains tower and projector on `drawn`, and gives the features a mean square of 1: at the thousands that training
    leaves them with, nothing that a layer adds to the state of a patch would be seen behind the next norm.
    """
    probes = Probes(model)
    run, optimizer = PretrainingRun(optimization, spec.pictures, math.inf, log), make_optimizer(probes, optimization)
    while run.seen < spec.pictures:
        some = list(islice(drawn, spec.batch))
        images = pixels([picture(scene) for scene in some])
        run.step(
            probes,
            optimizer,
            probes(images, torch.stack([facts(scene) for scene in some])),
            len(some),
            "vision encoder",
        )
    with torch.no_grad():
        scale = probes.features(images).square().mean().sqrt()
        for parameter in probes.projector.linear_2.parameters():
            parameter /= scale


def chosen(scene: Scene, count: int) -> torch.Tensor:
    """[count] int64, ascending: all patches that hold something, and as many empty ones as are left, drawn by the
    scene's content.
    """
    empty = facts(scene)[..., list(FACTS).index("empty")].flatten()
    noise = torch.rand(PATCHES, generator=torch.Generator().manual_seed(int(scene.digest[:8], 16)))
    return (empty + noise).argsort()[:count].sort().values
