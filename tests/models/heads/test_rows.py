"""Rows that matter: rows that are left behind change nothing for the others, what is kept is what drafting reaches, and
a share is unbiased over all draws.
"""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from draftsmith.models.heads import Eagle3Objective
from draftsmith.models.heads import rows as rows_that_matter
from tests.conftest import pack, tiny_head, tiny_target, trained_head
from tests.models.heads.documents import documents, packed


@pytest.fixture(scope="module")
def known():
    """A tiny head that is right now and then, and rows that it was not trained on, fp64."""
    target = tiny_target()
    head = trained_head(target).double()
    target.model.double()
    return target, head, packed(target, head, first=1)


def gradients(head, loss):
    names, parameters = zip(*head.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("best", [1, 10])
def test_reached_rows_give_the_loss_of_all_rows_with_the_others_weighed_0(known, best, monkeypatch):
    """greedy is exactly `reach: greedy`; top is that with ten tokens in place of one."""
    target, head, features = known
    monkeypatch.setattr(rows_that_matter, "BEST", {"greedy": best})
    loss, sums = head.loss(features, Eagle3Objective(4, 0.8, "greedy"))
    if best == 1:
        other, whole = head.loss(features, Eagle3Objective(4, 0.8, reach="greedy"))
        torch.testing.assert_close(loss, other)
        got = gradients(head, loss)
        for name, value in gradients(head, other).items():
            torch.testing.assert_close(got[name], value, atol=1e-10, rtol=1e-8)
        for name in ("tried", "kept", "walk"):  # what happens behind a miss is not part of them
            assert torch.equal(sums[name], whole[name]), name
        assert sums["rows"].tolist() == whole["tried"].tolist() and 0 < sums["rows"][2] < whole["rows"][2]
        return
    teacher, want, alive = target.project(features.teacher.final), 0.0, {}
    for k, (here, output) in enumerate(head.unroll(features, 4)):
        at, z = torch.searchsorted(features.packing.rows, here) + k, head.logits(output)
        losses = -(teacher[at].softmax(-1) * z.log_softmax(-1)).sum(-1)
        kept = [i for i, row in enumerate(here.tolist()) if alive.get(row, k == 0)]
        want = want + 0.8**k * losses[kept].sum() / len(here)
        hit = (z > z.gather(1, teacher[at].argmax(-1, keepdim=True))).sum(1) < best
        alive = {row: bool(hit[i]) for i, row in enumerate(here.tolist()) if i in kept} | {
            row: False for i, row in enumerate(here.tolist()) if i not in kept
        }
    torch.testing.assert_close(loss, want)


def test_a_share_is_unbiased_over_all_draws():
    """Every pair of draws (3 of 5 rows after step 0, then 2 of the 3 of them that go on) with its chance: the mean
    loss and the mean gradient are those of all rows, exactly.
    """
    target = tiny_target()
    head = trained_head(target).double()
    target.model.double()
    features = pack(target, head, documents(target, (8,)), [1])
    packing, objective = features.packing, Eagle3Objective(3, 0.8, 0.5)
    assert packing.counts(3) == [6, 5, 4]
    whole = head.loss(features, replace(objective, rows="all"))[0]
    total, gradient = 0.0, {name: 0.0 for name, _ in head.named_parameters()}

    class Drawn(rows_that_matter.Share):
        """Draws that are given, and their chance."""

        def __call__(self, step, here, outputs):
            going = self.packing.takes_part(step + 1)[here].nonzero().flatten()
            count = -(-len(going) // 2)
            drawn = torch.tensor(next(self.generator))
            self.factors.append(self.factors[-1] * len(going) / count)
            return going[drawn]

    chance_sum = 0.0
    for first in combinations(range(5), 3):
        left = sum(1 for place in first if place < 4)  # the last of the five takes no part in the third step
        for second in combinations(range(left), -(-left // 2)):
            chance = 1 / 10 / len(list(combinations(range(left), -(-left // 2))))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rows_that_matter, "Share", lambda *a, d=(first, second): Drawn(a[0], a[1], iter(d)))
                loss = head.loss(features, objective)[0]
            for name, value in gradients(head, loss).items():
                gradient[name] = gradient[name] + chance * value
            total, chance_sum = total + chance * loss.detach(), chance_sum + chance
    assert chance_sum == pytest.approx(1.0)
    torch.testing.assert_close(total, whole.detach())
    for name, value in gradients(head, whole).items():
        torch.testing.assert_close(gradient[name], value, atol=1e-10, rtol=1e-8, msg=name)


def test_the_share_that_is_drawn_is_uniform_and_seeded(known):
    _, _, features = known
    packing, here = features.packing, torch.arange(len(features.packing.rows))
    share = lambda seed: rows_that_matter.Share(packing, 0.4, torch.Generator().manual_seed(seed))  # noqa: E731
    going = packing.takes_part(1).nonzero().flatten()
    counts = torch.zeros(len(here))
    for seed in range(400):
        one = share(seed)
        kept = one(0, here, None)
        counts[kept] += 1
        assert len(kept) == -(-len(going) * 2 // 5) and one.factors[1] == len(going) / len(kept)
    assert torch.equal(share(3)(0, here, None), share(3)(0, here, None))
    assert (counts[going] / 400 - 0.4).abs().max() < 0.11 and counts.sum() == counts[going].sum()


@pytest.mark.parametrize("shape", [{}, {"norm_output": True, "fc_norm": True, "sliding_window": 4}], ids=str)
def test_rows_that_are_left_behind_change_nothing_for_the_others(shape, known):
    """Outputs and gradients of kept rows are those of an unroll of all rows (fp64), windows and norms included."""
    target, _, _ = known
    head = tiny_head(target, **shape).double()
    features = packed(target, head, first=1)
    generator = torch.Generator().manual_seed(0)

    def choose(step, here, outputs):
        return (torch.rand(len(here), generator=generator) < 0.6).nonzero().flatten()

    output, here = head._unroll(features, 4, choose)
    whole, _ = head._unroll(features, 4)
    whole = whole.unflatten(0, (4, -1))
    want = torch.cat([whole[k, places] for k, places in enumerate(here)])
    torch.testing.assert_close(output, want, atol=1e-10, rtol=1e-10)
    pull = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    parameters = [
        p for name, p in head.named_parameters() if "lm_head" not in name and (name != "norm.weight" or shape)
    ]
    for a, b in zip(
        torch.autograd.grad((output * pull).sum(), parameters), torch.autograd.grad((want * pull).sum(), parameters)
    ):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
