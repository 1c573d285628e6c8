"""STAND and Token Recycling: the exact law of whole steps, mistakes that it must catch, and texts of the real loop."""

from dataclasses import replace

import pytest
import torch

from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.schedule import schedule
from draftsmith.eval.verification.verifier import DraftVerifier, Law
from draftsmith.models.drafters.ngrams import NgramMemory
from draftsmith.models.drafters.recycling import RecyclingDrafter
from draftsmith.models.features import DistributionSpec, FeatureSpec
from draftsmith.models.grow import StaticTree
from draftsmith.models.tree import DraftTree, Kind
from tests.steps import Choices, Enumerated, OneNoise, Table, law_of_steps, learning, recycled, started

EXACT = 1e-12
SMALL = StaticTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0)), "small")
DEEP = StaticTree(((0,), (1,), (0, 0), (1, 0), (0, 0, 0)), "deep")
WIDE = StaticTree(((0,), (1,), (2,), (0, 0)), "wide")
BEFORE = [(0, 1, 2, 0, 1, 1, 2, 0, 2, 1), (0, 1, 1, 2, 0, 1, 2)]  # what was decoded before, on any vocabulary of three


def stand(tree, top, kind=Enumerated, mode="gumbel"):
    """STAND with entries of `top` ids."""
    drafter = kind(tree, mode, lasting=True)
    drafter.memory, drafter.feature_spec = (
        NgramMemory(4, top, 64),
        FeatureSpec((), distribution=DistributionSpec("committed", top)),
    )
    return drafter


def error(
    tree, top, rule="rejection", seed=0, kind=Enumerated, change=lambda tree: tree, length=4, vocab=3, mode="gumbel"
):
    p = Table(vocab, seed)
    drafter = started(stand(tree, top, kind, mode), p, BEFORE, (0, 1))
    rule = RULES[rule] if isinstance(rule, str) else rule
    return law_of_steps(drafter, rule, p, (0, 1), length, learning, change)


# The law


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
@pytest.mark.parametrize(
    ("tree", "top", "seed"), [(SMALL, 2, 0), (DEEP, 2, 1), (WIDE, 3, 2)], ids=["small", "deep", "wide"]
)
def test_steps_of_stand_have_the_targets_joint_law(rule, tree, top, seed):
    """Memory, draw, verify, learn, several times, until four tokens stand there."""
    found, accepted = error(tree, top, rule, seed)
    assert found < EXACT and accepted > 0.3, (found, accepted)


def test_steps_of_its_deterministic_mode_and_of_sampled_trees_under_matching_too():
    assert error(SMALL, 3, "match", mode="deterministic")[0] < EXACT
    assert error(SMALL, 2, "match")[0] < EXACT


def test_steps_of_token_recycling_have_the_targets_joint_law():
    for seed, rule in enumerate(("match", "rejection", "traversal")):
        p, drafter = Table(3, seed), RecyclingDrafter(3, SMALL, lasting=True)
        found, accepted = law_of_steps(started(drafter, p, BEFORE, (0, 1)), RULES[rule], p, (0, 1), 4, recycled)
        assert found < EXACT and accepted > 0.3, (rule, found, accepted)


# Mistakes


def edited(tree: DraftTree, edit) -> DraftTree:
    """One tree with other lists of children: edit([(node, q of its token)] of one parent, in draw order) -> nodes that
    stay, in their new order.
    """
    (parents,), rows = tree.parents.tolist(), schedule(tree).drawn[0].tolist()
    if tree.q is None:
        return tree

    def chance(node):
        row = rows[parents[node]]
        return float(tree.q[0, row][tree.ids[0, row] == tree.tokens[0, node]].sum())

    order, level = [0], [0]
    while level:
        level = [
            child
            for node in level
            for child in edit([(child, chance(child)) for child, p in enumerate(parents) if p == node])
        ]
        order += level
    place = {node: i for i, node in enumerate(order)}
    inner = [node for node in order if any(parents[child] == node for child in order)]
    keep = [rows[node] for node in inner]
    return replace(
        tree,
        tokens=tree.tokens[:, order],
        parents=torch.tensor([[place.get(parents[node], -1) for node in order]]),
        kind=tree.kind[:, order],
        q=tree.q[:, keep] if inner else None,
        ids=tree.ids[:, keep] if inner else None,
        known=None,
    )


def by_probability(tree):
    return edited(tree, lambda children: [n for n, _ in sorted(children, key=lambda c: -c[1])])


def pruned(tree):
    return edited(tree, lambda children: [n for n, chance in children if chance > 0.3])


def with_a_gap(tree):
    return edited(tree, lambda children: [n for rank, (n, _) in enumerate(children) if rank != 1 or len(children) < 3])


def same_q(tree):
    """Draws without replacement judged as if every sibling had been drawn from all of q."""
    return replace(tree, kind=torch.where(tree.parents >= 0, int(Kind.IID), 0).to(torch.int8), known=None)


def one_hot(tree):
    return DraftTree.of(tree.tokens, tree.parents)


class EachRow(DraftVerifier):
    """A mistake: every path from the root to a leaf samples the target for itself, and the longest match is taken."""

    name = "each row"

    def law(self, tree, logits):
        (parents,), p = tree.parents.tolist(), logits[0].softmax(-1).tolist()
        leaves = [node for node in range(tree.size) if node not in parents]
        token, rows = tree.tokens[0].tolist(), []
        for leaf in leaves:
            path = [leaf]
            while path[0] > 0:
                path.insert(0, parents[path[0]])
            rows.append(path)
        stop, after = torch.zeros(1, tree.size, dtype=torch.float64), torch.zeros(tree.size, logits.size(2)).double()
        choices = Choices()
        while choices.again():
            ends = []
            for path in rows:
                chances = [p[node][token[child]] for node, child in zip(path, path[1:])]
                ends.append(next((i for i, c in enumerate(chances) if choices.pick([c, 1 - c])), len(chances)))
            row = max(range(len(rows)), key=lambda r: ends[r])
            path, end = rows[row], ends[row]
            drawn = torch.tensor(p[path[end]], dtype=torch.float64)
            if end < len(path) - 1:
                drawn[token[path[end + 1]]] = 0.0  # this row's own draw was another one
            stop[0, path[end]] += choices.chance
            after[path[end]] += choices.chance * drawn / drawn.sum()
        return Law(stop, lambda last: after[last], tree.depths)


MISTAKES = {
    "siblings in the order of their probability": (WIDE, 3, {"change": by_probability}),
    "q is not normalised after a rejection": (WIDE, 3, {"change": same_q}),
    "unlikely draws are left out": (WIDE, 3, {"change": pruned}),
    "a draw between two others is left out": (WIDE, 3, {"change": with_a_gap}),
    "a node's noise serves its descendants": (DEEP, 2, {"kind": OneNoise}),
    "every row samples the target for itself": (SMALL, 3, {"rule": EachRow(), "mode": "deterministic"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_law_betrays_every_mistake(mistake):
    tree, top, options = MISTAKES[mistake]
    errors = [error(tree, top, seed=seed, length=3, **options)[0] for seed in range(3)]
    assert max(errors) > 0.01, errors


@pytest.mark.parametrize("change", [by_probability, pruned, with_a_gap])
def test_survivors_of_a_mistake_are_lossless_as_one_hot_edges(change):
    assert error(WIDE, 3, change=lambda tree: one_hot(change(tree)), length=3)[0] < EXACT
