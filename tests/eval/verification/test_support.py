"""Draft distributions of a few ids each: the rules on these columns are the rules on the whole vocabulary."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.spectr import KSeq
from draftsmith.models.tree import DraftTree, Kind
from tests.eval.verification.test_verifier import CHAINS, EXACT, models
from tests.laws import Bulk, all_trees, as_trees, distance, emitted, numbers


def sparse(tree: DraftTree, columns: int) -> DraftTree:
    """The same trees with ids of their own for every row of q, the most probable first; unused columns hold id 0."""
    if tree.q is None:
        return tree
    q, order = tree.q.topk(min(columns, tree.q.size(2)))
    q, order = (torch.nn.functional.pad(x, (0, columns - q.size(2))) for x in (q, order))
    return replace(tree, q=q, ids=torch.where(q > 0, tree.ids[order], 0))


def drawn(model):
    parents, kinds, p, q, fixed, ids = model
    tokens, chance = all_trees(parents, kinds, q, fixed)
    texts = numbers(tokens, parents, p.size(1))
    return as_trees(tokens, parents, kinds, q, ids), texts, chance, p


@settings(deadline=None, max_examples=100)
@given(models(vocab=4), st.integers(4, 6))
def test_rules_on_columns_have_the_targets_law(model, columns):
    tree, texts, chance, p = drawn(model)
    for name in ("traversal", "rejection", "match"):
        out = emitted(RULES[name], sparse(tree, columns), texts, chance, p)
        assert distance(out, p, int(tree.depths.max()) + 1) < EXACT, (name, model)


@settings(deadline=None, max_examples=60)
@given(models(vocab=4), st.integers(4, 6), st.integers(0, 2**32))
def test_rules_on_columns_are_those_on_the_vocabulary(model, columns, seed):
    """Thresholds, rows of the next token, and the very path and token that the same random numbers give."""
    tree, texts, _, p = drawn(model)
    few, logits = sparse(tree, columns), p[texts].log()
    for name in ("traversal", "rejection"):
        dense, ours = RULES[name].law(tree, logits), RULES[name].law(few, logits)
        torch.testing.assert_close(ours.stop, dense.stop, rtol=0, atol=1e-14)
        for node in range(tree.size):
            last = torch.full((len(texts),), node)
            torch.testing.assert_close(ours.following(last), dense.following(last), rtol=0, atol=1e-14)
        noise = lambda: Bulk(len(texts), torch.Generator().manual_seed(seed))  # noqa: E731
        for one, other in zip(
            vars(RULES[name](tree, logits, noise())).values(), vars(RULES[name](few, logits, noise())).values()
        ):
            assert torch.equal(one, other), (name, model)


@pytest.mark.parametrize("name", ["block", "spectr"])
def test_the_other_rules_take_such_trees_too(name):
    parents = CHAINS[2] if name == "block" else [-1, 0, 0]
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(40, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    tree, texts, chance, _ = drawn((parents, [Kind.IID] * 3, p, q, [0] * 3, torch.arange(3)))
    few = sparse(tree, 4)
    assert distance(emitted(RULES[name], few, texts, chance, p), p, int(tree.depths.max()) + 1) < EXACT
    law, want = RULES[name].law(few, p[texts].log()), RULES[name].law(tree, p[texts].log())
    assert isinstance(RULES[name], KSeq) == (name == "spectr") and torch.equal(law.stop, want.stop)


@pytest.mark.parametrize("name", ["rejection", "traversal"])
def test_a_target_that_draws_from_the_columns_alone_leaves_nothing_outside(name):
    """Top-k sampling: the mass of the other ids is exactly 0, and no rounding lets one of them through."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.full((1, 3, 50), float("-inf"))
    logits[..., :4] = torch.randn(1, 3, 4, generator=generator)
    q = torch.tensor([[[0.7, 0.2, 0.1]]])
    tree = DraftTree(
        torch.tensor([[9, 0, 2]]),
        torch.tensor([[-1, 0, 0]]),
        torch.full((1, 3), int(Kind.WITHOUT_REPLACEMENT), dtype=torch.int8),
        q,
        torch.tensor([[[0, 2, 3]]]),
    )
    law = RULES[name].law(tree, logits)
    for node in range(3):
        after = law.following(torch.tensor([node]))[0]
        assert after.isfinite().all() and float(after[4:].abs().max()) == 0 and float(after.sum()) > 0
    for seed in range(50):
        accepted = RULES[name](tree, logits, Bulk(1, torch.Generator().manual_seed(seed)))
        assert int(accepted.next_token) < 4
