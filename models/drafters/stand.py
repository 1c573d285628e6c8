"""STAND (Song et al., 2025): trees drawn from an n-gram memory of the target's own distributions. Nothing is trained.

Where a problem is answered again and again, or an answer repeats itself, the memory knows how the target went on. A
static shape says how many children the node of each slot gets: that many draws without replacement from q, the averaged
distribution behind the longest string of the node's text that the memory knows. The tree carries q, so that a rule can
weigh it against the target's own distribution. Memory and shape depend on the past alone, hence only speed depends on
them.
"""

from typing import Literal, get_args

import numpy as np
import torch

from draftsmith.models.drafters.ngrams import NONE, NgramMemory
from draftsmith.models.drafters.static import Offer, fill
from draftsmith.models.errors import UserError
from draftsmith.models.features import DistributionSpec, Features, FeatureSpec
from draftsmith.models.grow import StaticTree
from draftsmith.models.noise import Draw, without_replacement
from draftsmith.models.topology import heuristic
from draftsmith.models.transfer import on_host
from draftsmith.models.tree import DraftTree

ORDERS, TOP = 4, 10
HEURISTIC = StaticTree(tuple(heuristic()), "stand")
Mode = Literal["gumbel", "sequential", "deterministic"]


class StandDrafter:
    """mode: `gumbel` draws the children of all nodes of a level at once (the largest of log q + Gumbel noise, in
    order), `sequential` one after the other (the same law), `deterministic` takes the most probable ones; at
    temperature 0 all do that.

    lasting: all that is decoded while this drafter lives belongs to one problem, is sampled in one way, and shares one
    memory (trajectories in a batch or one batch after another, beams of a search). Otherwise each request has a memory
    of its own, and results do not depend on what else is decoded. max_entries: of the memory.
    """

    feature_spec = FeatureSpec(taps=(), distribution=DistributionSpec("committed", TOP))
    idle = "propose"

    def __init__(
        self, tree: StaticTree = HEURISTIC, mode: Mode = "gumbel", lasting: bool = False, max_entries: int = 1_000_000
    ):
        if mode not in get_args(Mode):
            raise UserError(f"stand: found mode {mode!r}, expected {', '.join(get_args(Mode))}")
        self.tree, self.mode, self.lasting, self.size = tree, mode, lasting, tree.size
        self.memory = NgramMemory(ORDERS, TOP, max_entries)
        inner = tree.children[0] > 0
        self.inner, self.noise_of = int(inner.sum()), inner.cumsum() - 1  # each inner slot has noise of its own

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def begin(self, features: Features, root: torch.Tensor) -> None:
        if not self.lasting:
            self.memory.clear()
        self.texts, self.spaces, self.root = np.zeros((0, ORDERS), np.int32), np.zeros(0, int), root[:0]
        self.provisional = False
        self.join(features, root)

    def join(self, features: Features, root: torch.Tensor) -> None:
        places = features.lengths[:, None] + torch.arange(1 - ORDERS, 0, device=root.device)
        tokens = features.tokens.gather(1, places.clamp(min=0)).masked_fill(places < 0, NONE)
        (texts,) = on_host(torch.cat([tokens, root[:, None]], 1))
        self.texts = np.concatenate([self.texts, texts])  # [B, ORDERS], the root last
        spaces = np.zeros(len(root), int) if self.lasting else self.spaces.max(initial=-1) + 1 + np.arange(len(root))
        self.spaces = np.concatenate([self.spaces, spaces])
        self.root = torch.cat([self.root, root])

    def observe(self, features: Features, root: torch.Tensor) -> None:
        told, self.root = features.distribution, root
        tokens, lengths, ids, probs, last = on_host(features.tokens, features.lengths, told.ids, told.probs, root)
        texts = np.concatenate([self.texts, tokens[:, 1:]], 1)
        ends = np.lib.stride_tricks.sliding_window_view(texts, ORDERS, 1)  # [B, M, ORDERS]
        rows, steps = np.nonzero(np.arange(tokens.shape[1]) < lengths[:, None])
        if not self.provisional:
            self.memory.update(ends[rows, steps], self.spaces[rows], ids[rows, steps], probs[rows, steps])
        self.texts = np.concatenate([ends[np.arange(len(last)), lengths - 1, 1:], last[:, None]], 1)

    def propose(self, draw: Draw) -> DraftTree:
        sampled = self.mode != "deterministic" and draw.temperature > 0
        noise = draw.uniform(self.inner * TOP).numpy().reshape(-1, self.inner, TOP) if sampled else None

        def offer(rows, slots, ends):
            entries = self.memory.find(ends, self.spaces[rows])
            known = (entries != NONE)[:, None]
            ids, probs = self.memory.ids[entries], np.where(known, self.memory.probs[entries], 0).astype(np.float64)
            counts = (probs > 0).sum(1)
            if not sampled:
                return Offer(ids, counts)
            q = probs / np.maximum(probs.sum(1, keepdims=True), np.finfo(float).tiny)
            order = self.order(q, noise[rows, self.noise_of[slots]])
            return Offer(np.take_along_axis(ids, order, 1), counts, ids, q)

        return fill(self.tree, self.texts, offer, self.root.device)

    def order(self, q: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """q, uniform [n, TOP] -> [n, TOP]: the columns in the order in which they are drawn, those with q = 0 last."""
        if self.mode == "sequential":
            return without_replacement(torch.from_numpy(q), torch.from_numpy(uniform)).numpy()
        with np.errstate(divide="ignore"):
            keys = np.log(q) - np.log(-np.log(np.maximum(uniform, np.finfo(float).tiny)))
        return np.argsort(-keys, axis=1, kind="stable")

    def mark(self):
        state = self.root, self.texts, self.provisional
        self.provisional = True
        return state

    def restore(self, state) -> None:
        self.root, self.texts, self.provisional = state

    def select(self, rows: torch.Tensor) -> None:
        kept = rows.cpu().numpy()
        self.texts, self.spaces, self.root = self.texts[kept], self.spaces[kept], self.root[rows]

    def __str__(self):
        return f"stand:{self.mode}:{self.tree}"
