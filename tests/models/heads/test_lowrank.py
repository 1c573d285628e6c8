"""The low-rank output head: the dense one at full rank, and what its parts learn."""

import pytest
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.heads import Eagle3Config, Eagle3Objective
from draftsmith.models.heads.lowrank import LowRankHead
from tests.conftest import tiny_head, tiny_target
from tests.models.heads.documents import packed


def matrix(vocab=61, hidden=12, seed=0):
    return torch.randn(vocab, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head_of(weight, rank, candidates):
    head = LowRankHead(weight.size(1), weight.size(0), rank, candidates).double()
    head.start_from(weight)
    return head


@pytest.mark.parametrize("candidates", [1, 5, 61])
def test_at_full_rank_it_is_the_dense_head_whatever_the_candidates(candidates):
    weight, x = matrix(), matrix(3 * 7, 12, 1).view(3, 7, 12)
    torch.testing.assert_close(head_of(weight, 12, candidates)(x), x @ weight.T, atol=1e-12, rtol=1e-12)


def test_the_start_is_the_best_approximation_of_its_rank():
    """Eckart and Young: the squared error is the sum of the squares of the singular values that are left out."""
    weight = matrix()
    values = torch.linalg.svdvals(weight)
    for rank in (1, 5, 11):
        head = head_of(weight, rank, 1)
        error = (head.up.weight @ head.down.weight - weight).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum())


def test_candidates_are_scored_exactly_and_the_rest_at_low_rank():
    weight, x = matrix(), matrix(9, 12, 1)
    head = head_of(weight, 4, 6)
    low, exact, got = x @ head.down.weight.T @ head.up.weight.T, x @ weight.T, head(x)
    chosen = torch.zeros_like(got, dtype=torch.bool).scatter_(1, low.topk(6).indices, True)
    torch.testing.assert_close(got, torch.where(chosen, exact, low))


def losses(rank, candidates, steps=2):
    """The loss of a tiny head on packed rows: (head, loss), fp64."""
    target = tiny_target()
    target.model.double()
    torch.manual_seed(0)
    head = tiny_head(target, None, candidate_rank=rank, num_candidates=candidates).double()
    head.lm_head.start_from(target.head.weight)
    return head, lambda: head.loss(packed(target, head), Eagle3Objective(steps, 0.8))[0], target


def test_at_full_rank_the_trunk_learns_what_it_learns_with_the_dense_frozen_head():
    head, low, target = losses(32, 61)
    dense = tiny_head(target).double()
    dense.load_state_dict({k: v for k, v in head.state_dict().items() if "lm_head" not in k}, strict=False)
    dense.lm_head.weight.data.copy_(target.head.weight)
    value, other = low(), dense.loss(packed(target, dense), Eagle3Objective(2, 0.8))[0]
    torch.testing.assert_close(value, other)
    value.backward(), other.backward()
    for name, parameter in dense.named_parameters():
        if "lm_head" not in name:
            torch.testing.assert_close(head.get_parameter(name).grad, parameter.grad, atol=1e-9, rtol=1e-6)


def test_the_trunks_gradient_is_a_finite_difference_and_the_scores_learn_by_their_own_cross_entropy():
    head, loss, target = losses(6, 61)  # every token is a candidate: nothing is chosen, so that z is smooth
    loss().backward()
    direction = torch.randn(head.fc.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            head.fc.weight += sign * 1e-5 * direction
            values.append(float(loss()))
            head.fc.weight -= sign * 1e-5 * direction
    assert (head.fc.weight.grad * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    features, want = packed(target, head), 0.0
    teacher = target.project(features.teacher.final).softmax(-1)
    for k, (rows, output) in enumerate(head.unroll(features, 2)):
        at = torch.searchsorted(features.packing.rows, rows) + k
        state = head.norm(output).detach()
        low = state @ head.lm_head.down.weight.T @ head.lm_head.up.weight.T
        want = want - 0.8**k * (teacher[at] * low.log_softmax(-1)).sum(-1).mean()
    parameters = [head.lm_head.up.weight, head.lm_head.down.weight]
    for parameter, gradient in zip(parameters, torch.autograd.grad(want, parameters)):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"candidate_rank": 4}, "num_candidates: found None with candidate_rank 4"),
        (
            {"candidate_rank": 4, "num_candidates": 5, "draft_vocab_size": 40},
            "draft_vocab_size: found 40, expected null",
        ),
        ({"candidate_rank": 33, "num_candidates": 5}, "candidate_rank: found 33, expected at most 32"),
        ({"candidate_rank": 4, "num_candidates": 62}, "num_candidates: found 62, expected at most 61"),
    ],
)
def test_keys_that_do_not_go_together(target, shape, message):
    with pytest.raises(UserError, match=message):
        Eagle3Config.for_target(target.config, **shape)
