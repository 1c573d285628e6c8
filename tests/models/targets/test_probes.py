"""Rows behind a prefix that leave no trace: probes (`[SPEC]`, OWL, arXiv 2510.07535) and scored trees equal plain
forwards of their paths.
"""

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec, Packing
from draftsmith.models.targets import packed, training
from draftsmith.models.targets import session as sessions
from draftsmith.models.tree import DraftTree
from tests.models.targets.test_targets import FAMILIES, SLIDING, TAPS, prompts_of, target_of

BRANCHING = [-1, 0, 0, 1, 1, 3]
every_family = pytest.mark.parametrize("family", FAMILIES)


def packed_row(*lengths):
    rows = prompts_of(*lengths)
    borders = [0]
    for row in rows:
        borders.append(borders[-1] + len(row))
    return (
        rows,
        torch.tensor([t for row in rows for t in row]),
        Packing(tuple(borders), torch.ones(borders[-1], dtype=torch.bool)),
    )


def probe_of(seed=5):
    return torch.nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 0.3)


def appended(target, tokens, probe):
    """State after the final norm of the probe behind tokens, in a plain causal forward."""
    rows = torch.cat([target.embed(torch.tensor([tokens])), probe.to(target.dtype)[None, None]], 1)
    return target.body(inputs_embeds=rows, use_cache=False).last_hidden_state[0, -1]


def plain_logits(target, tokens):
    return target.model(torch.tensor([tokens]), use_cache=False).logits[0]


@every_family
def test_scored_trees_equal_plain_forwards_of_their_paths(family, monkeypatch):
    """Trees in two documents, one at a first token, one at a last; two trees a forward."""
    monkeypatch.setattr(packed, "ROWS", 14)
    target, (rows, tokens, packing) = target_of(family), packed_row(17, 12)
    features = target.features(tokens, packing, FeatureSpec(TAPS, trees=True))
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in features.score.__self__.cache.layers]
    at = torch.tensor([0, 9, 16, 17, 28])
    parents = torch.tensor(
        [[*BRANCHING, 5], [-1, 0, 1, 2, 3, 4, 5], [*BRANCHING, -1], [-1, 0, 0, 0, 0, 0, 0], [-1, -1, 0, 2, -1, -1, -1]]
    )
    drafts = torch.randint(3, 61, parents.shape, generator=torch.Generator().manual_seed(3))
    drafts[:, 0] = tokens[at]
    trees = DraftTree.of(drafts, parents)
    scores, best = features.score(trees, at)
    for p, root in enumerate(at.tolist()):
        text = rows[0][: root + 1] if root < 17 else rows[1][: root - 16]
        for node in range(7):
            parent = int(parents[p, node])
            if parent < 0:
                assert scores[p, node] == 0
            else:
                path = trees.ancestors[p, parent].nonzero().flatten()[1:]
                logits = plain_logits(target, text + drafts[p, path].tolist())[-1]
                torch.testing.assert_close(scores[p, node], logits.log_softmax(-1)[drafts[p, node]], atol=2e-5, rtol=0)
                assert best[p, parent] == logits.argmax()
            if node and not (parents[p] == node).any():
                assert best[p, node] == -1
    for layer, (keys, values) in zip(features.score.__self__.cache.layers, kept):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@every_family
def test_probes_change_no_real_row_and_equal_one_more_token(family, monkeypatch):
    monkeypatch.setattr(packed, "ROWS", 8)
    monkeypatch.setattr(training, "ALIKE", 0.0)  # all documents at once, as beside a probe: equal to the last bit
    target, probe, (rows, tokens, packing) = target_of(family), probe_of(), packed_row(15, 11)
    without = target.features(tokens, packing, FeatureSpec(TAPS))
    features = target.features(tokens, packing, FeatureSpec(TAPS, probe))
    assert torch.equal(features.hidden, without.hidden) and torch.equal(features.teacher.final, without.teacher.final)
    assert without.probe is None and features.score is None
    states = features.probe(probe)
    texts = [rows[0][: t + 1] if t < 15 else rows[1][: t - 14] for t in packing.rows.tolist()]
    want = torch.stack([appended(target, text, probe) for text in texts])
    torch.testing.assert_close(states, want, atol=2e-5, rtol=0)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(7))
    (gradient,), (expected,) = (torch.autograd.grad((x * weight).sum(), probe) for x in (states, want))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in target.model.parameters())


@pytest.mark.parametrize("family", SLIDING)
def test_windows_matter_here(family):
    """A window off by one row behind the packed row would fail the comparisons above."""
    target, probe, (_, tokens, packing) = target_of(family), probe_of(), packed_row(15, 11)
    features = target.features(tokens, packing, FeatureSpec((), probe))
    states = features.probe(probe)
    target.window += 1
    assert (features.probe(probe) - states).abs().max() > 0.01


def test_a_row_without_rounds_has_no_probes_but_a_gradient():
    """A process whose row teaches nothing must still take part in backward."""
    target, probe = target_of("llama"), probe_of()
    packing = Packing((0, 6), torch.zeros(6, dtype=torch.bool))
    states = target.features(torch.arange(3, 9), packing, FeatureSpec((), probe)).probe(probe)
    states.sum().backward()
    assert states.shape == (0, 32) and torch.equal(probe.grad, torch.zeros(32))


@every_family
def test_probes_ride_with_prompts_and_trees(family, monkeypatch):
    """A ragged batch of two, prompts in chunks, a branching tree of six nodes, a commit, a tree without probes, one
    with them again.
    """
    monkeypatch.setattr(sessions, "PREFILL_ROWS", 6)
    target, probe, texts = target_of(family), probe_of(), prompts_of(5, 19)
    session, other = target.open(FeatureSpec(TAPS, probe), 2, 24), target.open(FeatureSpec(TAPS), 2, 24)
    prefill, without = session.prefill(texts), other.prefill(texts)
    assert torch.equal(prefill.logits, without.logits) and torch.equal(prefill.features.hidden, without.features.hidden)
    assert without.features.probes is None
    for b, text in enumerate(texts):
        torch.testing.assert_close(
            prefill.features.probes[b, len(text) - 1], appended(target, text, probe), atol=2e-5, rtol=0
        )
    g = torch.Generator().manual_seed(1)
    for probes in (True, False, True):
        drafts = torch.randint(3, 61, (2, 6), generator=g)
        tree = DraftTree(drafts, torch.tensor([BRANCHING] * 2), torch.zeros(2, 6, dtype=torch.int8), probes=probes)
        verified = session.verify(tree)
        bare = other.verify(DraftTree.of(drafts, tree.parents))
        # Not bit for bit: matrix products of other shapes round otherwise.
        torch.testing.assert_close(verified.logits, bare.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(verified.hidden, bare.hidden, atol=1e-5, rtol=1e-5)
        path, counts = torch.tensor([[0, 1, 3], [0, 2, 0]]), torch.tensor([3, 2])
        features = verified.features(tree, path, counts)
        assert (features.probes is None) == (not probes)
        for b, text in enumerate(texts):
            for node in range(6) if probes else ():
                line = text + drafts[b, tree.ancestors[b, node]].tolist()
                torch.testing.assert_close(verified.logits[b, node], plain_logits(target, line)[-1], atol=2e-5, rtol=0)
                torch.testing.assert_close(verified.probes[b, node], appended(target, line, probe), atol=2e-5, rtol=0)
            if probes:
                assert torch.equal(features.probes[b, : counts[b]], verified.probes[b, path[b, : counts[b]]])
        session.commit(path, counts)
        other.commit(path, counts)
        texts = [t + drafts[b, path[b, : counts[b]]].tolist() for b, t in enumerate(texts)]
        assert session.lengths.tolist() == [len(t) for t in texts]


def test_decoding_after_a_rewind_equals_decoding_afresh():
    target, texts = target_of("gemma3"), prompts_of(5, 19)
    session = target.open(FeatureSpec(TAPS), 2, 24)
    start = session.prefill(texts)
    g = torch.Generator().manual_seed(2)
    first = DraftTree.of(torch.randint(3, 61, (2, 6), generator=g), torch.tensor([BRANCHING] * 2))
    session.verify(first)
    session.commit(torch.tensor([[0, 1, 4], [0, 2, 0]]), torch.tensor([3, 2]))
    session.rewind(start.features.lengths)
    fresh = target.open(FeatureSpec(TAPS), 2, 24)
    fresh.prefill(texts)
    for _ in range(2):
        tree = DraftTree.of(torch.randint(3, 61, (2, 6), generator=g), first.parents)
        got, want = session.verify(tree), fresh.verify(tree)
        assert torch.equal(got.logits, want.logits) and torch.equal(got.hidden, want.hidden)
        for each in (session, fresh):
            each.commit(torch.tensor([[0, 2, 0], [0, 1, 3]]), torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="expected at most the kept rows"):
        session.rewind(session.lengths + 1)


class Probing(NoDrafter):
    """Plain decoding with a probe behind every root."""

    size = 2

    def __init__(self, probe):
        self.feature_spec = FeatureSpec((), probe)

    def propose(self, draw):
        tree = super().propose(draw)
        return DraftTree(tree.tokens, tree.parents, tree.kind, probes=True)


@every_family
def test_decoding_with_probes_writes_what_plain_decoding_writes(family):
    target, prompts = target_of(family), prompts_of(5, 19)
    want, got = (generate(target, drafter, prompts, Sampling(), 12) for drafter in (NoDrafter(), Probing(probe_of())))
    assert [t.tokens for t in got] == [t.tokens for t in want]


def test_a_target_that_treats_embeddings_otherwise_takes_no_probe(monkeypatch):
    target, (_, tokens, packing) = target_of("llama"), packed_row(6)
    monkeypatch.setattr(target, "embed", lambda ids: 2 * target.model.get_input_embeddings()(ids))
    for ask in (lambda spec: target.open(spec, 1, 8), lambda spec: target.features(tokens, packing, spec)):
        with pytest.raises(UserError, match="takes no probe"):
            ask(FeatureSpec((), probe_of()))


def test_partitioned_targets_take_neither_probes_nor_trees():
    target, (_, tokens, packing) = target_of("llama"), packed_row(6)
    target.shard(lambda layers: layers)
    for spec in (FeatureSpec((), probe_of()), FeatureSpec((), trees=True)):
        with pytest.raises(UserError, match="expected a whole target"):
            target.features(tokens, packing, spec)
