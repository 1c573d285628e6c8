"""Training features of targets of every kind: packed documents equal documents alone, as the model's own forward has
them, and a head learns from them.
"""

import pytest
import torch

from draftsmith.models.features import FeatureSpec, Packing
from draftsmith.models.heads import Eagle3Objective
from draftsmith.models.targets import training
from tests.conftest import tiny_head
from tests.models.targets import test_recurrent as recurrent
from tests.models.targets import test_targets as text
from tests.models.targets import test_vision as vision
from tests.tiny_vision import CONFIGS, IMAGE, tiny_vision


def of_text(target):
    """pack(spec) -> (features, documents with their images, packing); every token was written by the target."""
    rows = text.prompts_of(21, 9, 14)
    tokens, packing = torch.tensor(sum(rows, [])), Packing((0, 21, 30, 44), torch.ones(44, dtype=torch.bool))
    return lambda spec: (target.features(tokens, packing, spec), [(row, {}) for row in rows], packing)


def attending(family):
    target = text.target_of(family)
    return target, of_text(target), lambda ids, images: text.plain(target, ids), text.TAPS, 2e-5


def with_states(family):
    target = text.TextTarget(text.model_of(recurrent.FAMILIES[family]()), family)
    alone = lambda ids, images: (found[0] for found in recurrent.plain(target, [ids]))  # noqa: E731
    return target, of_text(target), alone, recurrent.TAPS, 5e-5


def seeing(family):
    target = tiny_vision(family)
    alone = lambda ids, images: vision.own(target, ids, images)  # noqa: E731
    return target, lambda spec: vision.packed(family, target, spec), alone, vision.TAPS, 3e-5


CASES = [
    *((attending, family) for family in text.FAMILIES),
    *((with_states, family) for family in recurrent.FAMILIES),
    *((seeing, family) for family in CONFIGS),
]


@pytest.mark.parametrize(("kind", "family"), CASES, ids=[f"{kind.__name__}-{family}" for kind, family in CASES])
def test_packed_documents_equal_documents_alone_and_a_head_learns_from_them(kind, family):
    target, pack, alone, taps, tolerance = kind(family)
    features, documents, packing = pack(FeatureSpec(taps))
    final = torch.zeros(len(packing.mask), 32).index_copy_(0, packing.rows + 1, features.teacher.final)
    for (ids, images), start, stop in zip(documents, packing.borders, packing.borders[1:]):
        logits, hidden = alone(ids, images)
        torch.testing.assert_close(features.hidden[start:stop], hidden, atol=tolerance, rtol=0)
        supervised = packing.rows[(packing.rows >= start) & (packing.rows < stop)] + 1
        got = features.teacher.project(final[supervised], None)
        torch.testing.assert_close(got, logits[supervised - start], atol=tolerance, rtol=0)
    head = tiny_head(target, 40)
    assert head.feature_spec.taps == (2, target.layers // 2, target.layers - 3)  # layers of every kind count
    loss, _ = head.loss(pack(head.feature_spec)[0], Eagle3Objective(steps=3, decay=0.8))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("family", ["qwen3", "qwen3 sliding"])
def test_documents_of_like_lengths_are_read_together_and_as_all_at_once(family, monkeypatch):
    target = text.target_of(family)
    rows = text.prompts_of(6, 20, 17, 5)
    tokens, packing = torch.tensor(sum(rows, [])), Packing((0, 6, 26, 43, 48), torch.ones(48, dtype=torch.bool))
    shapes, whole = [], target.whole
    monkeypatch.setattr(
        target, "whole", lambda spec, reading: shapes.append(reading.tokens.shape) or whole(spec, reading)
    )
    apart = target.features(tokens, packing, FeatureSpec(text.TAPS))
    assert shapes == [(2, 20), (2, 6)]
    monkeypatch.setattr(training, "ALIKE", 0.0)
    together = target.features(tokens, packing, FeatureSpec(text.TAPS))
    assert shapes[2:] == [(4, 20)]
    torch.testing.assert_close(apart.hidden, together.hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apart.teacher.final, together.teacher.final, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_rows_know_what_is_visual_and_their_places(family):
    features, documents, packing = vision.packed(family, tiny_vision(family), FeatureSpec(()))
    for (ids, _), start, stop in zip(documents, packing.borders, packing.borders[1:]):
        assert features.visual[start:stop].tolist() == [token == IMAGE for token in ids]
        assert features.positions[start:stop].tolist() == list(range(len(ids)))
