"""Tree search over steps: what goes on is the best sample, drafters change nothing, and a lasting memory helps."""

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.measure import tau
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.search import log_probability, search
from draftsmith.eval.verification.rules import RULES
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.grow import chain
from tests.table_target import TableTarget

SAMPLED = Sampling(1.0, seed=2)


def run(target, drafter, **options):
    score = lambda prompt, answer: -sum(answer) / len(answer)  # noqa: E731  small ids are liked
    options = {"beams": 2, "width": 3, "steps": 4, "step_tokens": 6} | options
    return search(target, drafter, [0, 1], score, {3}, {4}, SAMPLED, **options)


def test_every_beam_goes_on_with_its_best_sample():
    target = TableTarget(5, 7)
    beams, traces = run(target, NoDrafter())
    assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)
    for beam in beams:
        assert beam.tokens == [token for trace in beam.steps for token in trace.tokens] and len(beam.steps) <= 4
        assert beam.ended == (beam.tokens[-1] == 4) and (beam.ended or len(beam.steps) == 4)
        assert all(trace.tokens[-1] in (3, 4) or len(trace.tokens) == 6 for trace in beam.steps)
        assert all(4 not in trace.tokens[:-1] and 3 not in trace.tokens[:-1] for trace in beam.steps)
    first = [[t.tokens for t in traces[start : start + 3]] for start in (0, 3)]
    samples = generate(target, NoDrafter(), [[0, 1]] * 6, SAMPLED, 6, {3, 4}, list(range(6)))
    assert first == [[t.tokens for t in samples[:3]], [t.tokens for t in samples[3:]]]
    likes = lambda text: -sum(text) / len(text)  # noqa: E731
    assert {tuple(b.steps[0].tokens) for b in beams} == {tuple(max(texts, key=likes)) for texts in first}


def test_drafters_change_no_beam_and_one_memory_for_the_search_accepts_more():
    found = {False: [], True: [], "rejection": []}
    for seed in range(7, 16):
        target = TableTarget(5, seed)
        plain, _ = run(target, NoDrafter(), steps=8)
        for lasting in (False, True):
            drafted, traces = run(target, StandDrafter(chain(3), lasting=lasting), steps=8)
            assert [beam.tokens for beam in drafted] == [beam.tokens for beam in plain]
            found[lasting] += traces
        sampled, traces = run(target, StandDrafter(chain(3), lasting=True), rule=RULES["rejection"], steps=8)
        assert all(beam.tokens for beam in sampled)
        found["rejection"] += traces
    taus = {kind: tau(traces) for kind, traces in found.items()}
    assert taus["rejection"] > taus[True] > taus[False] + 0.1, taus


def test_the_targets_own_score_is_its_mean_log_probability(target):
    prompt, answer = [3, 1, 4], [1, 5, 9, 2]
    logp = target.model(torch.tensor([prompt + answer])).logits[0, 2:-1].log_softmax(-1)
    want = float(logp.gather(1, torch.tensor(answer)[:, None]).mean())
    assert log_probability(target)(prompt, answer) == pytest.approx(want, abs=1e-4)
