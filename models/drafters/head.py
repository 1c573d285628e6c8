"""A trained head that grows trees by a policy."""

from dataclasses import replace

import torch

from draftsmith.models.grow import AdaptiveTree, SampledTree, TreePolicy


class HeadDrafter:
    """A trained head and a tree policy. For a head with a probe the target also processes a probe behind every node."""

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

    def mark(self):
        return self.root, self.context.mark()

    def restore(self, state):
        self.root, context = state
        self.context.restore(context)

    def select(self, rows):
        self.context.select(rows)
        self.root = self.root[rows]

    def join(self, features, root):
        self.context.join(self.head.prefill(features))
        self.root = torch.cat([self.root, root])

    def __str__(self):
        return str(self.policy)
