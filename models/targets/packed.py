"""Rows behind a packed training row: read-only, any number, each anchored at one of its tokens.

The packed row is run once and its keys and values are kept as constants. Rows that come later see a part of it and of
one another; they never change it, and what they leave is dropped. Probes (`[SPEC]`) and draft trees are such rows.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from draftsmith.models.argmax import argmax
from draftsmith.models.features import FeatureSpec, Packing
from draftsmith.models.tree import DraftTree

ROWS = 512  # rows of one forward behind a packed row: its mask is [ROWS, T + ROWS], and its logits [ROWS, V]


class KeptLayer(CacheLayerMixin):
    """One decoder layer's keys and values: those of the first forward are kept, later ones see them in front of their
    own.
    """

    is_sliding = False
    is_croppable = False

    def lazy_initialization(self, key_states, value_states):
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)

    def get_seq_length(self):
        return 0  # the first forward starts at position 0, later ones bring positions and masks of their own

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length


class KeptCache(Cache):
    """Keeps the keys and values of one forward."""

    def __init__(self, layers: int):
        super().__init__(layers=[KeptLayer() for _ in range(layers)])

    def packed(self, numbers: torch.Tensor, places: torch.Tensor) -> "KeptCache":
        """Turns right-padded rows [D, heads, S, d] into the packed row [1, heads, T, d]; token t is place places[t] of
        document numbers[t].
        """
        for layer in self.layers:
            layer.keys = layer.keys[numbers, :, places].transpose(0, 1)[None]
            layer.values = layer.values[numbers, :, places].transpose(0, 1)[None]
        return self

    def follow(self, at, own, before, places) -> None:
        """Told what the next rows are; keys and values need no more than their mask."""


class PackedPrefix:
    """One packed row that the target has processed. final [T, h]: its states after the final norm; ahead [T] int64:
    what the rope position of each token is more than its place; fed [T'] int64: the tokens that feed the drafter, among
    which callers count packed indices.
    """

    def __init__(
        self, target, cache: KeptCache, packing: Packing, final: torch.Tensor, ahead: torch.Tensor, fed: torch.Tensor
    ):
        self.target, self.cache, self.packing, self.final, self.ahead, self.fed = (
            target,
            cache,
            packing,
            final,
            ahead,
            fed,
        )
        lengths = torch.tensor(packing.borders).diff()
        self.numbers = torch.arange(len(lengths)).repeat_interleave(lengths).to(final.device)
        self.places = packing.positions.to(final.device)

    def run(self, at: torch.Tensor, positions: torch.Tensor, own: torch.Tensor, **inputs) -> torch.Tensor:
        """Rows at positions [Q], each behind the token of packed index at [Q]: it sees its document up to and including
        that token, and of the new rows those of own [Q, Q] bool (itself included). inputs: input_ids [1, Q] or
        inputs_embeds [1, Q, h]. -> states after the final norm [Q, h], with gradient to inputs_embeds where it is
        enabled.
        """
        before = (self.numbers[at, None] == self.numbers) & (
            torch.arange(len(self.places), device=at.device) <= at[:, None]
        )
        self.cache.follow(at, own, before, self.places)
        final, _ = self.target.behind(
            FeatureSpec(()),
            self.cache,
            positions[None],
            torch.cat([before, own], 1)[None],
            torch.cat([self.places, positions])[None],
            position_ids=(positions + self.ahead[at])[None],
            **inputs,
        )
        return final[0]

    def probe(self, embedding: torch.Tensor) -> torch.Tensor:
        """embedding [h] -> [P, h]: see `TrainingFeatures.probe`. The second of the two passes that together equal one
        pass over the row and a probe behind each of its tokens (OWL, arXiv 2510.07535), since real rows never see a
        probe.
        """
        rounds, states = self.packing.rows.to(self.final.device), []
        if not len(rounds):
            return embedding.expand(0, -1)  # still part of the graph: every process takes part in backward
        for at in rounds.split(ROWS):
            rows = embedding.to(self.final.dtype).expand(1, len(at), -1)
            states.append(
                self.run(
                    at, self.places[at] + 1, torch.eye(len(at), dtype=torch.bool, device=at.device), inputs_embeds=rows
                )
            )
        return torch.cat(states)

    @torch.no_grad()
    def score(self, trees: DraftTree, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P trees (their batch), the root of tree p being the token of packed index at [P], which the target has
        already processed; a node of depth d stands d positions behind it and sees its document up to the root, its
        ancestors and itself.

        -> (scores [P, N] fp32, log-probability of each node behind its parent, 0 for roots and padding; best [P, N]
        int64, the target's most probable next token at roots and at nodes with children, -1 elsewhere). Leaves are not
        processed.
        """
        at = self.fed[at]
        edges = trees.parents >= 0
        inner = torch.zeros_like(trees.parents).scatter_add_(1, trees.parents.clamp(min=0), edges.long()) > 0
        inner[:, 0] = True
        scores = torch.zeros(trees.tokens.shape, device=at.device)
        best, rows = torch.full_like(trees.tokens, -1), torch.zeros_like(trees.tokens)
        for group in torch.arange(len(at), device=at.device).split(max(1, ROWS // trees.size)):
            tree, node = inner[group].nonzero(as_tuple=True)
            tree = group[tree]
            logits = self.target.project(self._states(trees, at, tree, node)).float()
            best[tree, node] = argmax(logits)
            rows[tree, node] = torch.arange(len(tree), device=at.device)
            above, child = edges[group].nonzero(as_tuple=True)
            above = group[above]
            row = rows[above, trees.parents[above, child]]
            scores[above, child] = logits[row, trees.tokens[above, child]] - logits.logsumexp(-1)[row]
        return scores, best

    def _states(self, trees, at, tree, node):
        """States [R, h] of the nodes node [R] of the trees tree [R]: those of roots are known."""
        states, new = self.final[at[tree]], node > 0
        tree, node = tree[new], node[new]
        if len(tree):
            own = (tree[:, None] == tree) & trees.ancestors[tree[:, None], node[:, None], node]
            positions = self.places[at[tree]] + trees.depths[tree, node]
            states[new] = self.run(at[tree], positions, own, input_ids=trees.tokens[tree, node][None])
        return states
