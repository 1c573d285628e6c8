"""Drafters: whatever proposes trees. The decode loop knows nothing else of them.

    begin(features, root)      a new batch of requests: features of the prompts, the first emitted token of each
    propose(draw) -> DraftTree trees whose roots are the last emitted tokens; only trees that sample use `draw`
    observe(features, root)    features of the rows just committed (old root and accepted nodes), the newly emitted token
    select(rows)               go on with only these requests
"""

from dataclasses import replace
from typing import Protocol

import torch

from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.grow import AdaptiveTree, SampledTree, TreePolicy
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree


class Drafter(Protocol):
    feature_spec: FeatureSpec
    size: int  # rows of the largest tree that the target processes, root and probes included

    def begin(self, features: Features, root: torch.Tensor) -> None: ...
    def propose(self, draw: Draw) -> DraftTree: ...
    def observe(self, features: Features, root: torch.Tensor) -> None: ...
    def select(self, rows: torch.Tensor) -> None: ...


class NoDrafter:
    """Proposes the root alone: the decode loop with it is plain decoding."""

    feature_spec, size = FeatureSpec(taps=()), 1

    def begin(self, features, root):
        self.root = root

    def observe(self, features, root):
        self.root = root

    def propose(self, draw):
        return DraftTree.root_only(self.root)

    def select(self, rows):
        self.root = self.root[rows]

    def __str__(self):
        return "plain"


class HeadDrafter:
    """A trained head and a tree policy. Of a head with a probe the target processes one behind every node: twice the rows."""

    def __init__(self, head, policy: TreePolicy):
        self.head, self.policy, self.feature_spec = head, policy, head.feature_spec
        self.probes = self.feature_spec.probe is not None
        self.size = policy.size * (1 + self.probes)

    def begin(self, features, root):
        self.context, self.root = self.head.prefill(features), root

    def propose(self, draw):
        beam = self.head.roots(self.context)
        if isinstance(self.policy, SampledTree | AdaptiveTree):
            tree = self.policy.sample(self.head, beam, self.root, draw)
        else:
            tree = self.policy.grow(self.head, beam, self.root)
        return replace(tree, probes=self.probes)

    def observe(self, features, root):
        self.head.extend(self.context, features)
        self.root = root

    def select(self, rows):
        self.context.select(rows)
        self.root = self.root[rows]

    def __str__(self):
        return str(self.policy)
