"""READER: the exact law of whole steps, mistakes that it must catch, and what the trees hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from draftsmith.eval.verification.rules import RULES
from draftsmith.models.drafters.datastore import Datastore, write
from draftsmith.models.drafters.reader import ReaderDrafter
from draftsmith.models.drafters.retrieval import LENGTHS, LEVELS, RANKS, Estimates, Sketch, extend, matches
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.drafters.suffix_index import SuffixIndex
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


# Retrieval


def text_of(*tokens: int) -> SuffixIndex:
    index = SuffixIndex()
    index.append(0, list(tokens))
    return index


def test_the_longest_end_and_one_half_as_long_that_stood_in_more_places_are_matched():
    text = text_of(1, 2, 3, 4, 9, 3, 4, 8, 3, 4, 7, 1, 2, 3, 4)
    longest, shorter = matches([1, 2, 3, 4], text, None)
    assert (longest.length, shorter.length) == (4, 2) and len(shorter.places) == 4  # the end of the text is one of them
    assert [token for token, _ in longest.index.following(longest.places)] == [9]
    assert {token for token, _ in shorter.index.following(shorter.places)} == {9, 8, 7}
    assert matches([5], text, None) == [] and matches([6, 7], text, None)[0].length == 1


def sketch_of(text: SuffixIndex, context: list[int], most=9, fixed=1.0, row=0.0, estimates=None) -> Sketch:
    sketch, estimates = Sketch([context[-1]]), estimates or Estimates()
    extend(sketch, {0: matches(context, text, None)}, estimates, most, fixed, row)
    return sketch


def test_chances_are_products_of_shares_and_estimates():
    text, estimates = text_of(1, 2, 5, 1, 2, 5, 1, 2, 6, 1, 2), Estimates()
    sketch = sketch_of(text, [1, 2], 20)
    first, second = (estimates.of(Estimates.retrieved(0, 2, level)) for level in (0, 1))
    five, six = sketch.children[0][5], sketch.children[0][6]
    assert sketch.chances[five] == pytest.approx(first * 2 / 3) and sketch.chances[six] == pytest.approx(first / 3)
    assert sketch.chances[sketch.children[five][1]] == pytest.approx(first * 2 / 3 * second)


def test_nodes_are_added_while_they_pay():
    """The rows chosen are those with the most tokens a second among all numbers of rows."""
    text = text_of(*range(1, 30), 1, 2, 3)
    everything = sketch_of(text, [1, 2, 3], 20)
    for fixed, row in ((1.0, 0.3), (0.9, 0.1), (0.9, 0.05), (1.0, 0.01)):
        speed = [sum(everything.chances[:n]) / (fixed + row * n) for n in range(1, len(everything) + 1)]
        assert len(sketch_of(text, [1, 2, 3], 20, fixed, row)) == 1 + int(np.argmax(speed)), (fixed, row)
    assert len(sketch_of(text, [1, 2, 3], 0)) == 1 and everything.tokens[:4] == [3, 4, 5, 6]


def test_estimates_follow_what_came_true():
    text, estimates = text_of(1, 2, 3, 4, 5, 1, 2), Estimates()
    kinds = [Estimates.retrieved(0, 2, level) for level in range(3)]
    before = [estimates.of(kind) for kind in kinds]
    sketch_of(text, [1, 2], estimates=estimates).learn([3, 7], estimates)  # the first came true, the second did not
    assert estimates.of(kinds[0]) > before[0] and estimates.of(kinds[1]) < before[1]
    assert estimates.of(kinds[2]) == before[2]  # it was not tried
    for _ in range(100):
        estimates.note(kinds[1], 1.0, False)
    assert estimates.of(kinds[1]) < 0.05
    assert all(0 < estimates.of(kind) <= 0.98 for kind in range(len(Estimates.PRIOR)))


def test_kinds_are_numbered_without_a_gap():
    found = [Estimates.retrieved(s, n, level) for s in (0, 1) for n in LENGTHS for level in range(LEVELS)]
    found += [Estimates.drafted(level, rank) for level in range(LEVELS) for rank in range(RANKS)]
    assert found == list(range(len(Estimates.PRIOR)))
    assert Estimates.retrieved(1, 16, 40) == Estimates.retrieved(1, 9, 3)
    assert Estimates.drafted(9, 9) == len(found) - 1


def test_a_base_tree_of_padded_rows_keeps_its_order():
    tokens, parents = [4, 5, 6, 0, 7], (-1, 0, 0, -1, 2)
    sketch = Sketch.of(tokens, parents, (0, 1, 1, 0, 1), Estimates())
    assert (sketch.tokens, sketch.parents, sketch.kinds) == ([4, 5, 6, 7], [-1, 0, 0, 2], [0, 1, 1, 1])
    assert sketch.path(3) == [6, 7] and sketch.leaves(9) == [1, 3]
    twice = Sketch.of([4, 5, 5, 6], (-1, 0, 0, 2), (0, 2, 2, 2), Estimates())
    assert twice.parents == [-1, 0, 0, 2] and twice.children[0] == {5: 1}
