"""HOWL (Lee et al., 2025): in every step the suffix path, where its score beats a threshold, else the head's tree.

The score is the number of drafted tokens expected to be accepted (Oliaro et al., 2024). The paper does not state its
threshold; here it is what the head's own trees have lately achieved in the request, or a fixed number. One source a
request and step, trees are not merged. Behind a suffix step no `[SPEC]` state is there: the head goes on from the plain
one (its `spec_dropout` has trained it for that).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.drafters.suffix import Step, SuffixDrafter
from draftsmith.models.tree import DraftTree

INITIAL = 3.0  # accepted drafted tokens of a head step before the first one is known
KEPT = 0.9  # of the running mean, in each head step


class HowlDrafter:
    """A trained head with its tree policy, and suffix decoding.

    threshold: None compares the score with the running mean of the drafted tokens that a request's head steps had
    accepted. steps: all verified trees since the last `begin`, in order.
    """

    def __init__(self, head: HeadDrafter, suffix: SuffixDrafter, threshold: float | None = None):
        self.head, self.suffix, self.threshold = head, suffix, threshold
        self.feature_spec, self.size = head.feature_spec, max(head.size, suffix.size * (1 + head.probes))

    def begin(self, features, root):
        self.head.begin(features, root)
        self.suffix.begin(features, root)
        self.means, self.chosen, self.steps = [INITIAL] * len(root), [], []

    def propose(self, draw):
        drafts = self.suffix.drafts()
        bars = self.means if self.threshold is None else [self.threshold] * len(drafts)
        self.chosen = [("suffix" if draft.score > bar else "head", draft.score) for draft, bar in zip(drafts, bars)]
        taken = torch.tensor([source == "suffix" for source, _ in self.chosen], device=self.suffix.root.device)
        if taken.all():
            return self.suffix.trees(drafts)
        tree = self.head.propose(draw)
        return merge(taken, self.suffix.trees(drafts), tree) if taken.any() else tree

    def observe(self, features, root):
        for row, ((source, score), length) in enumerate(zip(self.chosen, features.lengths.tolist())):
            self.steps.append(Step(source, score, length - 1))
            if source == "head":
                self.means[row] = KEPT * self.means[row] + (1 - KEPT) * (length - 1)
        self.head.observe(features, root)
        self.suffix.observe(features, root)

    def select(self, rows):
        self.head.select(rows)
        self.suffix.select(rows)
        self.means = [self.means[r] for r in rows.tolist()]

    def join(self, features, root):
        self.head.join(features, root)
        self.suffix.join(features, root)
        self.means += [INITIAL] * len(root)

    def __str__(self):
        return f"howl:{self.head}:{self.suffix}" + ("" if self.threshold is None else f">{self.threshold:g}")


def merge(taken: torch.Tensor, first: DraftTree, second: DraftTree) -> DraftTree:
    """Trees of `first`, which samples nothing, where taken [B], else of `second`; the narrower ones are padded."""
    size = max(first.size, second.size)
    choose = lambda name, fill: torch.where(  # noqa: E731
        taken[:, None], *(F.pad(getattr(tree, name), (0, size - tree.size), value=fill) for tree in (first, second))
    )
    return replace(
        second, tokens=choose("tokens", 0), parents=choose("parents", -1), kind=choose("kind", 0), known=None
    )
