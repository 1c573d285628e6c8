"""Drafting with a head of one layer: batches, and trees rooted in packed rows, equal one tree behind one document."""

import pytest
import torch

from draftsmith.models.features import Features
from tests.models.heads.documents import cut, packed, place
from tests.models.heads.test_eagle import ZERO, eagle_head, features_of


@pytest.fixture
def exact(target):
    """Both in fp64: the random head's features are large, and rounding with them."""
    target.model.double()
    return target, eagle_head(target).double()


def test_drafting_in_a_ragged_batch_equals_one_by_one_and_leaves_no_trace(exact):
    target, head = exact
    features, roots = features_of(target), torch.tensor([[5], [6], [7]])
    tokens, parents = torch.tensor([[1, 2], [3, 4], [8, 9]]), torch.tensor([[0, 0], [0, 0], [0, 0]])
    context = head.prefill(features)
    first, beam = head.expand(head.roots(context), roots, ZERO.expand(3, 1))
    second, beam = head.expand(beam, tokens, parents)
    third, _ = head.expand(beam, tokens, torch.tensor([[1, 0], [0, 0], [1, 1]]))
    for b, n in enumerate(features.lengths.tolist()):
        alone = head.prefill(cut(features, b, n))
        a, beam = head.expand(head.roots(alone), roots[b : b + 1], ZERO)
        c, beam = head.expand(beam, tokens[b : b + 1], parents[:1])
        d, _ = head.expand(beam, tokens[b : b + 1], torch.tensor([[1, 0], [0, 0], [1, 1]])[b : b + 1])
        for batched, single in ((first, a), (second, c), (third, d)):
            torch.testing.assert_close(batched[b], single[0], atol=1e-5, rtol=1e-5)
    grown = head.prefill(cut(features, 0, 5))
    for start, stop in ((5, 8), (8, 9), (9, 12)):
        _, beam = head.expand(head.roots(grown), features.tokens[:1, start].view(1, 1), ZERO)
        head.expand(beam, torch.tensor([[3, 4]]), ZERO.expand(-1, 2))
        head.extend(
            grown,
            Features(features.tokens[:1, start:stop], features.hidden[:1, start:stop], torch.tensor([stop - start])),
        )
    fresh = head.prefill(cut(features, 0, 12))
    (a, _), (b, _) = (head.expand(head.roots(context), roots[:1], ZERO) for context in (grown, fresh))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grown.cache.store[..., :12, :], fresh.cache.store[..., :12, :], atol=1e-5, rtol=1e-5)


def test_trees_hung_in_a_packed_row_equal_trees_behind_the_truncated_document(exact):
    target, head = exact
    training, decoding = packed(target, head), features_of(target)
    at = torch.tensor([1, 6, 13, 15, 20, 30])
    tokens, parents = (
        torch.tensor([[1, 2], [3, 4], [8, 9], [5, 6], [7, 8], [0, 3]]),
        torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [0, 0], [1, 0]]),
    )
    roots = training.tokens[at][:, None]
    first, beam = head.expand(head.root_at(training, at), roots, ZERO.expand(6, 1))
    second, beam = head.expand(beam, tokens, ZERO.expand(6, 2))
    third, _ = head.expand(beam, tokens.flip(1), parents)
    for p, (b, t) in enumerate(place(training, i) for i in at.tolist()):
        a, alone = head.expand(head.roots(head.prefill(cut(decoding, b, t))), roots[p : p + 1], ZERO)
        c, alone = head.expand(alone, tokens[p : p + 1], ZERO.expand(-1, 2))
        d, _ = head.expand(alone, tokens[p : p + 1].flip(1), parents[p : p + 1])
        for rooted, single in ((first, a), (second, c), (third, d)):
            torch.testing.assert_close(rooted[p], single[0], atol=1e-5, rtol=1e-5)
    gradient = torch.autograd.grad(third.sum(), list(head.parameters()))
    assert all(g.abs().sum() > 0 for g in gradient)


def test_gradient_through_a_hung_tree_is_that_of_a_finite_difference(exact):
    """Unlike training over its own features, nothing is detached between the levels of a tree."""
    target, head = exact
    features, at = packed(target, head), torch.tensor([6, 20])

    def score():
        _, beam = head.expand(head.root_at(features, at), features.tokens[at][:, None], ZERO.expand(2, 1))
        return head.expand(beam, torch.tensor([[1, 2], [3, 4]]), ZERO.expand(2, 2))[1].hidden.square().sum()

    direction = (
        torch.randn(head.fc.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-4
    )
    gradient, values = torch.autograd.grad(score(), head.fc.weight)[0], []
    for sign in (1, -1):
        with torch.no_grad():
            head.fc.weight += sign * direction
            values.append(score().item())
            head.fc.weight -= sign * direction
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2, rel=1e-3)
