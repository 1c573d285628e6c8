"""The soft-budget tree loss: its limit is the expected accepted length of decoding's tree, its gradient a finite
difference, and equal nodes teach nothing.
"""

from types import SimpleNamespace

import pytest
import torch

from draftsmith.models.grow import DynamicTree
from draftsmith.train import gto
from draftsmith.train.soft_budget import SoftBudget, best_candidates, reach, soft_budget_loss
from tests.conftest import tiny_target, trained_head
from tests.models.heads.documents import documents
from tests.train.test_gto import one_by_one, scored

SPEC = SimpleNamespace(roots=6, tree="dynamic:3x3x9", theta=0.5, omega=0.3)


def draws(count=5, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = -torch.rand(count, size, dtype=torch.float64, generator=generator).cumsum(1)
    return scores, torch.rand(count, size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("budget", [1, 4, 11])
def test_the_limit_is_minus_the_sum_over_the_nodes_of_the_tree(budget):
    scores, probs = draws()
    hard = -probs[:, :budget].sum(1) / budget
    errors = [
        (soft_budget_loss(scores, probs, budget, t, baseline=False) - hard).abs().max() for t in (0.1, 1e-2, 1e-4)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-12
    whole = soft_budget_loss(scores, probs, 12, 0.1, baseline=False)  # all candidates are in the tree
    torch.testing.assert_close(whole, -probs.sum(1) / 12)


def test_in_a_trees_limit_it_is_the_expected_accepted_length_of_decodings_tree(target, head):
    """At every root: budget-B tree of `DynamicTree`, its expected accepted tokens by GTO's exact reward."""
    features, policy = scored(target, head, documents(target), [2, 2, 2]), DynamicTree(3, 3, 9)
    at = torch.tensor([3, 5, 17, 20, 30])
    with torch.no_grad():
        found = policy.candidates(head, head.root_at(features, at), features.tokens[at])
        scores, tree = best_candidates(found, features.tokens[at], 16)
        own = policy.grow(head, head.root_at(features, at), features.tokens[at])
        probs = reach(tree, features.score(tree, at)[0])
        want = gto.reward(own, one_by_one(target, features)(own, at)[0], "node_sum")
        got = -8 * soft_budget_loss(scores, probs, 8, 1e-5, baseline=False)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (tree.parents[:, 1:] < torch.arange(1, 17)).all()  # parents stand before their children


def test_gradients_add_up_to_zero_and_vanish_where_all_are_equal():
    scores, probs = draws()
    scores.requires_grad_()
    gradient = torch.autograd.grad(soft_budget_loss(scores, probs, 4, 0.5).sum(), scores)[0]
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    loss = soft_budget_loss(scores, torch.full_like(probs, 0.3), 4, 0.5)
    assert loss.abs().max() < 1e-15 and torch.autograd.grad(loss.sum(), scores)[0].abs().max() < 1e-15


def test_the_gradient_is_a_finite_difference_with_threshold_and_baseline_held():
    scores, probs = draws(1)
    scores.requires_grad_()
    gradient = torch.autograd.grad(soft_budget_loss(scores, probs, 4, 0.5).sum(), scores)[0][0]
    threshold = scores[0, 3:5].detach().mean()
    inside = ((scores.detach() - threshold) / 0.5).sigmoid()
    weight = inside * (1 - inside)
    held = probs - (weight * probs).sum() / weight.sum()
    value = lambda s: float(-(held * ((s - threshold) / 0.5).sigmoid()).sum() / 4)  # noqa: E731
    for i in range(12):
        step = torch.zeros_like(scores.detach())
        step[0, i] = 1e-5
        difference = (value(scores.detach() + step) - value(scores.detach() - step)) / 2e-5
        assert float(gradient[i]) == pytest.approx(difference, abs=1e-9)


def test_gradients_reach_the_heads_weights():
    """The whole objective on a packed row; its roots are drawn by the features' seed, the same each time."""
    target = tiny_target()
    head = trained_head(target)
    features = scored(target, head, documents(target), [1, 1, 1])
    objective = SoftBudget(SPEC, set())
    loss, sums = objective(head, features)
    again, _ = objective(head, features)
    assert loss.item() == again.item() and sums["soft_budget"][0] == 6 and sums["soft_budget"][2] > 0
    gradients = torch.autograd.grad(loss, [head.fc.weight, head.lm_head.weight, head.midlayer.self_attn.k_proj.weight])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_steps_along_the_gradient_accept_more():
    """What it is for: a head trained on it alone has trees with a greater expected length, on the rows it saw."""
    target = tiny_target()
    head = trained_head(target)
    features = scored(target, head, documents(target), [1, 1, 1])
    objective = SoftBudget(SimpleNamespace(**{**vars(SPEC), "roots": 30}), set())
    optimizer, accepted = torch.optim.AdamW(head.parameters(), lr=3e-3), []
    for _ in range(12):
        loss, sums = objective(head, features)
        accepted.append(float(sums["soft_budget"][2] / sums["soft_budget"][0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accepted[-1] > 1.05 * accepted[0], accepted


def test_a_row_without_roots_has_a_zero_with_gradients(target, head):
    features = scored(target, head, documents(target), [14, 12, 10])
    loss, sums = SoftBudget(SPEC, set())(head, features)
    loss.backward()
    assert loss.item() == 0 and sums["soft_budget"][0] == 0 and all(p.grad is not None for p in head.parameters())
