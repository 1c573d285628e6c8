"""Target distributions: temperature, top-k, top-p and repetition penalty, applied per tree node with that node's own
history.

Plain and speculative decoding call the same functions. Randomness is keyed by (seed, request, absolute position), so
that sample-and-match reproduces plain sampling token for token.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.models.argmax import argmax
from draftsmith.models.errors import UserError
from draftsmith.models.features import Distribution
from draftsmith.models.noise import column, gumbel, uniform
from draftsmith.models.tree import DraftTree


@dataclass(frozen=True)
class Sampling:
    """temperature 0 = greedy; top_k 0 and top_p 1 = off; repetition_penalty 1 = off (over prompt and generated
    tokens).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if (
            not 0 <= self.temperature < math.inf
            or self.top_k < 0
            or not 0 < self.top_p <= 1
            or self.repetition_penalty <= 0
        ):
            raise UserError(
                f"sampling: found {self}, expected temperature >= 0, top_k >= 0, 0 < top_p <= 1, repetition_penalty > 0"
            )


def seen_tokens(history: list[list[int]], vocab_size: int, device) -> torch.Tensor:
    """[B, V] bool: which ids occur in each request's prompt and committed text."""
    seen = torch.zeros(len(history), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(history):
        seen[row, torch.tensor(ids, device=device)] = True
    return seen


def penalise(logits: torch.Tensor, penalty: float, seen: torch.Tensor, tree: DraftTree) -> torch.Tensor:
    """Repetition penalty (Keskar et al., 2019) for logits [B, N, V]: a node has seen [B, V], its ancestors and
    itself.
    """
    rows, nodes, ancestors = tree.ancestors.nonzero(as_tuple=True)
    mine = seen[:, None].repeat(1, tree.size, 1)
    mine[rows, nodes, tree.tokens[rows, ancestors]] = True
    return torch.where(mine, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def process(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None, tree: DraftTree) -> torch.Tensor:
    """logits [B, N, V] -> fp32 logits (fp64 stays) after repetition penalty, temperature, top-k and top-p (excluded ids
    are -inf).

    With temperature 0 only the penalty applies. `seen` is needed exactly when the penalty is not 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.repetition_penalty != 1.0:
        logits = penalise(logits, sampling.repetition_penalty, seen, tree)
    if sampling.temperature == 0:
        return logits
    if sampling.temperature != 1:  # a division that changes nothing still reads and writes all of them
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[..., -1:], float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        cut = mass.cumsum(-1) - mass >= sampling.top_p  # the first token that reaches top_p stays
        logits = logits.masked_fill(cut.scatter(-1, order, cut), float("-inf"))
    return logits


def most_probable(logits: torch.Tensor, top: int) -> Distribution:
    """The `top` most probable ids of processed logits [B, R, V]."""
    found = logits.softmax(-1).topk(min(top, logits.size(-1)))
    return Distribution(found.indices, found.values)


def perturb(logits: torch.Tensor, sampling: Sampling, requests: list[int], positions: torch.Tensor) -> torch.Tensor:
    """Processed logits [B, N, V], plus at temperature > 0 the Gumbel noise of (seed, request, position [B, N]); nodes
    of one depth share theirs.

    The argmax of the result is a sample of softmax(logits) (Gumbel-max). Unlike an inverse CDF, whose intervals in a
    long tail are as narrow as rounding errors, it changes only where two perturbed logits nearly tie.
    """
    if sampling.temperature == 0:
        return logits
    first = positions.amin(1, keepdim=True)
    level = positions - first
    levels = torch.arange(1 if positions.size(1) == 1 else int(level.max()) + 1, device=positions.device)
    noise = gumbel(sampling.seed, requests, first + levels, logits.size(-1), "choose")
    return logits + (
        noise if len(levels) == 1 else noise[torch.arange(len(level), device=level.device)[:, None], level]
    )


@dataclass(frozen=True)
class Noise:
    """What a verifier may draw in one cycle; positions: where each root stands. Keyed by the position behind the root,
    the first that the cycle emits: no two cycles share it, and a root alone gets exactly the noise of plain decoding.
    """

    sampling: Sampling
    requests: list[int]
    positions: list[int]

    def uniform(self, count: int, device) -> torch.Tensor:
        """[B, count] fp64 in [0, 1)."""
        return uniform(self.sampling.seed, self.requests, self._next(device), count, "accept")[:, 0]

    def gumbel(self, vocab_size: int, device) -> torch.Tensor:
        """[B, V] fp32."""
        return gumbel(self.sampling.seed, self.requests, self._next(device), vocab_size, "choose")[:, 0]

    def chosen(self, logits: torch.Tensor, tree: DraftTree) -> torch.Tensor:
        """Processed logits [B, N, V] -> [B, N] int64, the token that plain decoding emits behind each node. On a CPU,
        where noise is dear, nothing is drawn for nodes that are not reached along such tokens (0, which nobody reads).
        """
        if self.sampling.temperature == 0 or logits.device.type != "cpu":
            return argmax(self.perturb(logits, tree))
        chosen = torch.zeros_like(tree.tokens)
        tokens, parents, found = tree.tokens.numpy(), tree.parents.numpy(), chosen.numpy()
        above, level, depth = parents.clip(min=0), np.zeros(parents.shape, bool), 1
        level[:, 0] = True
        while level.any():
            rows, nodes = level.nonzero()
            going, which = np.unique(rows, return_inverse=True)
            requests = [self.requests[row] for row in going]
            places = column([self.positions[row] + depth for row in going])
            noise = gumbel(self.sampling.seed, requests, places, logits.size(-1), "choose")[:, 0]
            found[rows, nodes] = argmax(logits[rows, nodes] + noise[which])
            follows = np.take_along_axis(level, above, 1) & (tokens == np.take_along_axis(found, above, 1))
            level, depth = (parents >= 0) & follows, depth + 1
        return chosen

    def _next(self, device) -> torch.Tensor:
        return column(self.positions, device) + 1

    def perturb(self, logits: torch.Tensor, tree: DraftTree) -> torch.Tensor:
        """Processed logits [B, N, V] -> scores whose argmax is what plain decoding emits behind each node."""
        positions = torch.tensor(self.positions, device=logits.device)[:, None] + tree.depths + 1
        return perturb(logits, self.sampling, self.requests, positions)
