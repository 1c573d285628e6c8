"""Predicted chain acceptance length: the drafter teacher-forced over the target's own greedy text.

`chain_walk` over the leading correct steps of every round; it must agree with the measured greedy chain of the same
depth on the same prompts.
"""

from itertools import accumulate

import torch

from draftsmith.eval.decode import Trace
from draftsmith.models.argmax import argmax
from draftsmith.models.features import Packing
from draftsmith.models.heads.distill import chain_walk
from draftsmith.models.targets import TextTarget

BATCH = 8  # texts in a packed row


@torch.no_grad()
def predicted_chain_tau(target: TextTarget, head, prompts: list[list[int]], traces: list[Trace], depth: int) -> float:
    """prompts and their greedy traces -> predicted tokens per verify pass of a chain of `depth`."""
    tokens = passes = 0
    for start in range(0, len(prompts), BATCH):
        texts = [p + t.tokens for p, t in zip(prompts[start : start + BATCH], traces[start : start + BATCH])]
        mask = torch.cat([torch.arange(len(text)) >= len(p) for text, p in zip(texts, prompts[start : start + BATCH])])
        packing = Packing((0, *accumulate(map(len, texts))), mask)
        ids = torch.tensor([token for text in texts for token in text], device=target.device)
        features = target.features(ids, packing, head.feature_spec, [getattr(text, "images", {}) for text in texts])
        leading = torch.zeros_like(features.tokens)  # of the rows that feed the head
        for k, (rows, output) in enumerate(head.unroll(features, depth)):
            hit = head.ids[argmax(head.logits(output))] == features.tokens[rows + 2 + k]
            leading[rows] += hit & (leading[rows] == k)
        walked = chain_walk(features.packing, leading.tolist())
        tokens, passes = tokens + walked[0], passes + walked[1]
    return tokens / max(passes, 1)
