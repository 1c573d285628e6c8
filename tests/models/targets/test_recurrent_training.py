"""Training features of targets with recurrent layers: probes and scored trees equal plain forwards of their paths."""

import pytest
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec, Middle
from draftsmith.models.targets import TextTarget
from draftsmith.models.tree import DraftTree
from tests.models.targets.test_probes import appended, packed_row, plain_logits, probe_of
from tests.models.targets.test_recurrent import BRANCHING, FAMILIES, TAPS
from tests.models.targets.test_targets import model_of, prompts_of

PROBED = ["mamba2", "qwen3_next", "qwen3_5_text", "bamba", "nemotron_h", "zamba2", "olmo_hybrid", "lfm2"]


def target_of(family):
    return TextTarget(model_of(FAMILIES[family]()), family)


@pytest.mark.parametrize("family", PROBED)
def test_probes_and_scored_trees_behind_a_packed_row_equal_plain_forwards(family):
    """Anchors at a first token, at a last one, and closer to a document's start than a convolution is wide."""
    target, probe, (rows, tokens, packing) = target_of(family), probe_of(), packed_row(15, 11)
    without = target.features(tokens, packing, FeatureSpec(TAPS))
    features = target.features(tokens, packing, FeatureSpec(TAPS, probe, trees=True))
    torch.testing.assert_close(features.hidden, without.hidden, atol=5e-5, rtol=0)
    states = features.probe(probe)
    texts = [rows[0][: t + 1] if t < 15 else rows[1][: t - 14] for t in packing.rows.tolist()]
    want = torch.stack([appended(target, text, probe) for text in texts])
    torch.testing.assert_close(states, want, atol=5e-5, rtol=0)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(7))
    (gradient,), (expected,) = (torch.autograd.grad((x * weight).sum(), probe) for x in (states, want))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(gradient, expected, atol=2e-4, rtol=2e-4)
    at = torch.tensor([0, 9, 14, 16, 25])
    drafts = torch.randint(3, 61, (5, len(BRANCHING)), generator=torch.Generator().manual_seed(3))
    drafts[:, 0] = tokens[at]
    trees = DraftTree.of(drafts, torch.tensor([BRANCHING] * 5))
    scores, best = features.score(trees, at)
    for p, root in enumerate(at.tolist()):
        text = rows[0][: root + 1] if root < 15 else rows[1][: root - 14]
        for node in range(1, len(BRANCHING)):
            path = trees.ancestors[p, BRANCHING[node]].nonzero().flatten()[1:]
            logits = plain_logits(target, text + drafts[p, path].tolist())[-1]
            torch.testing.assert_close(scores[p, node], logits.log_softmax(-1)[drafts[p, node]], atol=1e-4, rtol=0)
            assert best[p, BRANCHING[node]] == logits.argmax()


@pytest.mark.parametrize("family", PROBED)
def test_probes_ride_with_prompts_and_trees(family):
    target, probe, texts = target_of(family), probe_of(), [prompts_of(5)[0], prompts_of(9, seed=4)[0]]
    session = target.open(FeatureSpec(TAPS, probe), 2, 24)
    prefill = session.prefill(texts)
    for b, text in enumerate(texts):
        got = prefill.features.probes[b, len(text) - 1]
        torch.testing.assert_close(got, appended(target, text, probe), atol=5e-5, rtol=0)
    g = torch.Generator().manual_seed(1)
    for probes in (True, False, True):
        drafts = torch.randint(3, 61, (2, 6), generator=g)
        tree = DraftTree(drafts, torch.tensor([BRANCHING] * 2), torch.zeros(2, 6, dtype=torch.int8), probes=probes)
        verified = session.verify(tree)
        for b, text in enumerate(texts):
            for node in (0, 2, 5):
                line = text + drafts[b, tree.ancestors[b, node]].tolist()
                torch.testing.assert_close(verified.logits[b, node], plain_logits(target, line)[-1], atol=5e-5, rtol=0)
                if probes:
                    torch.testing.assert_close(
                        verified.probes[b, node], appended(target, line, probe), atol=5e-5, rtol=0
                    )
        path, counts = torch.tensor([[0, 1, 3], [0, 2, 0]]), torch.tensor([3, 2])
        session.commit(path, counts)
        texts = [t + drafts[b, path[b, : counts[b]]].tolist() for b, t in enumerate(texts)]


def test_what_such_targets_cannot_give_is_refused_in_one_line():
    (_, tokens, packing), jamba, mamba2 = packed_row(6), target_of("jamba"), target_of("mamba2")
    with pytest.raises(UserError, match="jamba takes neither probes nor trees in training: found layers of JambaMamba"):
        jamba.features(tokens, packing, FeatureSpec((), probe_of()))
    for spec in (FeatureSpec((), columns=True), FeatureSpec((), middle=Middle("token", (0, 2), "output"))):
        with pytest.raises(UserError, match="mamba2 has no attention statistics"):
            mamba2.features(tokens, packing, spec)
    with pytest.raises(UserError, match="found 'sharded' for mamba2, whose layers have states, expected 'replicated'"):
        mamba2.shard(lambda layers: layers)
