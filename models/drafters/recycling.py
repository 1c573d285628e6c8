"""Token Recycling (Luo et al., 2024): behind each token stand the ids that the target lately found most probable there.

A matrix [V, 8] holds, for every token of the vocabulary, the most probable ids behind its latest occurrence among the
nodes of verified trees, rejected ones included. Drafting follows it down a static shape: the child of rank r of a node
with token t is entry r of row t. Nothing is averaged and nothing sampled: all edges are ONE_HOT.
"""

import numpy as np
import torch

from draftsmith.models.drafters.static import Offer, fill
from draftsmith.models.features import DistributionSpec, Features, FeatureSpec
from draftsmith.models.grow import StaticTree
from draftsmith.models.noise import Draw
from draftsmith.models.topology import recycling
from draftsmith.models.transfer import on_host
from draftsmith.models.tree import DraftTree

TOP, NONE = 8, -1
TEMPLATE = StaticTree(tuple(recycling()), "recycling")


class RecyclingDrafter:
    """vocab_size: of the target. lasting: one matrix for all that is decoded while this drafter lives; otherwise each
    request begins with an empty one of its own.
    """

    feature_spec = FeatureSpec(taps=(), distribution=DistributionSpec("nodes", TOP))
    idle = "propose"

    def __init__(self, vocab_size: int, tree: StaticTree = TEMPLATE, lasting: bool = False):
        self.tree, self.lasting, self.size = tree, lasting, tree.size
        self.matrix = np.full((int(lasting), vocab_size, TOP), NONE, np.int32)  # [1 or requests, V, TOP]

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def begin(self, features: Features, root: torch.Tensor) -> None:
        if not self.lasting:
            self.matrix = self.matrix[:0]
        self.roots, self.root = np.zeros(0, np.int32), root[:0]
        self.join(features, root)

    def join(self, features: Features, root: torch.Tensor) -> None:
        if not self.lasting:
            empty = np.full((len(root), *self.matrix.shape[1:]), NONE, np.int32)
            self.matrix = np.concatenate([self.matrix, empty])
        (roots,) = on_host(root)
        self.roots, self.root = np.concatenate([self.roots, roots]), torch.cat([self.root, root])

    def spaces(self, rows: np.ndarray) -> np.ndarray:
        """Which matrix is that of each request."""
        return np.zeros_like(rows) if self.lasting else rows

    def propose(self, draw: Draw) -> DraftTree:
        def offer(rows, _slots, ends):
            ids = self.matrix[self.spaces(rows), ends[:, -1]]
            return Offer(ids, (ids != NONE).sum(1))

        self.proposed = fill(self.tree, self.roots[:, None], offer, self.root.device)
        return self.proposed

    def observe(self, features: Features, root: torch.Tensor) -> None:
        """Of several nodes with one token the last is remembered."""
        told, self.root = features.distribution, root
        tokens, real, ids, probs, self.roots = on_host(
            self.proposed.tokens, self.proposed.real, told.ids, told.probs, root
        )
        rows, nodes = np.nonzero(real)
        found = np.full((len(rows), TOP), NONE, np.int32)
        found[:, : ids.shape[2]] = np.where(probs > 0, ids, NONE)[rows, nodes]
        self.matrix[self.spaces(rows), tokens[rows, nodes]] = found

    def select(self, rows: torch.Tensor) -> None:
        kept = rows.cpu().numpy()
        self.roots, self.root = self.roots[kept], self.root[rows]
        if not self.lasting:
            self.matrix = self.matrix[kept]

    def __str__(self):
        return f"recycling:{self.tree}"
