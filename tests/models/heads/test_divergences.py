"""Objectives: each one's limit is the plain one, gradients are finite differences, and reach weighs what drafting
reaches.
"""

from dataclasses import replace

import pytest
import torch

from draftsmith.models.features import Teacher
from draftsmith.models.heads import Eagle3Objective, EagleConfig, EagleHead, EagleObjective, OwlConfig, OwlHead
from draftsmith.models.heads.distill import TeacherDistribution, soft_cross_entropy
from draftsmith.models.heads.divergences import PLAIN, Distillation, overlap, soften
from draftsmith.models.heads.frozen import Weights, teacher_losses
from draftsmith.models.heads.owl import OwlObjective
from tests.conftest import tiny_head, tiny_target
from tests.models.heads.documents import packed

GOALS = [
    PLAIN,
    Distillation(teacher_temperature=0.5),
    Distillation(teacher_temperature=0.0),
    Distillation(total_variation=1.0),
    Distillation(total_variation=0.3, teacher_temperature=2.0),
    Distillation(reach="overlap"),
    Distillation(reach="greedy", total_variation=0.5),
]
ids = lambda goal: f"T={goal.teacher_temperature:g} tv={goal.total_variation:g} reach={goal.reach}"  # noqa: E731


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STEPS, ROWS, WIDTH, VOCAB = 3, 9, 6, 11


def plain_losses(logits, teacher, goal, covered=None, mass=None):
    """logits [K, P, V], teacher logits [P, V]: the definition, row by row -> (losses, weights by reach) [K, P]; row i
    of step k is supervised at token i + k."""
    losses, reach = torch.zeros(STEPS, ROWS, dtype=torch.float64), torch.ones(STEPS, ROWS, dtype=torch.float64)
    for i in range(ROWS):
        chance = 1.0
        for k in range(min(STEPS, ROWS - i)):
            p, q = soften(teacher[i + k][None], goal.teacher_temperature)[0], logits[k, i].softmax(-1)
            ce, tv = -(p * q.log()).sum(), 0.5 * (p - q).abs().sum()
            ok = covered is None or bool(covered[i + k])
            losses[k, i] = ((1 - goal.total_variation) * ce + goal.total_variation * tv) * ok
            reach[k, i] = chance
            common = torch.minimum(p * (1.0 if mass is None else mass[i + k]), q).sum()
            right = float(q.argmax() == teacher[i + k].argmax()) * ok
            chance = chance * {"none": 1.0, "greedy": right, "overlap": float(common.detach())}[goal.reach]
    return losses, reach


@pytest.mark.parametrize("goal", GOALS, ids=ids)
def test_the_fused_loss_and_its_gradients_are_the_definition(goal, monkeypatch):
    monkeypatch.setattr("draftsmith.models.heads.distill.CHUNK", 1)  # 64 rows at a time would be all of them
    monkeypatch.setattr("draftsmith.models.heads.distill.chunk_rows", lambda width, device: 4)
    monkeypatch.setattr("draftsmith.models.heads.distill.product_rows", lambda width, device: 10)
    weight, teacher = draw(VOCAB, WIDTH).requires_grad_(), 2 * draw(ROWS, VOCAB, seed=1)
    states = draw(STEPS, ROWS, WIDTH, seed=2).requires_grad_()
    covered = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) < 0.8
    mass = torch.linspace(0.5, 1.0, ROWS, dtype=torch.float64)
    distribution = TeacherDistribution(soften(teacher, goal.teacher_temperature), teacher.argmax(-1), covered, mass)
    here = [torch.arange(ROWS - k)[torch.arange(ROWS - k) % 5 != k] for k in range(STEPS)]  # some rows take no part
    flat = torch.cat([states[k, rows] for k, rows in enumerate(here)])
    scale = torch.rand(len(flat), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    total, losses, right = soft_cross_entropy(flat, (weight,), distribution, here, scale, goal)
    got = torch.autograd.grad(total, (states, weight))
    want, reach = plain_losses(states @ weight.T, teacher, goal, covered, mass)
    if goal.reach != "none":  # a row's chance is the product over those steps that it took part in
        reach = torch.ones_like(reach)
        for k in range(1, STEPS):
            reach[k] = reach[k - 1].clone()
            before = here[k - 1]
            q = (states[k - 1, before] @ weight.T).softmax(-1).detach()
            at = before + k - 1
            p = distribution.probs[at] * mass[at, None]
            hit = (q.argmax(-1) == distribution.choice[at]) & covered[at]
            reach[k, before] = reach[k, before] * (hit if goal.reach == "greedy" else torch.minimum(p, q).sum(-1))
    picked = torch.cat([want[k, rows] for k, rows in enumerate(here)])
    weights = torch.cat([reach[k, rows] for k, rows in enumerate(here)]).detach() * scale
    torch.testing.assert_close(losses, picked.detach())
    torch.testing.assert_close(total, (picked * weights).sum())
    for a, b in zip(got, torch.autograd.grad((picked * weights).sum(), (states, weight))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("goal", GOALS, ids=ids)
@pytest.mark.parametrize("weights", [Weights(1.0, 0.0, 3), Weights(0.1, 1.0, 3), Weights(1.0, 0.0, 1, kl=True)])
def test_the_same_behind_a_frozen_output_head(goal, weights, monkeypatch):
    monkeypatch.setattr("draftsmith.models.heads.frozen.chunk_rows", lambda width, device: 4)
    monkeypatch.setattr("draftsmith.models.heads.frozen.product_rows", lambda width, device: 10)
    matrix, final = draw(VOCAB, WIDTH), draw(ROWS, WIDTH, seed=1)
    states = draw(STEPS, ROWS, WIDTH, seed=2).requires_grad_()
    project = lambda x, ids=None: x @ matrix.T  # noqa: E731
    losses, _, reach = teacher_losses(states, Teacher(final, project), project, VOCAB, weights, goal)
    want, chances = plain_losses(states @ matrix.T, final @ matrix.T, goal)
    p = soften(final @ matrix.T, goal.teacher_temperature)
    top = p.topk(weights.k).indices
    for k in range(STEPS):
        logs = (states[k, : ROWS - k] @ matrix.T).log_softmax(-1)
        part = -(p.gather(1, top)[k:] * logs.gather(1, top[k:])).sum(-1)
        entropy = -torch.xlogy(p, p).sum(-1)[k:] * weights.kl * (1 - goal.total_variation)
        expected = weights.ce * want[k, : ROWS - k] + weights.top * part - weights.ce * entropy
        torch.testing.assert_close(losses[k, : ROWS - k], expected)
        torch.testing.assert_close(reach[k, : ROWS - k], chances[k, : ROWS - k].detach())
        got = torch.autograd.grad(losses[k, : ROWS - k].sum(), states, retain_graph=True)[0]
        torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), states, retain_graph=True)[0])


def test_limits():
    """Temperature to 0 is the argmax alone; total variation is 1 - overlap and 0 between equal laws."""
    logits = draw(50, VOCAB)
    torch.testing.assert_close(soften(logits, 1e-4), soften(logits, 0.0))
    assert torch.equal(soften(logits, 1.0), logits.softmax(-1))
    p, q = logits.softmax(-1), draw(50, VOCAB, seed=1).softmax(-1)
    torch.testing.assert_close(1 - overlap(p, q), 0.5 * (p - q).abs().sum(-1))
    torch.testing.assert_close(overlap(p, p), torch.ones(50, dtype=torch.float64))


def test_reach_of_a_drafter_that_is_always_right_weighs_nothing_down():
    """The target's own states as the head's: overlap and greedy reach are 1 everywhere, the loss is the plain one."""
    matrix, final = draw(VOCAB, WIDTH), draw(ROWS, WIDTH, seed=1)
    states = torch.stack([final.roll(-k, 0) for k in range(STEPS)])
    project = lambda x, ids=None: x @ matrix.T  # noqa: E731
    for kind in ("greedy", "overlap"):
        _, _, reach = teacher_losses(
            states, Teacher(final, project), project, VOCAB, Weights(1.0, 0.0, 3), Distillation(reach=kind)
        )
        for k in range(STEPS):
            torch.testing.assert_close(reach[k, : ROWS - k], torch.ones(ROWS - k, dtype=torch.float64))


CHANGES = [{"teacher_temperature": 0.0}, {"total_variation": 1.0}, {"reach": "overlap"}, {"reach": "greedy"}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("kind", ["eagle3", "eagle", "owl"])
def test_every_head_takes_every_key(kind, change, target):
    """The loss changes, its gradient is that of a finite difference (fp64)."""
    target.model.double()
    torch.manual_seed(0)
    if kind == "eagle3":
        head, goal = tiny_head(target, 40).double(), Eagle3Objective(3, 1.0)
    elif kind == "eagle":
        head = EagleHead(EagleConfig.for_target(target.config), target.shared).double()
        goal = EagleObjective(3, 1.0, 0.0, 1, 0.0)
    else:
        head = OwlHead(OwlConfig.for_target(target.config, n_predict=3), target.shared).double()
        goal = OwlObjective(3, 0.0, "target")
    features, other = packed(target, head), replace(goal, **change)
    value = head.loss(features, other)[0]
    assert value.item() != pytest.approx(head.loss(features, goal)[0].item(), rel=1e-4)
    if "reach" in change or kind == "eagle":  # a chance is held, and so are the states that later steps begin with
        return
    parameter = max(head.parameters(), key=torch.numel)
    direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slope, values = torch.autograd.grad(value, parameter)[0], []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * 1e-5 * direction
            values.append(float(head.loss(features, other)[0]))
            parameter -= sign * 1e-5 * direction
    assert float((slope * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_data_labels_stay_owls_own_objective():
    """Left out, the key changes nothing: the loss is the cross-entropy on the text's own tokens."""
    target = tiny_target()
    torch.manual_seed(0)
    head = OwlHead(OwlConfig.for_target(target.config, n_predict=3), target.shared)
    features = packed(target, head)
    want = 0.0
    for k, (rows, states) in enumerate(head.unroll(features, 3)):
        logs = head.logits(states).log_softmax(-1)
        want = want - logs.gather(1, features.tokens[rows + 2 + k, None]).mean()
    torch.testing.assert_close(head.loss(features, OwlObjective(3, 0.0))[0], want)
