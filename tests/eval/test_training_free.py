"""STAND and Token Recycling in the real decode loop: what they are told, identity with plain decoding, the law of
sampled texts.
"""

from dataclasses import replace

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.shared_prefill import Tapped, shared_spec
from draftsmith.eval.sampling import Sampling, process
from draftsmith.eval.verification.rules import RULES
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.drafters.recycling import RecyclingDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.features import DistributionSpec, FeatureSpec
from draftsmith.models.grow import StaticTree, binary
from draftsmith.models.tree import DraftTree
from tests.table_target import TableTarget, g_over_bound

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]
SHAPE = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0)), "shape")
GREEDY = Sampling()
SAMPLED, EVERYTHING = Sampling(0.4, top_k=3, seed=3), Sampling(0.5, top_k=4, top_p=0.9, repetition_penalty=1.1, seed=6)


def drafters(lasting=False):
    return {
        "stand": StandDrafter(SHAPE, lasting=lasting),
        "sequential": StandDrafter(SHAPE, "sequential", lasting),
        "deterministic": StandDrafter(SHAPE, "deterministic", lasting),
        "recycling": RecyclingDrafter(61, SHAPE, lasting),
    }


# What the target tells


class Asking:
    """Drafts a fixed tree and keeps what it is told: (the committed text of each row, tree, distribution)."""

    def __init__(self, spec):
        self.feature_spec, self.size, self.told = FeatureSpec((), distribution=spec), 4, []

    def begin(self, features, root):
        assert features.distribution is None
        self.root = root
        lengths = features.lengths.tolist()
        self.texts = [[*t[:n], r] for t, n, r in zip(features.tokens.tolist(), lengths, root.tolist())]

    def propose(self, draw):
        nodes = torch.tensor([[7, 9, 5]]).expand(len(self.root), -1)
        parents = torch.tensor([[-1, 0, 0, 1]]).expand(len(self.root), -1)
        self.tree = DraftTree.of(torch.cat([self.root[:, None], nodes], 1), parents)
        return self.tree

    def observe(self, features, root):
        for row, (tokens, count) in enumerate(zip(features.tokens.tolist(), features.lengths.tolist())):
            told = features.distribution
            told = told and (told.ids[row], told.probs[row])
            self.told.append((self.texts[row], self.tree.tokens[row].tolist(), tokens[:count], told))
            self.texts[row] = self.texts[row] + tokens[1:count] + [int(root[row])]
        self.root = root

    def select(self, rows):
        self.root, self.texts = self.root[rows], [self.texts[r] for r in rows.tolist()]


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=str)
@pytest.mark.parametrize("rows", ["committed", "nodes"])
def test_a_drafter_is_told_what_the_target_draws_from(target, rows, sampling):
    drafter = Asking(DistributionSpec(rows, 5))
    generate(target, drafter, PROMPTS[:2], sampling, 6)
    for text, nodes, path, (ids, probs) in drafter.told:
        paths = [[], nodes[1:2], nodes[2:3], [nodes[1], nodes[3]]]
        if rows == "committed":
            paths = [path[1:count] for count in range(1, len(path) + 1)]
        assert ids.shape[1] == 5 and probs.dtype == torch.float32
        for behind, some, chances in zip(paths, ids, probs):
            whole = text + behind
            seen = torch.zeros(1, 61, dtype=torch.bool)
            seen[0, whole] = True
            logits = target.model(torch.tensor([whole])).logits[:, -1:]
            law = process(logits, sampling, seen, DraftTree.root_only(torch.tensor(whole[-1:])))[0, 0].softmax(-1)
            torch.testing.assert_close(chances, law[some], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(chances, law.topk(5).values, rtol=1e-3, atol=1e-5)


def test_who_does_not_ask_is_told_nothing(target):
    drafter = Asking(None)
    generate(target, drafter, PROMPTS[:2], GREEDY, 6)
    assert drafter.told and all(told is None for *_, told in drafter.told)


def test_a_drafter_in_a_shared_session_is_told_what_it_asks_for():
    asking, plain = StandDrafter(SHAPE), NoDrafter()
    spec = shared_spec([asking.feature_spec, plain.feature_spec])
    assert spec.distribution is None and Tapped(plain, spec, 4).feature_spec.distribution is None
    assert Tapped(asking, spec, 4).feature_spec.distribution == asking.feature_spec.distribution


@pytest.mark.parametrize("end", ["stop token", "limit"])
def test_what_stands_behind_the_end_of_a_text_is_not_observed(target, end):
    """A tree that holds the greedy text: its last pass would accept more than belongs to the text."""
    (whole,) = generate(target, NoDrafter(), [PROMPTS[0]], GREEDY, 12)
    text = whole.tokens

    class Knowing(Asking):
        def propose(self, draw):
            at = len(self.texts[0]) - len(PROMPTS[0])
            self.tree = DraftTree.of(torch.tensor([text[at - 1 : at + 4]]), torch.tensor([[-1, 0, 1, 2, 3]]))
            return self.tree

    drafter = Knowing(DistributionSpec("committed", 2))
    stop = {next(t for i, t in enumerate(text) if i >= 2 and t not in text[:i])} if end == "stop token" else set()
    drafter.size = 5
    (trace,) = generate(target, drafter, [PROMPTS[0]], GREEDY, 12 if stop else 4, stop)
    assert drafter.texts[0] == PROMPTS[0] + trace.tokens and len(trace.tokens) < len(text)
    assert trace.tokens == text[: len(trace.tokens)] and len(drafter.told[-1][2]) == trace.emitted[-1]


# Nothing changes but the speed


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, EVERYTHING], ids=str)
def test_matching_emits_what_plain_decoding_emits(target, sampling):
    """Batches of one and ragged ones; afterwards again, from what was learned in the first round."""
    plain = [generate(target, NoDrafter(), [p], sampling, 20, {7}, [r])[0].tokens for r, p in enumerate(PROMPTS)]
    for lasting in (False, True):
        for name, drafter in drafters(lasting).items():
            taus = []
            for _ in range(2):
                batched = generate(target, drafter, PROMPTS, sampling, 20, {7})
                assert [t.tokens for t in batched] == plain, (name, lasting)
                taus.append(sum(sum(t.emitted) for t in batched) / sum(len(t.emitted) for t in batched))
            assert taus[1] > 1 and (lasting or taus[1] == taus[0]), (name, lasting, taus)
            if lasting and name != "recycling":  # a random target's next token depends on more than the last one
                assert taus[1] > max(1.5, taus[0]), (name, taus)
    for name, drafter in drafters().items():
        (alone,) = generate(target, drafter, [PROMPTS[1]], sampling, 20, {7}, [1])
        assert alone.tokens == plain[1], name


@pytest.mark.parametrize(
    ("name", "rule"), [("stand", "rejection"), ("stand", "traversal"), ("sequential", "rejection")]
)
def test_without_a_lasting_memory_texts_do_not_depend_on_the_batch(target, name, rule):
    drafter = drafters()[name]
    batched = generate(target, drafter, PROMPTS, SAMPLED, 30, {7}, verifier=RULES[rule])
    alone = [
        generate(target, drafter, [p], SAMPLED, 30, {7}, [r], verifier=RULES[rule])[0] for r, p in enumerate(PROMPTS)
    ]
    assert [t.tokens for t in batched] == [t.tokens for t in alone]
    assert sum(sum(t.accepted) for t in batched) > 0


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
def test_at_temperature_0_every_rule_emits_the_greedy_text(target, rule):
    plain = [t.tokens for t in generate(target, NoDrafter(), PROMPTS, GREEDY, 20, {7})]
    for name, drafter in drafters().items():
        found = generate(target, drafter, PROMPTS, GREEDY, 20, {7}, verifier=RULES[rule])
        assert [t.tokens for t in found] == plain, name


# The law of sampled texts


@pytest.mark.parametrize(
    ("mode", "rule"), [("gumbel", "rejection"), ("gumbel", "traversal"), ("sequential", "rejection")]
)
def test_texts_of_the_real_loop_follow_the_targets_joint_law(mode, rule):
    """All rows share one memory, so that they draft from what the others did (`tests/benchmarks/training_free.py` does
    this with 50,000 texts).
    """
    target, drafter = TableTarget(3, seed=2), StandDrafter(binary(2), mode, lasting=True)
    assert g_over_bound(target, drafter, RULES[rule], [0, 1], 1500, 4, batch=500) < 1


def test_texts_of_the_real_loop_betray_a_biased_step():
    class Sorted(StandDrafter):
        """Siblings of the root stand in the order of their probability."""

        def propose(self, draw):
            tree = super().propose(draw)
            if tree.q is None:
                return tree
            two = (
                (tree.parents[:, 1:3] == 0).all(1) if tree.size > 2 else torch.zeros(len(tree.tokens), dtype=torch.bool)
            )
            q = torch.zeros(len(two), 3, dtype=torch.float64).scatter_add_(1, tree.ids[:, 0], tree.q[:, 0])
            wrong = two & (q.gather(1, tree.tokens[:, 1:2]) < q.gather(1, tree.tokens[:, 2:3]))[:, 0]
            order = torch.where(wrong[:, None], torch.tensor([0, 2, 1]), torch.tensor([0, 1, 2]))
            return replace(
                tree,
                tokens=tree.tokens[:, :3].gather(1, order),
                parents=tree.parents[:, :3],
                kind=tree.kind[:, :3],
                q=tree.q[:, :1],
                ids=tree.ids[:, :1],
                known=None,
            )

    drafter = Sorted(StaticTree(((0,), (1,)), "two"), lasting=True)
    assert g_over_bound(TableTarget(3, seed=2), drafter, RULES["rejection"], [0, 1], 1500, 4, batch=500) > 1.5
