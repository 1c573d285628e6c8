"""Suffix decoding (Oliaro et al., 2024): what followed the text's last tokens where they stood before, by counts.
Nothing is trained.
"""

from collections import deque
from dataclasses import dataclass

import torch

from draftsmith.models.drafters.suffix_index import Draft, SuffixIndex, SuffixRule
from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree


@dataclass
class Step:
    """One verified tree: where it came from ("suffix" or "head"), the suffix draft's score, and the drafted tokens that
    were accepted.
    """

    source: str
    score: float
    accepted: int


class SuffixDrafter:
    """Drafts for every request from its own text, prompt included, and from the texts that all requests generated.

    size: rows of a tree, root included. cached_requests: how many requests' generated tokens are kept across requests,
    the oldest leaving first; 0 keeps each request to itself, so that results do not depend on what was decoded before.
    max_tokens: of each index. steps: all trees that it proposed since the last `begin`, in order.
    """

    feature_spec, idle = FeatureSpec(taps=()), "propose"

    def __init__(
        self, size: int = 32, rule: SuffixRule = SuffixRule(), cached_requests: int = 0, max_tokens: int = 1_000_000
    ):
        self.size, self.rule, self.cached_requests, self.max_tokens = size, rule, cached_requests, max_tokens
        self.shared, self.cached = SuffixIndex(max_tokens), deque()
        self.started = 0

    @property
    def nbytes(self) -> int:
        return self.shared.nbytes if self.cached_requests else 0

    def begin(self, features: Features, root: torch.Tensor) -> None:
        self.own: list[SuffixIndex] = []
        self.tails: list[list[int]] = []
        self.numbers: list[int] = []
        self.root, self.scores, self.steps, self.provisional = root[:0], [], [], False
        self.join(features, root)

    def join(self, features: Features, root: torch.Tensor) -> None:
        self.root = torch.cat([self.root, root])
        for text in features.texts(root):
            self.own.append(SuffixIndex(self.max_tokens))
            self.tails.append([])
            self.numbers.append(self.started)
            self.started += 1
            self._commit(-1, text, text[-1:])

    def observe(self, features: Features, root: torch.Tensor) -> None:
        """The old root is known already."""
        self.steps += [
            Step("suffix", score, length - 1) for score, length in zip(self.scores, features.lengths.tolist())
        ]
        self.root = root
        for row, text in enumerate(features.texts(root)):
            self._commit(row, text[1:], text[1:])

    def _commit(self, row: int, tokens: list[int], generated: list[int]) -> None:
        self.tails[row] = (self.tails[row] + tokens)[-self.rule.depth :]
        if self.provisional:
            return
        self.own[row].append(0, tokens)
        if self.cached_requests:
            number = self.numbers[row]
            if number not in self.shared.last and number not in self.cached:
                self.cached.append(number)
                if len(self.cached) > self.cached_requests:
                    self.shared.drop(self.cached.popleft())
            self.shared.append(number, generated)

    def drafts(self) -> list[Draft]:
        """The better draft of the two indexes for every request, its own where both are as good."""
        found = []
        for own, tail in zip(self.own, self.tails):
            drafts = [
                index.speculate(tail, self.rule, self.size - 1)
                for index in ((own, self.shared) if self.cached_requests else (own,))
            ]
            found.append(max(drafts, key=lambda draft: draft.score))
        return found

    def propose(self, draw: Draw) -> DraftTree:
        drafts = self.drafts()
        self.scores = [draft.score for draft in drafts]
        return self.trees(drafts)

    def trees(self, drafts: list[Draft]) -> DraftTree:
        width = max(len(draft.tokens) for draft in drafts)
        tokens = torch.tensor(
            [[*draft.tokens, *[0] * (width - len(draft.tokens))] for draft in drafts], dtype=torch.int64
        )
        parents = torch.tensor(
            [[-1, *(p + 1 for p in draft.parents), *[-1] * (width - len(draft.parents))] for draft in drafts]
        )
        return DraftTree.of(
            torch.cat([self.root[:, None], tokens.to(self.root.device)], 1), parents.to(self.root.device)
        )

    def mark(self):
        state = self.root, list(self.tails), len(self.steps), self.provisional
        self.provisional = True
        return state

    def restore(self, state) -> None:
        self.root, tails, steps, self.provisional = state
        self.tails, self.scores = list(tails), []
        del self.steps[steps:]

    def select(self, rows: torch.Tensor) -> None:
        kept = rows.tolist()
        self.own, self.tails, self.numbers = ([x[r] for r in kept] for x in (self.own, self.tails, self.numbers))
        self.root = self.root[rows]

    def __str__(self):
        return f"suffix:{self.rule.form}:{self.size}"
