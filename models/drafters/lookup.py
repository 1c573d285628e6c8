"""Prompt lookup (Saxena, 2023): what followed the last n tokens where they stood before is drafted as a chain. Nothing
is trained.

The longest n-gram wins; among its earlier places the latest. A request without a match gets its root alone.
"""

import torch

from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree


class LookupDrafter:
    """depth: drafted tokens of a pass; grams: lengths of the n-grams, the longest first."""

    feature_spec, idle, nbytes = FeatureSpec(taps=()), "propose", 0

    def __init__(self, depth: int = 10, grams: tuple[int, ...] = (3, 2)):
        self.depth, self.grams, self.size = depth, grams, depth + 1

    def begin(self, features: Features, root: torch.Tensor) -> None:
        self.texts: list[list[int]] = []
        self.places: list[dict[tuple[int, ...], int]] = []  # n-gram -> the index behind its latest place
        self.root, self.provisional = root[:0], False
        self.join(features, root)

    def join(self, features: Features, root: torch.Tensor) -> None:
        self.root = torch.cat([self.root, root])
        for text in features.texts(root):
            self.texts.append([])
            self.places.append({})
            self._append(-1, text)

    def observe(self, features: Features, root: torch.Tensor) -> None:
        """The old root is known already, so that only what stands behind the text so far is new."""
        self.root = root
        for row, text in enumerate(features.texts(root)):
            self._append(row, text[1:])

    def _append(self, row: int, tokens: list[int]) -> None:
        """The n-grams that end before the last token are indexed: the last ones are what is looked up."""
        if self.provisional:
            self.texts[row] = self.texts[row] + tokens
            return
        text, places = self.texts[row], self.places[row]
        for token in tokens:
            for n in self.grams:
                if len(text) >= n:
                    places[tuple(text[-n:])] = len(text)
            text.append(token)

    def propose(self, draw: Draw) -> DraftTree:
        drafts = []
        for text, places in zip(self.texts, self.places):
            place = next((places[key] for n in self.grams if (key := tuple(text[-n:])) in places), None)
            drafts.append([] if place is None else text[place : place + self.depth])
        width = max(map(len, drafts))
        tokens = torch.tensor(
            [[text[-1], *draft, *[0] * (width - len(draft))] for text, draft in zip(self.texts, drafts)]
        )
        parents = torch.tensor([[-1, *range(len(draft)), *[-1] * (width - len(draft))] for draft in drafts])
        return DraftTree.of(tokens.to(self.root.device), parents.to(self.root.device))

    def mark(self):
        state = self.root, list(self.texts), self.provisional
        self.provisional = True
        return state

    def restore(self, state) -> None:
        self.root, self.texts, self.provisional = state[0], list(state[1]), state[2]

    def select(self, rows: torch.Tensor) -> None:
        kept = rows.tolist()
        self.texts, self.places, self.root = (
            [self.texts[r] for r in kept],
            [self.places[r] for r in kept],
            self.root[rows],
        )

    def __str__(self):
        return f"lookup:{self.depth}"
