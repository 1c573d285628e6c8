"""Verification rules: (tree, the target's processed logits at every node, noise) -> accepted path and the next token.

A rule is described by its law, which holds no random number: with what probability the accepted path ends at each node,
and how the next token is distributed there. Accepting is one draw from each of the two. At temperature 0 every rule is
greedy matching (`follow`). Each rule says for which kinds and shapes of tree it is lossless and refuses the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from draftsmith.eval.sampling import Noise
from draftsmith.eval.verification.schedule import schedule
from draftsmith.models.argmax import argmax
from draftsmith.models.errors import UserError
from draftsmith.models.tree import DraftTree, Form, Kind


@dataclass(frozen=True)
class Accepted:
    """path [B, M] int64: accepted nodes, root first, padded with 0 after counts [B]; next_token [B]."""

    path: torch.Tensor
    counts: torch.Tensor
    next_token: torch.Tensor

    def cut(self, tree: DraftTree, emitted: list[int]) -> "Accepted":
        """What led to the first `emitted` tokens of each row (at most counts, at least one): the rest of a text that
        ends within the path is no part of it.
        """
        kept = torch.tensor(emitted, device=self.counts.device)
        at = self.path.gather(1, kept.clamp(max=self.path.size(1) - 1)[:, None])
        following = torch.where(kept < self.counts, tree.tokens.gather(1, at)[:, 0], self.next_token)
        return Accepted(self.path, kept, following)

    def trimmed(self, width: int | None = None) -> "Accepted":
        """Without the columns that no row uses. width: the greatest count, where the host knows it (otherwise it waits
        for the device).
        """
        return Accepted(self.path[:, : width or int(self.counts.max())], self.counts, self.next_token)


@dataclass(frozen=True)
class Law:
    """stop [B, N] fp64: the probability that the accepted path ends at each node; following(last [B]) -> [B, V]:
    weights, of any sum, of the token behind it. depths [B, N].
    """

    stop: torch.Tensor
    following: Callable[[torch.Tensor], torch.Tensor]
    depths: torch.Tensor

    @property
    def expected(self) -> torch.Tensor:
        """[B] fp64: accepted drafted tokens in expectation over the verifier's noise, given the tree (Rao-Blackwell);
        the bonus token is extra.
        """
        return (self.stop * self.depths).sum(1)

    def draw(self, uniform: torch.Tensor) -> torch.Tensor:
        """uniform [B, 1] fp64 in [0, 1) -> last [B], the node where the accepted path ends."""
        below = self.stop.cumsum(1)
        # The first node whose cumulated probability exceeds the draw: never one of probability 0
        return (below <= uniform * below[:, -1:]).sum(1).clamp(max=self.stop.size(1) - 1)


class Verifier:
    """A rule by its law. Subclasses say what they refuse: kinds of edge here, shapes in `_wrong_shape`."""

    name: str
    lossless = True
    kinds = frozenset(Kind)
    remedy = ""

    def check(self, tree: DraftTree) -> None:
        """Raises UserError naming what was found, what is expected and what helps."""
        found = refusal(self, tree.form, 0 if tree.q is None else tree.q.size(1))
        if found:
            raise UserError(f"{self.name}: found {found}" + (f" ({self.remedy})" if self.remedy else ""))

    def law(self, tree: DraftTree, logits: torch.Tensor) -> Law:
        """logits [B, N, V] processed, temperature above 0."""
        raise NotImplementedError

    def __call__(self, tree: DraftTree, logits: torch.Tensor, noise: Noise) -> Accepted:
        self.check(tree)
        law = self.law(tree, logits)
        last = law.draw(noise.uniform(1, logits.device))
        return accept(tree, last, law.following(last), noise)

    def _wrong_kind(self, form: Form, rows: int) -> str:
        """rows: how many rows of q the tree carries."""
        kinds = {kind for parents, kinds in zip(form.parents, form.kinds) for p, kind in zip(parents, kinds) if p >= 0}
        if not kinds <= self.kinds:
            names = lambda some: ", ".join(Kind(k).name for k in sorted(some))  # noqa: E731
            return f"{names(kinds - self.kinds)} edges, expected {names(self.kinds)}"
        return ""

    def _wrong_shape(self, form: Form) -> str:
        return ""


class DraftVerifier(Verifier):
    """A rule that reads the draft distributions: sampled edges must come with them, the children of a node be sampled
    in one way.
    """

    def _wrong_kind(self, form, rows):
        drawn = max(len(form.drawn(b)) for b in range(len(form.parents)))
        if drawn > rows:
            return f"sampled edges under {drawn} nodes and q rows for {rows}, expected one each"
        for parents, kinds in zip(form.parents, form.kinds):
            ways = {(p, kind) for p, kind in zip(parents, kinds) if p >= 0}
            if any((p, Kind.IID) in ways for p, kind in ways if kind == Kind.WITHOUT_REPLACEMENT):
                return (
                    "WITHOUT_REPLACEMENT beside IID edges under one node, expected one of them "
                    "(sample all children of a node in one way)"
                )
        return super()._wrong_kind(form, rows)


@lru_cache(maxsize=64)
def refusal(rule: Verifier, form: Form, rows: int) -> str:
    """Why a rule is not lossless for trees of this form, or nothing; found once for each form."""
    return rule._wrong_kind(form, rows) or rule._wrong_shape(form)


def accept(tree: DraftTree, last: torch.Tensor, weights: torch.Tensor, noise: Noise) -> Accepted:
    """The path to last [B] and a token drawn from weights [B, V] by Gumbel-max."""
    plan, rows = schedule(tree), torch.arange(len(last), device=last.device)
    token = argmax(weights.log() + noise.gumbel(weights.size(1), weights.device))
    return Accepted(plan.paths[rows, last], plan.depths[rows, last] + 1, token)


def follow(tree: DraftTree, chosen: torch.Tensor) -> Accepted:
    """Follows the tokens that the target itself chooses: chosen [B, N], its token after each node. Siblings may be
    repeated.
    """
    path, counts = tree.follow(chosen)
    last = path.gather(1, counts[:, None] - 1)
    path = path.masked_fill(torch.arange(path.size(1), device=path.device) >= counts[:, None], 0)
    return Accepted(path, counts, chosen.gather(1, last)[:, 0])


class SampleAndMatch(Verifier):
    """Samples the target at every node with position-keyed noise and follows its choices: emits token for token what
    plain decoding with the same noise emits. Lossless for every tree that does not know this noise, and the best that
    ONE_HOT trees allow; it makes no use of q.
    """

    name = "match"

    def law(self, tree, logits):
        """The walk stays on a text with the target's probability of it; of the nodes that spell the same text the first
        one counts.
        """
        plan, p = schedule(tree), logits.softmax(-1)
        (batch, size), steps = tree.tokens.shape, torch.arange(plan.paths.size(2), device=p.device)
        rows, parents = torch.arange(batch, device=p.device)[:, None], tree.parents.clamp(min=0)
        paths, on_path = plan.paths, steps <= plan.depths[..., None]
        edge = p.double()[rows, parents, tree.tokens].index_fill(
            1, torch.zeros(1, dtype=torch.int64, device=p.device), 1.0
        )
        texts = tree.tokens[rows[..., None], paths].masked_fill(~(on_path & plan.real[..., None]), -1)
        first = (texts[:, :, None] == texts[:, None]).all(-1).to(torch.int8).argmax(2)  # [B, N]
        counts = plan.real & (first == torch.arange(size, device=p.device))
        reach = torch.where(on_path, edge[rows[..., None], paths], 1.0).prod(-1) * counts
        above = first.gather(1, parents)
        taken = torch.zeros_like(reach).scatter_add_(1, above[:, 1:], reach[:, 1:])

        def following(last):
            below = ((above == last[:, None]) & counts).index_fill(
                1, torch.zeros(1, dtype=torch.int64, device=p.device), False
            )
            drafted = torch.zeros_like(p[:, 0]).scatter_add_(1, tree.tokens, below.to(p.dtype))
            return p[rows[:, 0], last] * (1 - drafted)

        return Law((reach - taken).clamp(min=0), following, plan.depths)

    def __call__(self, tree, logits, noise):
        return follow(tree, noise.chosen(logits, tree))


MATCH = SampleAndMatch()
