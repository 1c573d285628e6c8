"""READER: the exact law of whole steps, mistakes that it must catch, and what the trees hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from draftsmith.eval.verification.rules import RULES
from draftsmith.models.drafters.datastore import Datastore, write
from draftsmith.models.drafters.reader import ReaderDrafter
from draftsmith.models.drafters.retrieval import Sketch
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.grow import StaticTree
from draftsmith.models.tree import DraftTree, Form, Kind
from tests.models.drafters.test_stand import BEFORE, stand
from tests.steps import Table, law_of_steps, learning, started

EXACT = 1e-12
SMALL = StaticTree(((0,), (0, 0)), "small")
WIDE = StaticTree(((0,), (1,), (0, 0)), "wide")
STORED = [(0, 1, 2, 1, 0, 1, 2, 2), (1, 2, 0, 0, 1, 1, 2)]


class Stepping(ReaderDrafter):
    """READER over STAND whose draws are choices."""

    def begin(self, features, root):
        super().begin(features, root)
        self.sketches = [Sketch([0]) for _ in root]

    def prepare(self, choices):
        if isinstance(self.base, StandDrafter):
            self.base.prepare(choices)


def reading(drafter) -> tuple:
    """What READER's next trees depend on beside the text."""
    (_, estimates), base = drafter.learned[0], drafter.base
    return tuple(estimates.hits), tuple(estimates.trials), learning(base) if isinstance(base, StandDrafter) else ()


@pytest.fixture
def store(tmp_path):
    write([np.array(text) for text in STORED], tmp_path / "store", 3, {})
    return Datastore(tmp_path / "store")


def error(base, rule, seed=0, length=4, store=None, kind=Stepping):
    """(total variation, accepted tokens in expectation, how many trees had siblings of several kinds)."""
    p, seen = Table(3, seed), [0]

    def looked_at(tree):
        pairs = {(parent, kind) for parent, kind in zip(*tree.form.row(0)) if parent >= 0}
        seen[0] += len(pairs) > len({parent for parent, _ in pairs})
        return tree

    drafter = started(kind(base, store, 3, 0.01, lasting=True), p, BEFORE, (0, 1))
    return *law_of_steps(drafter, RULES[rule], p, (0, 1), length, reading, looked_at), seen[0]


# The law


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
@pytest.mark.parametrize(
    ("tree", "top", "seed", "length"),
    [(SMALL, 2, 0, 5), (WIDE, 2, 1, 4), (WIDE, 3, 2, 3)],
    ids=["small", "wide", "three"],
)
def test_steps_over_stand_have_the_targets_joint_law(rule, tree, top, seed, length, store):
    """Memory, draw, retrieve, merge, verify, learn, several times: siblings were drawn, retrieved, or both."""
    found, accepted, mixed = error(stand(tree, top), rule, seed, length, store)
    assert found < EXACT and accepted > 0.3 and mixed > 10, (found, accepted, mixed)


@pytest.mark.parametrize("rule", ["match", "rejection", "traversal"])
def test_steps_alone_and_under_matching_too(rule, store):
    for options in ({}, {"store": store}):
        found, accepted, _ = error(None, rule, length=4, **options)
        assert found < EXACT and accepted > 0.3, (options, found, accepted)
    if rule == "match":
        assert error(stand(WIDE, 2), rule, store=store)[0] < EXACT


# Mistakes


def rebuilt(tree: DraftTree, order: list[int], kinds: list[int]) -> DraftTree:
    """One tree of the nodes `order` (parents first), of other kinds; every node's row of q stays its own."""
    (parents,), before = tree.parents.tolist(), tree.form.drawn(0)
    place = {node: i for i, node in enumerate(order)}
    form = Form.shared([place.get(parents[node], -1) for node in order], Kind.ONE_HOT)
    form = replace(form, kinds=(tuple(kinds[node] for node in order),))
    keep = [before.index(order[node]) for node in form.drawn(0)]
    q, ids = (None, None) if not keep else (tree.q[:, keep], tree.ids[:, keep])
    parents, kind = torch.tensor(form.parents), torch.tensor(form.kinds, dtype=torch.int8)
    return DraftTree(tree.tokens[:, order], parents, kind, q, ids, form)


class RetrievedFirst(Stepping):
    """What was retrieved, drawn or not, stands before its siblings, which count as drawn from all of q."""

    def propose(self, draw):
        tree, (sketch,), order = super().propose(draw), self.sketches, [0]
        retrieved = [kind == Kind.ONE_HOT or len(claims) > 1 for kind, claims in zip(sketch.kinds, sketch.claims)]
        for node in order:
            below = [child for child, parent in enumerate(sketch.parents) if parent == node]
            order += sorted(below, key=lambda child: not retrieved[child])
        return rebuilt(tree, order, [0 if retrieved[n] else k for n, k in enumerate(sketch.kinds)])


class Pruned(Stepping):
    """Drawn leaves that were not retrieved as well are left out."""

    def propose(self, draw):
        tree, (sketch,) = super().propose(draw), self.sketches
        drop = [bool(k) and len(c) == 1 and not b for k, c, b in zip(sketch.kinds, sketch.claims, sketch.children)]
        return rebuilt(tree, [node for node in range(len(sketch)) if not drop[node]], sketch.kinds)


class AllDrawn(Stepping):
    """Retrieved siblings of drawn nodes count as drawn."""

    def propose(self, draw):
        tree, (sketch,) = super().propose(draw), self.sketches
        drawn = {parent for parent, kind in zip(sketch.parents, sketch.kinds) if kind}
        kinds = [int(Kind.WITHOUT_REPLACEMENT) if p in drawn else k for p, k in zip(sketch.parents, sketch.kinds)]
        return rebuilt(tree, list(range(len(sketch))), kinds)


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
@pytest.mark.parametrize("mistake", [RetrievedFirst, Pruned, AllDrawn])
def test_the_law_betrays_every_mistake(mistake, rule, store):
    found = error(stand(SMALL, 3), rule, 0, 3, store, kind=mistake)[0]
    assert found > 0.001, found
