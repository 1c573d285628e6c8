"""HOWL (Lee et al., 2025): in every step the suffix path, where its score beats a threshold, else the head's tree.

The score is the number of drafted tokens expected to be accepted (Oliaro et al., 2024). The paper does not state its
threshold; here it is what the head's own trees have lately achieved in the request, or a fixed number. Scores of a few
tokens promise more than they keep in texts that do not loop: beside the head's trees they count for what paths of such
scores have achieved (`Calibration`). One source a request and step, trees are not merged. Behind a suffix step no
`[SPEC]` state is there: the head goes on from the plain one (its `spec_dropout` has trained it for that).
"""

from bisect import bisect_right
from dataclasses import replace

import torch
import torch.nn.functional as F

from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.drafters.suffix import Step, SuffixDrafter
from draftsmith.models.drafters.suffix_index import Draft
from draftsmith.models.tree import DraftTree

INITIAL = 3.0  # accepted drafted tokens of a head step before the first one is known
KEPT = 0.9  # of the running mean, in each head step
SCORES = (0.0, 1.0, 2.0, 3.0, 6.0, 9.0)  # where classes of scores begin
ACHIEVED = (1.0, 0.7, 0.55, 0.7, 0.85, 1.0)  # accepted / score in each, before any is tried (recipes/README.md, `owl`)
WEIGHT = 6.0  # of that, in tokens


class Calibration:
    """How many tokens paths of a score achieve: the score times what paths of its class had accepted in this request /
    what they had promised. Every path is tried against the text that was emitted, whether or not it was the one that
    was verified.
    """

    def __init__(self):
        self.accepted, self.promised = [WEIGHT * share for share in ACHIEVED], [WEIGHT] * len(SCORES)

    def of(self, score: float) -> float:
        place = bisect_right(SCORES, score) - 1
        return score * self.accepted[place] / self.promised[place]

    def note(self, draft: Draft, emitted: list[int]) -> None:
        """emitted: the tokens behind the root. A path that they follow to their end would have gone on: it says
        nothing.
        """
        levels = draft.levels(emitted)
        if levels < len(emitted):
            place = bisect_right(SCORES, draft.score) - 1
            self.accepted[place] += levels
            self.promised[place] += draft.score


class HowlDrafter:
    """A trained head with its tree policy, and suffix decoding.

    threshold: None compares the calibrated score with the running mean of the drafted tokens that a request's head
    steps had accepted; a number is compared with the score itself. steps: all verified trees since the last `begin`,
    in order.
    """

    idle = None

    def __init__(self, head: HeadDrafter, suffix: SuffixDrafter, threshold: float | None = None):
        self.head, self.suffix, self.threshold = head, suffix, threshold
        self.feature_spec, self.size = head.feature_spec, max(head.size, suffix.size * (1 + head.probes))

    @property
    def nbytes(self):
        return self.suffix.nbytes

    def begin(self, features, root):
        self.head.begin(features, root)
        self.suffix.begin(features, root)
        self.means, self.chosen, self.steps = [INITIAL] * len(root), [], []
        self.calibrations = [Calibration() for _ in self.means]

    def propose(self, draw):
        drafts = self.drafts = self.suffix.drafts()
        if self.threshold is None:
            ahead = [c.of(draft.score) > mean for c, draft, mean in zip(self.calibrations, drafts, self.means)]
        else:
            ahead = [draft.score > self.threshold for draft in drafts]
        self.chosen = [("suffix" if first else "head", draft.score) for first, draft in zip(ahead, drafts)]
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
        for calibration, draft, text in zip(self.calibrations, self.drafts, features.texts(root)):
            calibration.note(draft, text[1:])
        self.head.observe(features, root)
        self.suffix.observe(features, root)

    def select(self, rows):
        self.head.select(rows)
        self.suffix.select(rows)
        self.means, self.calibrations = ([x[r] for r in rows.tolist()] for x in (self.means, self.calibrations))

    def join(self, features, root):
        self.head.join(features, root)
        self.suffix.join(features, root)
        self.means += [INITIAL] * len(root)
        self.calibrations += [Calibration() for _ in range(len(root))]

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
