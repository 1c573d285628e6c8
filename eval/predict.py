"""Predicted chain acceptance length: the drafter teacher-forced over the target's own greedy text.

m_t = leading correct steps of the round whose root stands at t; walk t <- t + m_t + 1; tokens / steps. It must agree with the measured
greedy chain of the same depth on the same prompts (averaging accuracies over all positions would be biased: cycles start after hard tokens).
"""

import torch

from draftsmith.eval.decode import Trace
from draftsmith.models.targets import TextTarget


@torch.no_grad()
def predicted_chain_tau(target: TextTarget, head, prompts: list[list[int]], traces: list[Trace], depth: int, batch: int = 8) -> float:
    """prompts and their greedy traces -> predicted tokens per verify pass of a chain of `depth`."""
    tokens = passes = 0
    for start in range(0, len(prompts), batch):
        texts = [p + t.tokens for p, t in zip(prompts[start:start + batch], traces[start:start + batch])]
        starts = [len(p) for p in prompts[start:start + batch]]
        width = max(map(len, texts))
        ids = torch.tensor([t + [0] * (width - len(t)) for t in texts], device=target.device)
        lengths = torch.tensor([len(t) for t in texts], device=target.device)
        positions = torch.arange(width, device=target.device)
        mask = (positions >= torch.tensor(starts, device=target.device)[:, None]) & (positions < lengths[:, None])
        features = target.features(ids, lengths, mask, head.feature_spec)
        right = torch.zeros(len(texts) * width, dtype=torch.int64, device=target.device)  # leading correct steps of row t
        for k, (rows, logits) in enumerate(head.unroll(features, depth)):
            hit = head.ids[logits.argmax(-1)] == ids.flatten()[rows + 2 + k]
            right[rows] += hit & (right[rows] == k)
        for row, (first, text) in enumerate(zip(starts, texts)):
            root, last = first, len(text) - 1
            tokens += last - root
            while root < last:
                root += int(right[row * width + root - 1]) + 1
                passes += 1
    return tokens / max(passes, 1)
