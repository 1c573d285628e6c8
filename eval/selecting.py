"""Not-a-Bandit (ICLR 2026): online choice among drafters, from what all of them would have proposed.

Whichever drafter proposed, the verified text is the target's own. Its distributions, which are there already, score all
drafters: those that draft for next to nothing propose in every pass, and their trees are compared with how the text
went on; trained heads predict behind the verified rows, which their caches need anyway. So the learner sees the loss of
every drafter, not only of the one that it played. A choice depends on the past alone: no law changes.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

import numpy as np
import torch

from draftsmith.eval.measurement.shared_prefill import Tapped, shared_spec
from draftsmith.models.drafters import Drafter
from draftsmith.models.drafters.learners import (
    Learner,
    NormalHedge,
    length_of_product,
    length_of_rao_blackwell,
    length_of_realised,
    loss_of,
)
from draftsmith.models.errors import UserError
from draftsmith.models.features import Distribution, DistributionSpec, Features, FeatureSpec
from draftsmith.models.noise import column, uniform
from draftsmith.models.transfer import on_host
from draftsmith.models.tree import DraftTree, rows_of

TOP = 32  # ids of the target's distributions that are looked at; the rest counts as nobody's
HORIZON = 10  # positions of a loss: a drafter that goes deeper is scored up to here
RESOLVED = 1e-3  # what is left of a product that further positions no longer change
Estimator = Literal["product", "rb", "realised"]


@dataclass
class Walk:
    """One drafter at one place: with what chance, and whether, each further token would have been accepted."""

    gammas: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    done: bool = False

    def add(self, gamma: float, hit: float) -> None:
        self.gammas.append(gamma)
        self.hits.append(hit)
        self.done = hit == 0 or len(self.hits) == HORIZON


class Replayed(Walk):
    """A proposed tree, down which the text goes while it stands there: exact, and unbiased."""

    def __init__(self, tokens: Sequence[int], parents: Sequence[int]):
        super().__init__()
        self.tokens, self.parents, self.node = tokens, parents, 0

    def step(self, p: dict[int, float], token: int) -> None:
        children = {t: n for n, (t, above) in enumerate(zip(self.tokens, self.parents)) if above == self.node and n}
        if not children:
            self.done = True
        if self.done:
            return
        self.add(sum(p.get(t, 0.0) for t in children), float(token in children))
        self.node = children.get(token, 0)


@dataclass
class Start:
    """A place where a pass began. chosen: the drafter that was; walks: of all drafters."""

    place: int
    chosen: int
    walks: dict[int, Walk]


@dataclass
class Ledger:
    """What is known of one request. place: how many tokens it has emitted; p: the target's distribution behind each of
    the latest ones; sets {drafter: {place: what it would have proposed there}} of those that predict behind rows.
    """

    learner: Learner
    place: int = 0
    p: dict[int, tuple[dict[int, float], int]] = field(default_factory=dict)
    sets: dict[int, dict[int, dict[int, float] | frozenset]] = field(default_factory=dict)
    starts: deque[Start] = field(default_factory=deque)
    history: list[tuple[int, list[float] | None]] = field(default_factory=list)


class SelectingDrafter:
    """drafters {name: drafter}, which can be idle (`Drafter.idle`). learner(count) -> a learner, one a
    request. estimator of the acceptance length: `product` for heads (chances behind every row; trees that were really
    proposed are scored by `rb`), `rb` or `realised`. every: a head that is not chosen predicts in every so many passes,
    behind all rows since then at once, the heads in turn; default: twice as many passes as there are heads, so that one
    idle head predicts in every other pass (twice as many rows cost a head hardly more). replay: heads propose in every
    pass too, instead (exact, at the price of drafting). lasting: one learner for all requests, as long as this drafter
    lives.

    A loss is fed once all drafters' are known, in the order of the text, up to `HORIZON` tokens and `every` passes
    late. What an unfinished text leaves open is never fed. choices: {drafter: passes}; caught_up {drafter: rows that it
    was told while it was idle}; seconds: of this thread, for all that the chosen drafter alone would not have needed (a
    chosen head predicts behind its rows and at its root at once, which counts as its own). Raises UserError for
    drafters that cannot be idle.
    """

    idle = None

    def __init__(
        self,
        drafters: dict[str, Drafter],
        width: int,
        learner: Callable[[int], Learner] = NormalHedge,
        estimator: Estimator = "product",
        every: int | None = None,
        replay: bool = False,
        lasting: bool = False,
    ):
        for name, drafter in drafters.items():
            if drafter.idle is None:
                raise UserError(
                    f"select: found {name}, expected trained drafters, suffix, lookup or others that go on while "
                    f"another one drafts"
                )
        self.names, self.drafters = list(drafters), list(drafters.values())
        self.shared = learner(len(drafters)) if lasting else None
        self.learner, self.estimator, self.replay = learner, estimator, replay
        self.every = every or max(1, 2 * sum(drafter.idle == "predict" for drafter in self.drafters))
        self.bandit = learner(len(self.drafters)).bandit
        shared = shared_spec([drafter.feature_spec for drafter in self.drafters])
        asked = [d.feature_spec.distribution for d in self.drafters if d.feature_spec.distribution is not None]
        rows = "nodes" if any(spec.rows == "nodes" for spec in asked) else "committed"
        top = max([spec.top for spec in asked] + [0 if self.bandit else TOP])
        self.feature_spec: FeatureSpec = replace(shared, distribution=DistributionSpec(rows, top) if top else None)
        self.views = [Tapped(drafter, shared, width) for drafter in self.drafters]
        self.size = max(drafter.size for drafter in self.drafters)
        self.choices = dict.fromkeys(self.names, 0)
        self.caught_up = dict.fromkeys(self.names, 0)
        self.seconds, self.passes = 0.0, 0

    @property
    def nbytes(self) -> int:
        return sum(drafter.nbytes for drafter in self.drafters)

    def __str__(self):
        return f"select:{','.join(self.names)}"

    def begin(self, features: Features, root: torch.Tensor) -> None:
        self.ledgers, self.root = [], root[:0]
        for view in self.views:
            view.begin(features, root)
        self._join(root)

    def join(self, features: Features, root: torch.Tensor) -> None:
        for view in self.views:
            view.join(features, root)
        self._join(root)

    def _join(self, root: torch.Tensor) -> None:
        count = len(self.drafters)
        self.ledgers += [Ledger(self.shared or self.learner(count), sets={i: {} for i in self._heads}) for _ in root]
        self.root = torch.cat([self.root, root])

    def select(self, rows: torch.Tensor) -> None:
        for drafter in self.drafters:
            drafter.select(rows)
        self.ledgers, self.root = [self.ledgers[row] for row in rows.tolist()], self.root[rows]

    @property
    def _heads(self) -> list[int]:
        """The drafters that predict behind rows."""
        if self.bandit or self.replay:
            return []
        return [i for i, d in enumerate(self.drafters) if d.idle == "predict"]

    def propose(self, draw) -> DraftTree:
        clock = time.thread_time()
        weights = [ledger.learner.weights() for ledger in self.ledgers]
        # A stream of its own: choices do not move the noise of trees and tokens
        chances = uniform(draw.seed, draw.requests, column(draw.positions), 1, "select")[:, 0, 0].tolist()
        chosen = [
            min(int(np.searchsorted(w.cumsum(), c * w.sum(), side="right")), len(w) - 1)
            for w, c in zip(weights, chances)
        ]
        played, heads = sorted(set(chosen)), self._heads
        due = {i for turn, i in enumerate(heads) if (self.passes + turn * self.every // len(heads)) % self.every == 0}
        trees, followed, spent = {}, {}, 0.0
        for i in heads:
            if i in played or i in due:
                before = time.thread_time()
                predicted, counts, followed[i] = self.drafters[i].follow()
                spent += time.thread_time() - before if i in played else 0.0  # its root's is among them
                self._note(i, predicted, counts, draw.temperature)
        for i, drafter in enumerate(self.drafters):
            if i in played:
                before = time.thread_time()
                trees[i] = drafter.propose_behind(followed[i], draw) if i in followed else drafter.propose(draw)
                spent += time.thread_time() - before
            elif not self.bandit and i not in heads:
                trees[i] = drafter.propose(draw)
        rows = {i: tree.tokens.tolist() for i, tree in trees.items() if i not in heads and not self.bandit}
        for b, (ledger, choice) in enumerate(zip(self.ledgers, chosen)):
            self.choices[self.names[choice]] += 1
            if not self.bandit:
                walks = {i: Replayed(tokens[b], trees[i].form.row(b)[0]) for i, tokens in rows.items()}
                ledger.starts.append(Start(ledger.place, choice, walks | {i: Walk() for i in heads}))
        self.passes += 1
        self.chosen, self.tree, self.temperature = chosen, rows_of(trees[i] for i in chosen), draw.temperature
        self.seconds += time.thread_time() - clock - spent
        return self.tree

    def _note(self, number: int, predicted: torch.Tensor, counts: torch.Tensor, temperature: float) -> None:
        """A head's predictions behind the rows that it has not been asked for yet, by place."""
        policy, ids = self.drafters[number].policy, self.drafters[number].head.ids
        drawn = temperature > 0 and policy.draws
        if drawn:
            scores, picks = (predicted / (policy.temperature or temperature)).softmax(-1).topk(min(TOP, len(ids)))
        else:
            scores, picks = predicted.topk(min(policy.branches, len(ids)))
        tokens, values, lengths = on_host(ids[picks], scores, counts)
        for b, ledger in enumerate(self.ledgers):
            first_place = ledger.place - int(lengths[b]) + 1  # the last row is the one before the root
            for k in range(int(lengths[b])):
                some = tokens[b, k].tolist()
                found = dict(zip(some, values[b, k].tolist())) if drawn else frozenset(some)
                ledger.sets[number][first_place + k] = found

    def observe(self, features: Features, root: torch.Tensor) -> None:
        clock, spent = time.thread_time(), 0.0
        told, path = features.distribution, None
        if told is not None and self.feature_spec.distribution.rows == "nodes":
            path = self.tree_path(features)
            rows = torch.arange(len(path), device=path.device)[:, None]
            told = Distribution(told.ids[rows, path], told.probs[rows, path])
        count = features.lengths.tolist()
        for i, view in enumerate(self.views):
            asked = self.drafters[i].feature_spec.distribution
            own = view.own(features)
            if asked is None:
                own = replace(own, distribution=None)
            else:
                seen = features.distribution if asked.rows == "nodes" else told
                own = replace(own, distribution=Distribution(seen.ids[..., : asked.top], seen.probs[..., : asked.top]))
                if asked.rows == "nodes":
                    self.drafters[i].proposed = self.tree
            before = time.thread_time()
            self.drafters[i].observe(own, root)
            if i in self.chosen:
                spent += time.thread_time() - before
            self.caught_up[self.names[i]] += sum(n for n, choice in zip(count, self.chosen) if choice != i)
        self.root = root
        self._learn(features, told, root)
        self.seconds += time.thread_time() - clock - spent

    def tree_path(self, features: Features) -> torch.Tensor:
        """[B, M]: the committed nodes in the tree that was verified."""
        found = []
        for tokens, parents, kept, n in zip(
            self.tree.tokens.tolist(), self.tree.parents.tolist(), features.tokens.tolist(), features.lengths.tolist()
        ):
            path = [0]
            for token in kept[1:n]:
                path.append(next(i for i, (t, p) in enumerate(zip(tokens, parents)) if p == path[-1] and t == token))
            found.append(path + [0] * (len(kept) - len(path)))
        return torch.tensor(found, device=features.tokens.device)

    def _learn(self, features: Features, told: Distribution | None, root: torch.Tensor) -> None:
        tokens, lengths, roots = on_host(features.tokens, features.lengths, root)
        if self.bandit:
            for ledger, choice, n in zip(self.ledgers, self.chosen, lengths.tolist()):
                losses = np.full(len(self.drafters), loss_of(min(n, HORIZON + 1), HORIZON))
                ledger.learner.feed(losses, choice)
                ledger.history.append((choice, None))
                ledger.place += n
            return
        ids, probs = on_host(told.ids, told.probs)
        for b, (ledger, n) in enumerate(zip(self.ledgers, lengths.tolist())):
            emitted = [*tokens[b, 1:n].tolist(), int(roots[b])]
            for k, token in enumerate(emitted):
                row = {int(ids[b, k, 0]): 1.0} if self.temperature == 0 else likely(ids[b, k], probs[b, k])
                ledger.p[ledger.place + k] = row, token
                for start in ledger.starts:
                    for walk in start.walks.values():
                        if isinstance(walk, Replayed):
                            walk.step(row, token)
            ledger.place += n
            self._feed(ledger)

    def _feed(self, ledger: Ledger) -> None:
        """Brings the walks of heads up to date and feeds what all drafters' walks say of the first places."""
        while ledger.starts:
            start = ledger.starts[0]
            for i, walk in start.walks.items():
                if not isinstance(walk, Replayed):
                    self._advance(ledger, i, start.place, walk)
            if not all(walk.done for walk in start.walks.values()):
                break
            losses = [loss_of(self.length(start.walks[i]), HORIZON) for i in range(len(self.drafters))]
            ledger.learner.feed(np.array(losses), start.chosen)
            ledger.history.append((start.chosen, losses))
            ledger.starts.popleft()
        first = ledger.starts[0].place if ledger.starts else ledger.place
        for known in (ledger.p, *ledger.sets.values()):
            for place in list(takewhile(lambda place: place < first, known)):
                del known[place]

    def _advance(self, ledger: Ledger, number: int, place: int, walk: Walk) -> None:
        depth = min(HORIZON, self.drafters[number].policy.depth)
        while len(walk.hits) < depth:
            at = place + len(walk.hits)
            if at not in ledger.p or at not in ledger.sets[number]:
                return
            (row, token), found = ledger.p[at], ledger.sets[number][at]
            if isinstance(found, frozenset):
                gamma, hit = sum(p for t, p in row.items() if t in found), float(token in found)
            else:
                gamma = sum(min(p, found.get(t, 0.0)) for t, p in row.items())
                hit = min(1.0, found.get(token, 0.0) / max(row.get(token, 0.0), 1e-12))
            walk.gammas.append(gamma)
            walk.hits.append(hit)
            left = np.prod(walk.gammas if self.estimator == "product" else walk.hits)
            if left < RESOLVED:
                break
        walk.done = True

    def length(self, walk: Walk) -> float:
        """The acceptance length that a finished walk says."""
        gammas, hits = np.array(walk.gammas), np.array(walk.hits)
        if not len(gammas):
            return 1.0
        if self.estimator == "realised":
            return length_of_realised(hits)
        if self.estimator == "product" and not isinstance(walk, Replayed):
            return length_of_product(gammas)
        return length_of_rao_blackwell(gammas, hits)


def likely(ids: np.ndarray, probs: np.ndarray) -> dict[int, float]:
    return {int(t): float(p) for t, p in zip(ids, probs) if p > 0}
