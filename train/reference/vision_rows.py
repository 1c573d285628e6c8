"""Rows of `pretrain_vision`: one picture and many conversations about it, each of which sees the picture and itself."""

import random
from dataclasses import dataclass

import torch

from draftsmith.train.reference.scene_texts import Question, describe, questions, request
from draftsmith.train.reference.scenes import Scene, picture
from draftsmith.train.reference.vision_encoder import PATCHES, chosen, pixels


@dataclass(frozen=True)
class Batch:
    """tokens, positions [B, L] int64; said [B, L] bool, what the assistant says; conversation [B, L] int64: 0 the
    picture and what opens the row, k > 0 the k-th conversation, -1 padding; images [B, 3, S, S]; shown [B, patches]
    int64, the patches that are seen, ascending.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    said: torch.Tensor
    conversation: torch.Tensor
    images: torch.Tensor
    shown: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """[B, 1, L, L] fp32, additive: a token sees the opening and its own conversation up to itself."""
        of = self.conversation
        seen = ((of[:, None, :] == 0) | (of[:, None, :] == of[:, :, None])).tril()
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


class Rows:
    """Makes batches."""

    def __init__(self, tokenizer, image_token: int):
        self.tokenizer, self.image_token = tokenizer, image_token

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def conversation(self, turns: list[Question]) -> tuple[list[int], list[bool]]:
        """ids behind the opening of the first question, and which of them the assistant says."""
        ids, said = [], []
        for number, turn in enumerate(turns):
            asked = self._ids(("<|user|>" if number else "") + f"{turn.question}<|end|><|assistant|>")
            answer = self._ids(f"{turn.answer}<|end|>")
            ids, said = ids + asked + answer, said + [False] * len(asked) + [True] * len(answer)
        return ids, said

    def batch(
        self,
        scenes: list[Scene],
        conversations: list[list[list[Question]]],
        length: int | None = None,
        patches: int = PATCHES,
    ) -> Batch:
        """Row b holds those of conversations[b] that fit `length`, in order; without a length all, and the rows are as
        long as the longest.
        """
        opening, rows = [*self._ids("<|bos|><|user|>"), *[self.image_token] * patches, *self._ids("\n")], []
        for listed in conversations:
            ids, said, of, positions = (
                list(opening),
                [False] * len(opening),
                [0] * len(opening),
                list(range(len(opening))),
            )
            for number, turns in enumerate(listed, 1):
                new, marks = self.conversation(turns)
                if length is None or len(ids) + len(new) <= length:
                    positions += range(len(opening), len(opening) + len(new))
                    ids, said, of = ids + new, said + marks, of + [number] * len(new)
            rows.append((ids, positions, said, of))
        longest = length or max(len(row[0]) for row in rows)
        padded = [
            torch.tensor([part + [fill] * (longest - len(part)) for part in parts])
            for parts, fill in zip(zip(*rows), (0, 0, False, -1))
        ]
        return Batch(
            *padded,
            pixels([picture(scene) for scene in scenes]),
            torch.stack([chosen(scene, patches) for scene in scenes]),
        )


def talk(scene: Scene, rng: random.Random, descriptions: float, kinds: list[str] | None = None) -> list[list[Question]]:
    """More conversations than fit a row: a description in some, then rounds of all kinds of questions, a few of them
    one after another.
    """
    listed = [[Question("describe", request(rng), describe(scene, rng))]] if rng.random() < descriptions else []
    for _ in range(2 if listed else 3 if kinds is None else 6):
        asked = [question for question in questions(scene, rng) if kinds is None or question.kind in kinds]
        while asked:
            turns = min(len(asked), rng.choice((1, 1, 1, 2, 3)))
            listed.append(asked[:turns])
            asked = asked[turns:]
    return listed
