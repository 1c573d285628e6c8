"""DREAM's training: the losses' formulas at every step, noise, the choice of the middle state, and what it learns."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import DreamConfig, DreamHead
from tests.models.heads.test_dream import PLAIN, H, both, dream_head, pack_images
from tests.models.targets.test_vision import packed, prompts_of
from tests.tiny_vision import tiny_vision


@both
@pytest.mark.parametrize("steps", [1, 3])
def test_loss_and_gradients_equal_the_plain_formulas(family, steps):
    """Features and the middle are supervised at step 0 alone."""
    target = tiny_vision(family)
    head, objective = dream_head(target), replace(PLAIN, steps=steps)
    features = packed(family, target, head.feature_spec)[0]
    (loss, sums), rows, final = head.loss(features, objective), features.packing.rows, features.teacher.final
    found, first = (
        head.unroll(features, steps),
        torch.cat(
            [
                d.x1.new_zeros(len(d.kept), H).index_copy(0, d.kept.nonzero().flatten(), d.x1)
                for d in head.documents(features)
            ]
        )[rows + 1],
    )
    p = target.project(final).log_softmax(-1)
    feature = F.smooth_l1_loss(found[0][1], final, reduction="none").mean(-1)
    middle = F.smooth_l1_loss(first, features.middle[rows + 1], reduction="none").mean(-1)
    want, kls = 0.2 * feature.mean() + 0.2 * middle.mean(), []
    for k, (supervised, outputs) in enumerate(found):
        law, q = p[torch.searchsorted(rows, supervised) + k], target.project(outputs).log_softmax(-1)
        kls.append((law.exp() * (law - q)).sum(-1))
        want = want + kls[-1].mean()
        assert sums["right"][k] == (law.argmax(-1) == q.argmax(-1)).sum() and sums["rows"][k] == len(supervised)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    for name, values in (("feature", [feature]), ("middle", [middle]), ("kl", kls)):
        torch.testing.assert_close(sums[name], torch.stack([v.sum() for v in values]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums["loss"][0], (0.2 * feature + 0.2 * middle + kls[0]).sum(), atol=1e-4, rtol=1e-4)
    for a, b in zip(
        torch.autograd.grad(loss, list(head.parameters())), torch.autograd.grad(want, list(head.parameters()))
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    half = head.loss(features, objective, [2.0 * n for n in features.packing.counts(steps)])[0]
    torch.testing.assert_close(half * 2, loss)


def test_noise_is_keyed_and_on_the_states_alone():
    target = tiny_vision("llava")
    head = dream_head(target)
    features = packed("llava", target, head.feature_spec)[0]
    noise = head._noisy(features, 0.2).hidden - features.hidden
    assert not noise[:, :H].any() and noise[:, H:].abs().amax() > 0
    assert torch.equal(head._noisy(features, 0.2).hidden, head._noisy(features, 0.2).hidden)
    assert not torch.equal(head._noisy(features, 0.2).hidden, head._noisy(replace(features, seed=1), 0.2).hidden)


@pytest.mark.parametrize(("granularity", "feature"), [("token", "output"), ("token", "input"), ("sample", "output")])
def test_the_middle_state_is_the_one_of_least_entropy(granularity, feature):
    target = tiny_vision("llava")
    head = dream_head(target, middle_granularity=granularity, middle_feature=feature, middle_first=1, middle_last=4)
    features, documents, packing = packed("llava", target, head.feature_spec)
    states = packed("llava", target, replace(head.feature_spec, taps=(1, 2, 3, 4)))[0].hidden.unflatten(-1, (4, H))
    entropies = features.entropies
    if granularity == "sample":
        entropies = torch.cat(
            [entropies[a:b].mean(0).expand(b - a, -1) for a, b in zip(packing.borders, packing.borders[1:])]
        )
    chosen = entropies.argmin(-1) + (feature == "output")
    torch.testing.assert_close(features.middle, states[torch.arange(len(chosen)), chosen], atol=1e-5, rtol=1e-5)


def test_no_taught_rows_cost_nothing():
    target = tiny_vision("llava")
    head = dream_head(target)
    features = packed("llava", target, head.feature_spec)[0]
    features = replace(features, packing=replace(features.packing, mask=torch.zeros_like(features.packing.mask)))
    loss, sums = head.loss(features, PLAIN)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None for p in head.parameters()) and sums["rows"].tolist() == [0]
    assert [tuple(outputs.shape) for _, outputs in head.unroll(features, 2)] == [(0, H), (0, H)]


def test_a_head_overfits_a_batch_and_then_drafts_further():
    target, prompts = tiny_vision("llava"), prompts_of("llava")
    plain = generate(target, NoDrafter(), prompts, Sampling(), 20)
    torch.manual_seed(1)
    head = DreamHead(DreamConfig.for_target(target.config, keep_ratio=0.5), target.shared)
    documents = [(list(p) + t.tokens, getattr(p, "images", {}), len(p)) for p, t in zip(prompts, plain)]
    features = pack_images(target, head, documents)

    def accepted():
        traces = generate(target, HeadDrafter(head.eval(), parse_tree("chain:3")), prompts, Sampling(), 20)
        assert [t.tokens for t in traces] == [t.tokens for t in plain]
        return sum(sum(t.accepted) for t in traces)

    untrained, before = accepted(), head.loss(features, PLAIN)[1]["kl"].item()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss, sums = head.loss(features, PLAIN)
        loss.backward()
        optimizer.step()
    assert sums["kl"].item() < 0.1 * before and accepted() > untrained + 5
