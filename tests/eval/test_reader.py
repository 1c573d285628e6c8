"""READER in the real decode loop: identity with plain decoding, alone and over others, and the law of sampled texts."""

import numpy as np
import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.rules import RULES
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.datastore import Datastore, write
from draftsmith.models.drafters.reader import ReaderDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.grow import StaticTree, binary, parse_tree
from draftsmith.models.tree import Kind
from tests.conftest import tiny_target, trained_head
from tests.table_target import TableTarget, g_over_bound

PROMPTS = [[4, 8, 15, 16, 23, 42] * 3, [9, 7, 9, 3, 2], [1, 2] * 6, [8]]
SHAPE = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)), "shape")
GREEDY, SAMPLED = Sampling(), Sampling(0.4, top_k=3, seed=3)


@pytest.fixture(scope="module")
def pair():
    target = tiny_target()
    return target, trained_head(target)


@pytest.fixture(scope="module")
def store(pair, tmp_path_factory):
    """The greedy texts of the target."""
    texts = [np.array(t.tokens) for t in generate(pair[0], NoDrafter(), PROMPTS, GREEDY, 40)]
    folder = tmp_path_factory.mktemp("datastore") / "d"
    write(texts, folder, pair[0].vocab_size, {}, 50)
    return Datastore(folder)


def readers(head, store) -> dict[str, ReaderDrafter]:
    bases = {
        "alone": lambda: None,
        "dynamic": lambda: HeadDrafter(head, parse_tree("dynamic:4x3x10")),
        "sampled": lambda: HeadDrafter(head, parse_tree("sampled:binary:2")),
        "iid": lambda: HeadDrafter(head, parse_tree("sampled:binary:2:iid")),
        "adaptive": lambda: HeadDrafter(head, parse_tree("sampled:adaptive:3x3")),
        "stand": lambda: StandDrafter(SHAPE),
    }
    return {
        f"{name}{' datastore' * (source is not None)}": ReaderDrafter(base(), source, 12, 0.02)
        for name, base in bases.items()
        for source in (None, store)
    }


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_texts_are_those_of_plain_decoding(pair, store, sampling):
    """Batched and alone, whatever is widened; under matching all of it is so at every temperature."""
    target, head = pair
    plain = [t.tokens for t in generate(target, NoDrafter(), PROMPTS, sampling, 40, {7})]
    for name, drafter in readers(head, store).items():
        found = generate(target, drafter, PROMPTS, sampling, 40, {7})
        assert [t.tokens for t in found] == plain, name
        (one,) = generate(target, drafter, [PROMPTS[1]], sampling, 40, {7}, [1])
        assert one.tokens == plain[1], name


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
def test_at_temperature_0_every_rule_emits_the_greedy_text(pair, store, rule):
    target, head = pair
    plain = [t.tokens for t in generate(target, NoDrafter(), PROMPTS, GREEDY, 30, {7})]
    for name, drafter in readers(head, store).items():
        found = generate(target, drafter, PROMPTS, GREEDY, 30, {7}, verifier=RULES[rule])
        assert [t.tokens for t in found] == plain, name


def passes(traces) -> int:
    return sum(len(t.emitted) for t in traces)


def test_retrieval_adds_to_what_a_head_has_accepted(pair, store):
    """A wider tree holds the head's: no pass of the same text accepts less."""
    target, head = pair
    alone = generate(target, HeadDrafter(head, parse_tree("dynamic:4x3x10")), PROMPTS, GREEDY, 40)
    found = readers(head, store)
    wider, stored = (generate(target, found[name], PROMPTS, GREEDY, 40) for name in ("dynamic", "dynamic datastore"))
    assert passes(stored) < passes(wider) < passes(alone), (passes(stored), passes(wider), passes(alone))
    assert passes(stored) < 0.5 * passes(alone)  # it holds these very texts
    without = generate(target, found["alone datastore"], PROMPTS, GREEDY, 40)
    assert passes(without) < 0.5 * passes(generate(target, found["alone"], PROMPTS, GREEDY, 40))


class Kept:
    """A drafter whose trees are kept."""

    trees = ()

    def propose(self, draw):
        self.trees = (*self.trees, super().propose(draw))
        return self.trees[-1]


class KeptHead(Kept, HeadDrafter):
    pass


class KeptReader(Kept, ReaderDrafter):
    pass


def test_the_base_tree_stays_as_it_was_drawn(pair, store):
    """Its nodes come first, in order, and with their own rows of q; the others are ONE_HOT and no token twice."""
    target, head = pair
    drafter = KeptReader(KeptHead(head, parse_tree("sampled:binary:2")), store, 12, 0.02)
    generate(target, drafter, PROMPTS, SAMPLED, 30, verifier=RULES["rejection"])
    mixed = 0
    for base, tree in zip(drafter.base.trees, drafter.trees):
        size = base.size
        assert tree.size <= size + 12 and drafter.size == 7 + 12
        for name in ("tokens", "parents", "kind"):
            assert torch.equal(getattr(tree, name)[:, 1:size], getattr(base, name)[:, 1:]), name
        assert tree.q is base.q and tree.known == type(tree.known)(
            tuple(map(tuple, tree.parents.tolist())), tuple(map(tuple, tree.kind.tolist()))
        )
        for row in range(len(tree.tokens)):
            (parents, kinds), tokens = tree.form.row(row), tree.tokens[row].tolist()
            more = [(parents[n], tokens[n]) for n in range(size, tree.size) if parents[n] >= 0]
            assert len(set(more)) == len(more)
            assert not set(more) & {(parents[n], tokens[n]) for n in range(1, size)}
            assert all(kinds[n] == Kind.ONE_HOT for n in range(size, tree.size))
            mixed += any(parent in parents[1:size] for parent, _ in more)
    assert mixed > 5


# The law of sampled texts


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
def test_texts_of_the_real_loop_follow_the_targets_joint_law(rule, tmp_path):
    """All rows share one memory, so that they draft from what the others did."""
    write([np.array([0, 1, 2, 1, 0, 0, 2]), np.array([1, 1, 2, 0, 1])], tmp_path / "d", 3, {})
    target, stand = TableTarget(3, seed=2), StandDrafter(binary(1), lasting=True)
    drafter = ReaderDrafter(stand, Datastore(tmp_path / "d"), 4, 0.01, lasting=True)
    assert g_over_bound(target, drafter, RULES[rule], [0, 1], 1500, 4, batch=500) < 1
