"""A pretraining run: its rates, its log, its stop, its snapshots."""

import pytest
import torch

from draftsmith.models.errors import UserError
from draftsmith.train.reference.pretraining_run import Optimizer, PretrainingRun, make_optimizer

SPEC = Optimizer(muon_lr=0.02, adam_lr=0.004, warmup=4, decay=0.5, clip=1.0)


def test_rates_rise_by_steps_and_fall_by_what_is_seen():
    """Step n of the warmup has n / 4; behind half of 1600 tokens the rate is what is left over what the fall takes,
    before the step.
    """
    model, told = torch.nn.Linear(3, 3), []
    run, optimizer = PretrainingRun(SPEC, 1600, 60, told.append, unit="tokens"), make_optimizer(model, SPEC)
    scales = []
    for _ in range(50):
        run.step(model, optimizer, model(torch.ones(2, 3)).square().mean(), 32, "layers 1")
        muon, adam = (group["lr"] for group in optimizer.param_groups)
        assert muon == pytest.approx(5 * adam)
        scales.append(muon / SPEC.muon_lr)
    assert scales == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 23 + [1 - n / 25 for n in range(1, 25)])
    assert (
        run.seen == 1600
        and len(told) == 1
        and told[0].startswith("layers 1 step 50 tokens 1600/1600 loss ")
        and "lr x0.04" in told[0]
    )


def test_it_stops_at_a_loss_that_is_no_number():
    model = torch.nn.Linear(1, 1)
    run = PretrainingRun(SPEC, 8, 60, print)
    with pytest.raises(UserError, match="step 1: loss is nan, expected a finite number; lower optimizer.muon_lr"):
        run.step(model, make_optimizer(model, SPEC), model(torch.tensor([[float("nan")]])).sum(), 1, "")


def test_a_snapshot_is_due_once_its_minutes_have_passed():
    run = PretrainingRun(SPEC, 8, 10, print)
    assert not run.due()
    run.saved -= 600
    assert run.due() and not run.due()


def test_matrices_go_to_muon_and_embeddings_and_vectors_to_adam():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4), "layer": torch.nn.Linear(4, 4)})
    muon, adam = (group["params"] for group in make_optimizer(model, SPEC).param_groups)
    assert [p.shape for p in muon] == [(4, 4)] and sorted(tuple(p.shape) for p in adam) == [(4,), (5, 4)]
