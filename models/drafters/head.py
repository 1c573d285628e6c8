"""A trained head that grows trees by a policy."""

from dataclasses import dataclass, replace

import torch

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.plain import NoDrafter
from draftsmith.models.grow import NONE, TreePolicy
from draftsmith.models.heads.captured import grown


def drafting(head, policy: TreePolicy) -> Drafter:
    """What drafts with a head by a policy. Where nothing is drafted, nothing is asked of the head either."""
    return NoDrafter() if policy == NONE else HeadDrafter(head, policy)


@dataclass
class Expanded:
    """A head as a tree policy sees it whose roots are expanded already: the first `expand` gives `first`, log-probs [B,
    1, Vd] and beam.
    """

    head: object
    first: tuple | None

    @property
    def ids(self):
        return self.head.ids

    def expand(self, beam, tokens, parents):
        found, self.first = self.first, None
        return found or self.head.expand(beam, tokens, parents)


class HeadDrafter:
    """A trained head and a tree policy. For a head with a probe the target also processes a probe behind every node."""

    nbytes = 0

    def __init__(self, head, policy: TreePolicy):
        self.head, self.policy, self.feature_spec = head, policy, head.feature_spec
        self.probes = self.feature_spec.probe is not None
        self.size = policy.size * (1 + self.probes)
        self.idle = "propose" if head.follow is None else "predict"

    def begin(self, features, root):
        self.context, self.root = self.head.prefill(features), root

    def propose(self, draw):
        if self.policy.draws:
            return self._grown(self.head, self.head.roots(self.context), draw)
        return replace(grown(self.head, self.context, self.policy, self.root, max(draw.positions)), probes=self.probes)

    def follow(self):
        """What the head predicts behind all rows that no root was expanded behind yet: log-probs [B, M, Vd] and counts
        [B] of them; `first`, to be given to `propose_behind`. For heads that can `follow`.
        """
        counts = self.context.pending.lengths
        predicted, beam = self.head.follow(self.context, self.root)
        last = (counts - 1)[:, None, None].expand(-1, 1, predicted.size(-1))
        return predicted, counts, (predicted.gather(1, last), beam)

    def propose_behind(self, first, draw):
        """As `propose`, where `follow` has expanded the roots."""
        return self._grown(Expanded(self.head, first), first[1], draw)

    def _grown(self, head, beam, draw):
        if self.policy.draws:
            tree = self.policy.sample(head, beam, self.root, draw)
        else:
            tree = self.policy.grow(head, beam, self.root)
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
