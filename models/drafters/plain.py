"""Plain decoding as a drafter: the root alone is proposed."""

import torch

from draftsmith.models.features import FeatureSpec
from draftsmith.models.tree import DraftTree


class NoDrafter:
    """Proposes the root alone: the decode loop with it is plain decoding."""

    feature_spec, size = FeatureSpec(taps=()), 1
    idle, nbytes = None, 0

    def begin(self, features, root):
        self.root = root

    def observe(self, features, root):
        self.root = root

    def propose(self, draw):
        return DraftTree.root_only(self.root)

    def mark(self):
        return self.root

    def restore(self, state):
        self.root = state

    def select(self, rows):
        self.root = self.root[rows]

    def join(self, features, root):
        self.root = torch.cat([self.root, root])

    def __str__(self):
        return "plain"
