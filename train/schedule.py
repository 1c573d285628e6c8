"""Which rows make up which step: a deterministic order that follows from (seed, epoch) alone, so that a step number is
all a resumed run needs.

Rows are shuffled; inside a window of many batches they are sorted by length and packed into bins of at most
`batch_tokens` tokens, so that a bin's documents are of similar length (the target reads them as padded rows); one step
takes world * accumulation bins; the steps of an epoch are shuffled again. Steps are the same for every split of `bins`
into processes and accumulation.
"""

import math

import numpy as np
import torch

WINDOW = 16  # steps whose rows are sorted together

Step = list[list[int]]  # the row numbers of each bin


def epoch_steps(
    lengths: np.ndarray, rows: np.ndarray, batch_tokens: int, bins: int, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch over `rows` (numbers into `lengths`); what does not fill a last step is left out."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = rows[torch.randperm(len(rows), generator=generator).numpy()]
    window = max(1, int(WINDOW * bins * batch_tokens / max(1.0, float(lengths[rows].mean()))))
    packed: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        packed += _fill(part.tolist(), lengths[part].tolist(), batch_tokens)
    steps = [packed[i : i + bins] for i in range(0, len(packed) - bins + 1, bins)]
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


def _fill(rows: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    filled, room = [], 0
    for row, length in zip(rows, lengths):
        if not filled or length > room:
            filled.append([])
            room = budget
        filled[-1].append(row)
        room -= length
    return filled


class Schedule:
    """All steps of a run: `total` of them; `after(done)` yields (step, epoch, bins) from there on."""

    def __init__(self, lengths: np.ndarray, rows: np.ndarray, batch_tokens: int, bins: int, seed: int, epochs: float):
        self._arguments, self.epochs = (lengths, rows, batch_tokens, bins, seed), math.ceil(epochs)
        self.per_epoch = [len(epoch_steps(*self._arguments, epoch)) for epoch in range(self.epochs)]
        share = epochs - self.epochs + 1  # of the last epoch
        self.total = sum(self.per_epoch[:-1]) + math.floor(self.per_epoch[-1] * share)

    def after(self, done: int):
        step = 0
        for epoch, count in enumerate(self.per_epoch):
            if step + count > done:
                for bins in epoch_steps(*self._arguments, epoch):
                    step += 1
                    if done < step <= self.total:
                        yield step, epoch, bins
            else:
                step += count


def rate_scale(step: int, total: int, warmup: float, kind: str) -> float:
    """Learning-rate factor of step 0 .. total - 1: a linear rise over the first `warmup` share, then `linear` or
    `cosine` to zero, or `constant`.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    left = (total - step) / max(1, total - rise)
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[kind]


def held_out(conversations: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """conversations [N], ascending: the one that each row is of -> (row numbers to train on, row numbers kept for
    measuring: the first of each of `count` conversations, none of whose rows is trained on), both ascending.
    """
    firsts = np.flatnonzero(np.diff(conversations, prepend=-1))
    kept = np.sort(firsts[torch.randperm(len(firsts), generator=torch.Generator().manual_seed(seed)).numpy()[:count]])
    return np.flatnonzero(~np.isin(conversations, conversations[kept])), kept
