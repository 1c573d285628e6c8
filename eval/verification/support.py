"""On how many ids the rejection rules compute at each node: the whole vocabulary, or only what can be drafted there.

Where a node's draft distribution has its own few ids (`DraftTree.ids` of three dimensions), judging its children
changes the target's row at those ids and at one-hot children, and scales all the rest by one factor. So a row is kept
as "columns": these ids, and behind them one number for the mass of all others. Formulas are the same on either form;
the vocabulary is looked at once a node, and once for the next token.
"""

import torch

from draftsmith.eval.verification.schedule import Schedule
from draftsmith.models.tree import DraftTree


def target_ids(q: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Draft rows q [..., Vd] over the target's vocabulary [..., V], zero where nothing can be drafted; ids [Vd] are
    those of all rows, or ids [..., Vd] those of each. A copy.
    """
    full = q.new_zeros(*q.shape[:-1], vocab_size)
    return full.index_copy_(-1, ids, q) if ids.dim() == 1 else full.scatter_add_(-1, ids, q)


class Vocabulary:
    """Columns are all ids. Nodes and rows of q are numbered flat, as in `Schedule`."""

    def __init__(self, tree: DraftTree, plan: Schedule, logits: torch.Tensor):
        self.tree, self.logits, self.letters = tree, logits.flatten(0, 1), tree.tokens.flatten()

    def target(self, nodes: torch.Tensor) -> torch.Tensor:
        """nodes [n] -> p [n, columns]."""
        return self.logits.index_select(0, nodes).softmax(-1)

    @property
    def proposals(self) -> torch.Tensor | None:
        """q [B * R, columns] of all rows, a copy."""
        tree = self.tree
        if tree.q is None:
            return None
        return target_ids(tree.q.flatten(0, 1).to(self.logits.dtype), tree.ids, self.logits.size(-1))

    def proposal(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n] -> q [n, columns]; zero for trees without q."""
        if self.tree.q is None:
            return self.logits.new_zeros(len(rows), self.logits.size(-1))
        q = self.tree.q.flatten(0, 1).index_select(0, rows).to(self.logits.dtype)
        return target_ids(q, self.tree.ids, self.logits.size(-1))

    def spread(self, weights: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """weights [n, columns] of nodes [n] -> [n, V]."""
        return weights


class Support:
    """Columns of a node: the ids of its row of q, the tokens of its children, and all other ids together. Where an id
    occurs twice the first column counts, the others stay at zero.
    """

    def __init__(self, tree: DraftTree, plan: Schedule, logits: torch.Tensor):
        (batch, size), rows, width = tree.tokens.shape, tree.q.size(1), tree.q.size(2)
        starts, tokens = torch.arange(batch, device=logits.device)[:, None], tree.tokens.flatten()
        self.logits, self.slot = logits.flatten(0, 1), plan.slot.clamp(min=0)
        self.q = tree.q.flatten(0, 1).to(logits.dtype)
        own = (starts * rows + plan.drawn).flatten().index_select(0, plan.inner)
        below = tree.tokens.gather(1, plan.children.clamp(min=0).flatten(1)).view(batch * size, -1)
        self.columns = torch.cat(
            [tree.ids.flatten(0, 1).index_select(0, own), below.index_select(0, plan.inner)], 1
        )  # [I, K]
        alike = self.columns[:, :, None] == self.columns[:, None]
        self.first = alike.to(torch.int8).argmax(2) == torch.arange(self.columns.size(1), device=logits.device)
        self.more = self.columns.size(1) + 1 - width
        above = self.slot.index_select(0, (starts * size + tree.parents.clamp(min=0)).flatten())
        self.letters = (self.columns.index_select(0, above) == tokens[:, None]).to(torch.int8).argmax(1)

    def target(self, nodes):
        logits, places = self.logits.index_select(0, nodes), self.slot.index_select(0, nodes)
        columns = self.columns.index_select(0, places)
        inside = logits.gather(1, columns).masked_fill_(~self.first.index_select(0, places), float("-inf"))
        outside = logits.scatter_(1, columns, float("-inf")).logsumexp(1, keepdim=True)
        return torch.cat([inside, outside], 1).softmax(-1)

    @property
    def proposals(self):
        return torch.nn.functional.pad(self.q, (0, self.more))

    def proposal(self, rows):
        return torch.nn.functional.pad(self.q.index_select(0, rows), (0, self.more))

    def spread(self, weights, nodes):
        columns = self.columns.index_select(0, self.slot.index_select(0, nodes))
        outside = self.logits.index_select(0, nodes).scatter_(1, columns, float("-inf"))
        scale = outside.logsumexp(1, keepdim=True).clamp(min=torch.finfo(outside.dtype).min)  # where nothing is outside
        full = outside.sub_(scale).exp_().mul_(weights[:, -1:])
        return full.scatter_add_(1, columns, weights[:, :-1])


def support(tree: DraftTree, plan: Schedule, logits: torch.Tensor) -> Vocabulary | Support:
    """logits [B, N, V] processed."""
    sparse = tree.q is not None and tree.ids.dim() == 3
    return (Support if sparse else Vocabulary)(tree, plan, logits)
