"""Choice among drafters: no law changes, idle drafters are ready, losses come once and in order, the better one is
played.
"""

import numpy as np
import pytest
import torch

from draftsmith.eval.decode import generate, stream
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.selecting import HORIZON, SelectingDrafter
from draftsmith.eval.verification.rules import RULES
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.learners import AdaNormalHedge, Exp3, Hedge, NormalHedge, Ucb1, Uniform
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.recycling import RecyclingDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import SuffixRule
from draftsmith.models.errors import UserError
from draftsmith.models.features import Features
from draftsmith.models.grow import StaticTree, chain, parse_tree
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree
from tests.conftest import tiny_head, tiny_target, trained_head
from tests.models.drafters.test_stand import stand
from tests.steps import Table, begin, law_of_steps
from tests.table_target import TableTarget, g_over_bound

SHAPE = StaticTree(((0,), (1,), (0, 0), (0, 1)), "shape")
PROMPTS = [[4, 8, 15, 16, 23, 42] * 3, [9, 7, 9, 3, 2], [1, 2] * 6]
EXACT = 1e-12


@pytest.fixture(scope="module")
def pair():
    target = tiny_target()
    return target, trained_head(target)


class Watching(Uniform):
    """Plays every drafter as often as any other, and has the losses of all of them found."""

    bandit = False


class Second(Watching):
    def weights(self):
        return np.eye(self.count)[1]


def pool(target, head, **options):
    drafters = {
        "head": HeadDrafter(head, parse_tree("dynamic:3x3x8")),
        "sampled": HeadDrafter(tiny_head(target, seed=5), parse_tree("sampled:chain:3")),
        "suffix": SuffixDrafter(8, SuffixRule(factor=4)),
        "lookup": LookupDrafter(4),
        "stand": StandDrafter(SHAPE),
        "recycling": RecyclingDrafter(61, SHAPE),
    }
    return SelectingDrafter(drafters, target.config.hidden_size, **options)


# The law


@pytest.mark.parametrize("options", [{}, {"every": 1}, {"every": 3}, {"replay": True}, {"learner": Ucb1}], ids=str)
def test_texts_are_those_of_plain_decoding_while_drafters_switch(pair, options):
    target, head = pair
    for sampling, prompts in ((Sampling(), PROMPTS), (Sampling(0.7, seed=3), PROMPTS), (Sampling(), PROMPTS[:1])):
        drafter = pool(target, head, **({"learner": Watching} | options))
        want = [t.tokens for t in generate(target, NoDrafter(), prompts, sampling, 30, {7})]
        assert [t.tokens for t in generate(target, drafter, prompts, sampling, 30, {7})] == want
        assert sum(drafter.choices.values()) >= 10 and len([n for n in drafter.choices.values() if n]) >= 3


def test_requests_may_join_a_running_batch(pair):
    target, head = pair
    prompts = [*PROMPTS, [7, 7, 3], [2, 40, 9, 9]]
    want = [t.tokens for t in generate(target, NoDrafter(), prompts, Sampling(), 9, {7})]
    waiting = list(enumerate(prompts))
    take = lambda count: [waiting.pop(0) for _ in range(min(count, len(waiting)))]  # noqa: E731
    traces = dict(stream(target, pool(target, head, learner=Watching), take, 3, Sampling(), 9, {7}))
    assert [traces[i].tokens for i in range(len(prompts))] == want


class Chosen(SelectingDrafter):
    """Over STAND and prompt lookup; the drafter that is played is a choice."""

    def prepare(self, choices):
        self.drafters[0].prepare(choices)
        self.choices_of_law = choices

    def propose(self, draw):
        weights = self.ledgers[0].learner.weights()
        self.ledgers[0].learner = Played(self.ledgers[0].learner, self.choices_of_law.pick(weights.tolist()))
        tree = super().propose(draw)
        self.ledgers[0].learner = self.ledgers[0].learner.learner
        return tree


class Played:
    """A learner whose draw is made."""

    def __init__(self, learner, choice):
        self.learner, self.choice = learner, choice

    def weights(self):
        return np.eye(2)[self.choice]


@pytest.mark.parametrize(("rule", "kind"), [("traversal", NormalHedge), ("rejection", Exp3), ("match", Hedge)])
def test_whole_steps_of_choosing_and_learning_have_the_targets_joint_law(rule, kind):
    """Choose, draw, verify, feed the losses of all drafters, and again: every choice enumerated."""
    p = Table(3, 1, zeros=0.0)
    drafter = Chosen({"stand": stand(StaticTree(((0,), (1,)), "two"), 2), "lookup": LookupDrafter(2, (1,))}, 0, kind)
    begin(drafter, (0, 1, 0), 1)

    def state(drafter):
        ledger, memory = drafter.ledgers[0], drafter.drafters[0].memory
        known = tuple(np.round(ledger.learner.weights(), 14).tolist()), len(ledger.starts), ledger.place
        return (*known, memory.probs[: memory.size].tobytes(), repr(ledger.starts))

    found, accepted = law_of_steps(drafter, RULES[rule], p, (0, 1, 0, 1), 3, state)
    assert found < EXACT and accepted > 0.1, (found, accepted)


def table_pool(learner_, lasting=True):
    drafters = {"stand": StandDrafter(chain(2), lasting=lasting), "lookup": LookupDrafter(2, (2, 1))}
    return SelectingDrafter(drafters, 0, learner_)


@pytest.mark.parametrize(("rule", "kind"), [("traversal", NormalHedge), ("rejection", Ucb1)])
def test_sampled_texts_have_the_targets_law_while_drafters_switch(rule, kind):
    """2,000 texts; 50,000: tests/benchmarks/selection.py --texts 50000."""
    target, drafter = TableTarget(3, seed=2), table_pool(kind)
    assert g_over_bound(target, drafter, RULES[rule], [0, 1], 2000, 4, batch=250) < 1
    assert min(drafter.choices.values()) > 100, drafter.choices


# Idle drafters


def test_idle_drafters_hold_what_a_fresh_prefill_gives(pair):
    """Whatever was played, a head's rows are those of the text."""
    target, head = pair
    for every in (1, 4):
        drafter = pool(target, head, learner=Watching, every=every)
        generate(target, drafter, PROMPTS[:1], Sampling(), 20)
        for name in ("head", "sampled"):
            one = drafter.drafters[drafter.names.index(name)]
            alone = HeadDrafter(one.head, parse_tree("chain:1"))
            (trace,) = generate(target, alone, PROMPTS[:1], Sampling(), 20)
            keys = [d.context.cache.store[..., :18, :] for d in (one, alone)]
            known = [int(d.context.cache.lengths[0]) for d in (one, alone)]
            if drafter.ledgers:
                same = min(*known, 18)
                assert same > 10 and torch.allclose(keys[0][..., :same, :], keys[1][..., :same, :], atol=1e-3), name
    assert sum(drafter.caught_up.values()) > 0


def test_idle_heads_predict_in_turn(pair):
    """One in every other pass; what was not asked for yet is predicted at once, so that all losses are found."""
    target, head = pair
    heads = [HeadDrafter(head, chain(1)) for _ in range(3)]
    drafters, asked, fed = dict(zip("abcd", (heads[0], LookupDrafter(4), *heads[1:]))), [], []
    drafter = SelectingDrafter(drafters, target.config.hidden_size, Second)
    note, feed = drafter._note, drafter._feed
    drafter._note = lambda number, *found: (asked.append((drafter.passes, number)), note(number, *found))
    drafter._feed = lambda ledger: (feed(ledger), fed.append(len(ledger.history)))
    (trace,) = generate(target, drafter, PROMPTS[:1], Sampling(), 16)
    passes = len(trace.emitted)
    assert passes > 6 and asked == [(at, [0, 2, 3][-(at // 2) % 3]) for at in range(0, passes, 2)]
    assert passes - drafter.every <= fed[-1] <= passes


def test_predictions_behind_rows_are_those_of_proposing_there(pair):
    """`follow` notes, for every place, what the head alone would have put behind the text there."""
    target, head = pair
    drafter = SelectingDrafter(
        {"head": HeadDrafter(head, parse_tree("chain:2")), "lookup": LookupDrafter(4)},
        target.config.hidden_size,
        Second,
    )
    noted = {}
    note = drafter._note

    def spy(number, *found):
        note(number, *found)
        noted.update(drafter.ledgers[0].sets[number])

    drafter._note = spy
    (trace,) = generate(target, drafter, PROMPTS[:1], Sampling(), 16)
    for place in range(8):
        text = PROMPTS[0] + trace.tokens[: place + 1]
        prefill = target.open(head.feature_spec, 1, 64).prefill([text[:-1]])
        alone = HeadDrafter(head, chain(1))
        alone.begin(prefill.features, torch.tensor(text[-1:]))
        want = int(alone.propose(Draw(0.0, 0, [0], [len(text)])).tokens[0, 1])
        assert noted[place] == frozenset([want]), place


# Losses


def test_losses_come_once_and_in_order_and_say_what_was_accepted(pair):
    """T = 0, replay: the loss of the drafter that was played is that of the tokens its tree had accepted."""
    target, head = pair
    drafter = pool(target, head, learner=Watching, replay=True)
    kept = []
    feed = SelectingDrafter._feed
    drafter._feed = lambda ledger: (feed(drafter, ledger), kept.append(ledger))
    (trace,) = generate(target, drafter, PROMPTS[:1], Sampling(), 60)
    history = kept[-1].history
    assert 3 < len(history) <= len(trace.accepted)
    for (chosen, losses), accepted in zip(history, trace.accepted):
        length = (1 - losses[chosen]) * (HORIZON + 1)
        # A tree may have been right beyond where this pass ended, never less than what was accepted
        assert length == pytest.approx(min(accepted, HORIZON) + 1), (chosen, losses, accepted)


def test_estimators_order_by_variance_and_agree_in_mean(pair):
    """On sampled texts the realised and the Rao-Blackwell estimate of a proposed tree have one mean."""
    target, head = pair
    means = {}
    for estimator in ("rb", "realised"):
        found = []
        for seed in range(3):
            drafter = SelectingDrafter(
                {"head": HeadDrafter(head, parse_tree("chain:3")), "lookup": LookupDrafter(3)},
                target.config.hidden_size,
                Watching,
                estimator,
                replay=True,
            )
            ledgers, begin_ = [], drafter._join
            drafter._join = lambda root: (begin_(root), ledgers.extend(drafter.ledgers))
            generate(target, drafter, PROMPTS, Sampling(1.0, seed=seed), 24)
            found += [losses[0] for ledger in ledgers for _, losses in ledger.history]
        means[estimator] = np.mean(found), np.std(found) / len(found) ** 0.5, np.std(found)
    (rb, error, spread), (realised, other, wider) = means["rb"], means["realised"]
    assert abs(rb - realised) < 4 * (error + other) and spread <= wider


def test_the_better_drafter_is_played(pair):
    """A trained head beside one that was never trained."""
    target, head = pair
    drafters = {
        "untrained": HeadDrafter(tiny_head(target, seed=8), parse_tree("chain:4")),
        "trained": HeadDrafter(head, parse_tree("chain:4")),
    }
    for kind in (NormalHedge, AdaNormalHedge, Hedge):
        drafter = SelectingDrafter(drafters, target.config.hidden_size, kind)
        generate(target, drafter, PROMPTS, Sampling(), 60)
        share = drafter.choices["trained"] / sum(drafter.choices.values())
        assert share > 0.53, (kind, drafter.choices)


def test_a_lasting_learner_goes_on_from_request_to_request(pair):
    target, head = pair
    drafter = pool(target, head, learner=NormalHedge, lasting=True)
    for prompt in PROMPTS[:2]:
        generate(target, drafter, [prompt], Sampling(), 12)
    first = drafter.ledgers[0].learner if drafter.ledgers else drafter.shared
    assert first is drafter.shared and np.abs(drafter.shared.regrets).sum() > 0


class Same(NoDrafter):
    """The last token once more."""

    size, idle = 2, "propose"

    def propose(self, draw):
        return DraftTree.of(self.root[:, None].repeat(1, 2), torch.tensor([[-1, 0]]).repeat(len(self.root), 1))


def test_any_drafter_that_can_be_idle_is_taken(pair):
    """By what it says of itself, not by which one it is."""
    target, head = pair
    drafters = {"same": Same(), "head": HeadDrafter(head, chain(2))}
    drafter = SelectingDrafter(drafters, target.config.hidden_size, Watching)
    want = [t.tokens for t in generate(target, NoDrafter(), PROMPTS, Sampling(), 12)]
    assert [t.tokens for t in generate(target, drafter, PROMPTS, Sampling(), 12)] == want
    assert min(drafter.choices.values()) > 0, drafter.choices


def test_drafters_that_cannot_be_idle_are_refused_by_name():
    with pytest.raises(UserError, match="select: found nothing at all, expected trained drafters, suffix"):
        SelectingDrafter({"nothing at all": NoDrafter()}, 4)


def test_features_of_several_passes_stand_behind_one_another():
    one = Features(torch.tensor([[1, 2], [3, 0]]), torch.arange(4.0).view(2, 2, 1), torch.tensor([2, 1]))
    two = Features(torch.tensor([[5, 0], [6, 7]]), torch.arange(4.0, 8).view(2, 2, 1), torch.tensor([1, 2]))
    both = one.then(two)
    assert both.lengths.tolist() == [3, 3] and both.tokens.tolist() == [[1, 2, 5], [3, 6, 7]]
    assert both.hidden[..., 0].tolist() == [[0, 1, 4], [2, 6, 7]]
    assert both.first(torch.tensor([1, 2])).tokens.tolist() == [[1, 2], [3, 6]]
