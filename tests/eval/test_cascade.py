"""Cascades: the exact law of whole steps, mistakes that it must catch, the enumerated figures of a chain of three
models, and the real loop.
"""

from fractions import Fraction

import pytest
import torch

from draftsmith.eval.cascade import CascadeDrafter, common
from draftsmith.eval.decode import cut, generate, stream
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.verifier import MATCH
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.recycling import RecyclingDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.grow import chain, parse_tree
from draftsmith.models.noise import Draw
from draftsmith.models.tree import Kind
from tests.cascades import Constant, Stepping, TableChain, buffers_of
from tests.conftest import tiny_head, tiny_target
from tests.eval.test_decode import PROMPTS
from tests.steps import Table, begin, law_of_steps
from tests.table_target import TableTarget, g_over_bound

EXACT = 1e-12
P1, P2, P3 = [0.3, 0.4, 0.3], [0.4, 0.4, 0.2], [0.6, 0.3, 0.1]
FIGURES = {  # buffer: expected length, passes of the middle model, tokens per pass of the target by two rules
    1: ("61/25", 1, "2971/1000", "3023/1000"),
    2: ("366/125", "6/5", "8413/2500", "8569/2500"),
    3: ("427/125", "7/5", "185999/50000", "763447/200000"),
}


@pytest.mark.parametrize("buffer", [1, 2])  # 3: tests/benchmarks/cascade.py
def test_a_chain_of_three_models_has_the_enumerated_figures(buffer):
    """methods/polybasic.md 3.1, to the fraction."""
    for found, want in enumerated(buffer):
        assert found == pytest.approx(float(want), abs=EXACT)


def enumerated(buffer: int) -> list[tuple[float, Fraction]]:
    """(found, expected): buffer length, passes of the middle model, tokens per pass of the target by each rule."""
    length, passes, token_level, traversal = (Fraction(figure) for figure in FIGURES[buffer])
    cascade = Stepping(Constant(P2), TableChain(Constant(P3), 2), RULES["rejection"], buffer)
    begin(cascade, (0,), 1)
    found = buffers_of(cascade, Draw(1.0, 0, [0], [1]))
    assert sum(chance for chance, _ in found.values()) == pytest.approx(1, abs=EXACT)
    mean = sum(chance * len(tokens) for tokens, (chance, _) in found.items())
    figures = [(mean, length), (mean / (61 / 25), passes)]
    logits = torch.tensor(P1, dtype=torch.float64).log()
    for rule, want in (("rejection", token_level), ("block", traversal), ("traversal", traversal)):
        accepted = [c * RULES[rule].law(t, logits.expand(1, t.size, 3)).expected.item() for c, t in found.values()]
        figures.append((1 + sum(accepted), want))
    return figures


# The law


def error(drafter, rule, seed=0, length=3, vocab=2, change=lambda tree: tree):
    """(total variation, accepted tokens in expectation) of whole steps behind a table target."""
    p = Table(vocab, seed, zeros=0.0)
    begin(drafter, (0,), 1)
    return law_of_steps(drafter, RULES[rule], p, (0, 1), length, lambda drafter: (), change)


def three(seed=0, inner="rejection", kind=Kind.IID, buffer=2, depth=1, type_=Stepping, vocab=2):
    tables = [Table(vocab, 100 * seed + n, zeros=0.0) for n in (2, 3)]
    return type_(tables[0], TableChain(tables[1], depth, kind), RULES[inner], buffer)


@pytest.mark.parametrize(
    ("rule", "inner", "kind"),
    [
        ("rejection", "rejection", Kind.IID),
        ("traversal", "traversal", Kind.WITHOUT_REPLACEMENT),
        ("block", "block", Kind.IID),
        ("match", "match", Kind.ONE_HOT),
        ("spectr", "spectr", Kind.IID),
    ],
)
def test_three_models_have_the_targets_joint_law_by_every_rule(rule, inner, kind):
    """Several steps: buffers are filled, kept in part, and begun behind tokens that the middle model never saw."""
    if rule == "spectr":  # one level of draws: the middle model drafts for itself, a token at a time
        tables = Table(2, 2, zeros=0.0)
        plain = Stepping(tables, Alone(), RULES["match"], 1)
        assert error(plain, rule)[0] < EXACT
        return
    found, accepted = error(three(1, inner, kind), rule)
    assert found < EXACT and accepted > 0.4, (found, accepted)


class Alone(NoDrafter):
    def prepare(self, choices):
        pass


def four(seed=0, buffers=(2, 1)):
    tables = [Table(2, 100 * seed + n, zeros=0.0) for n in (2, 3, 4)]
    lowest = TableChain(tables[2], 1)
    return Stepping(tables[0], Stepping(tables[1], lowest, RULES["rejection"], buffers[1]), RULES["block"], buffers[0])


@pytest.mark.parametrize("rule", ["rejection", "traversal", "match"])
def test_four_models_have_the_targets_joint_law(rule):
    found, accepted = error(four(1), rule)
    assert found < EXACT and accepted > 0.4, (found, accepted)


# Mistakes


class LowestQ(Stepping):
    """The buffer is judged by the rows of the lowest drafter."""

    def _pass(self, draw, roots, unseen):
        tokens, counts, q = super()._pass(draw, roots, unseen)
        texts = [
            (*self.session.texts[0][: 1 - int(counts) or None], *tokens[0, :n].tolist()) for n in range(int(counts))
        ]
        rows = torch.stack([self.drafter.table(text) for text in texts])
        return tokens, counts, rows[None]


class WithoutCorrections(Stepping):
    """Only tokens that the middle model accepted stand in the buffer, not what it writes behind them."""

    def _chain(self, buffers, rows_of_q):
        return super()._chain([buffer[:-1] for buffer in buffers], rows_of_q)


class Flattened(Stepping):
    """The rows are those of another temperature than the one that was drawn at."""

    def _chain(self, buffers, rows_of_q):
        return super()._chain(buffers, [((q**0.5) / (q**0.5).sum(-1, keepdim=True), n) for q, n in rows_of_q])


@pytest.mark.parametrize("mistake", [LowestQ, WithoutCorrections, Flattened])
def test_the_law_betrays_mistakes(mistake):
    """Dropping the correction keeps buffers by what they turned out to be."""
    found = max(error(three(seed, buffer=1, type_=mistake), "rejection", seed, length=2)[0] for seed in (1, 2, 3))
    assert found > 0.01, found


def test_lossy_stages_and_drafters_that_cannot_go_back_are_refused_by_name():
    target = tiny_target()
    with pytest.raises(UserError, match="cascade: found typical between models, expected a lossless rule"):
        CascadeDrafter(target, NoDrafter(), RULES["typical"])
    with pytest.raises(UserError, match="cascade: found recycling:recycling as drafter of the middle model"):
        CascadeDrafter(target, RecyclingDrafter(61))


# The real loop


def middles():
    """Drafters by name, over a middle model that agrees with the target in part."""
    target, middle = tiny_target(), tiny_target(layers=7, seed=0)
    torch.manual_seed(9)
    for weight in middle.model.parameters():
        weight.add_(torch.randn_like(weight) * 0.02)
    head = tiny_head(middle)
    stand = StandDrafter(chain(2), lasting=False)
    lowest = {
        "plain": (NoDrafter(), MATCH),
        "lookup": (LookupDrafter(4), MATCH),
        "suffix": (SuffixDrafter(8), MATCH),
        "stand": (stand, RULES["traversal"]),
        "head": (HeadDrafter(head, parse_tree("dynamic:3x3x8")), MATCH),
        "sampled head": (HeadDrafter(head, parse_tree("sampled:binary:2")), RULES["traversal"]),
    }
    found = {name: CascadeDrafter(middle, drafter, rule, 5) for name, (drafter, rule) in lowest.items()}
    small = tiny_target(layers=2, seed=3)
    found["cascade"] = CascadeDrafter(middle, CascadeDrafter(small, NoDrafter(), MATCH, 2), RULES["block"], 4)
    return target, found


@pytest.fixture(scope="module")
def models():
    return middles()


@pytest.mark.parametrize("name", ["plain", "lookup", "suffix", "stand", "head", "sampled head", "cascade"])
def test_texts_are_those_of_plain_decoding_for_ragged_batches(models, name):
    """Greedy and by matching; a real model in the middle, whose cache follows what the target keeps."""
    target, found = models
    for sampling in (Sampling(), Sampling(0.8, seed=3)):
        want = [t.tokens for t in generate(target, NoDrafter(), PROMPTS, sampling, 16, {7})]
        for prompts in (PROMPTS, PROMPTS[:1]):
            traces = generate(target, found[name], prompts, sampling, 16, {7})
            assert [t.tokens for t in traces] == want[: len(prompts)]
    tally = found[name].tally
    assert tally.accepted > 0 and tally.tokens >= tally.proposed and tally.passes >= tally.cycles


def test_caches_of_all_models_follow_the_text(models):
    """At the end the middle model holds the rows of a fresh prefill, and so does its head."""
    target, found = models
    cascade = found["head"]
    (trace,) = generate(target, cascade, PROMPTS[:1], Sampling(), 24)
    session, text = cascade.session, [*PROMPTS[0], *trace.tokens]
    length = int(session.lengths[0])
    assert length + len(cascade.unseen[0]) + 1 >= len(text) - 1  # the last pass may have been cut
    fresh = cascade.middle.open(cascade.drafter.feature_spec, 1, 64)
    features = fresh.prefill([text[:length]]).features
    assert torch.allclose(session.cache.store[:, :, :, :length], fresh.cache.store[:, :, :, :length], atol=1e-4)
    context, again = cascade.drafter.context, cascade.drafter.head.prefill(features)
    known, left = int(context.cache.lengths[0]), int(context.pending.lengths[0])
    assert torch.allclose(context.cache.store[..., :known, :], again.cache.store[..., :known, :], atol=1e-4)
    assert known + left == length and left <= 7  # of one buffer
    assert torch.allclose(context.pending.hidden, features.hidden[:, known:length], atol=1e-3)


def test_buffers_end_at_stops_and_limits():
    """A drafter that is told what is left proposes no more than the text can take."""
    target = tiny_target()
    cascade = CascadeDrafter(target, NoDrafter(), MATCH, 8)
    (plain,) = generate(target, NoDrafter(), PROMPTS[:1], Sampling(), 24)
    stop = plain.tokens[5]
    (trace,) = generate(target, cascade, PROMPTS[:1], Sampling(), 24, {stop})
    assert trace.tokens == plain.tokens[: plain.tokens.index(stop) + 1]
    assert cascade.tally.proposed <= len(trace.tokens)
    for limit in (1, 2, 3, 9, 10, 11):
        cascade = CascadeDrafter(target, NoDrafter(), MATCH, 8)
        (trace,) = generate(target, cascade, PROMPTS[:1], Sampling(), limit)
        assert trace.tokens == plain.tokens[:limit]
        # The token from the prefill and one bonus token a pass are not drafted
        assert cascade.tally.proposed == limit - 1 - len(trace.emitted)


def test_a_copy_of_the_target_is_accepted_whole():
    target = tiny_target()
    for rule in ("rejection", "block", "traversal"):
        cascade = CascadeDrafter(target, NoDrafter(), MATCH, 4)
        traces = generate(target, cascade, PROMPTS, Sampling(1.0, seed=2), 26, verifier=RULES[rule])
        assert all(trace.accepted == trace.drafted == [4] * 5 for trace in traces)


@pytest.mark.parametrize(("rule", "inner"), [("rejection", "rejection"), ("block", "traversal"), ("match", "match")])
def test_sampled_texts_have_the_targets_law(rule, inner):
    """4,000 texts through the real loop (50,000: tests/benchmarks/cascade.py --texts 50000)."""
    assert sampled(rule, inner, 4000) < 1


def sampled(rule: str, inner: str, count: int) -> float:
    """G over its bound, of a cascade of three tables; each predicts from the last two tokens."""
    target, middle = TableTarget(3, seed=2), TableTarget(3, seed=5)
    middle.p = 0.6 * target.p + 0.4 * middle.p
    drafter = StandDrafter(chain(2), lasting=True) if inner != "match" else LookupDrafter(2, (2, 1))
    cascade = CascadeDrafter(middle, drafter, RULES[inner], 2)
    return g_over_bound(target, cascade, RULES[rule], [0, 1], count, 4, batch=500)


@pytest.mark.parametrize("name", ["head", "cascade"])
def test_requests_may_join_a_running_batch(models, name):
    """Continuous batching: rows end, others take their places, in the caches of all models."""
    target, found = models
    prompts = [*PROMPTS, [7, 7, 3], [2, 40, 9, 9]]
    want = [t.tokens for t in generate(target, NoDrafter(), prompts, Sampling(), 9, {7})]
    waiting = list(enumerate(prompts))
    take = lambda count: [waiting.pop(0) for _ in range(min(count, len(waiting)))]  # noqa: E731
    traces = dict(stream(target, found[name], take, 3, Sampling(), 9, {7}))
    assert [traces[i].tokens for i in range(len(prompts))] == want


@pytest.mark.parametrize("vocab", [50, 70])
def test_a_middle_model_may_have_other_rows_of_padding(vocab):
    """Ids that only one of the two models has are never drafted."""
    target, middle = tiny_target(), tiny_target(layers=2, vocab=vocab, seed=3)
    cascade = CascadeDrafter(middle, NoDrafter(), MATCH, 3, target.vocab_size)
    for sampling in (Sampling(), Sampling(1.0, seed=1)):
        want = [t.tokens for t in generate(target, NoDrafter(), PROMPTS[:2], sampling, 14)]
        assert [t.tokens for t in generate(target, cascade, PROMPTS[:2], sampling, 14)] == want
    (trace,) = generate(target, cascade, PROMPTS[:1], Sampling(1.0, seed=1), 14, verifier=RULES["block"])
    assert len(trace.tokens) == 14


def test_helpers_by_hand():
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2 and common([], [1]) == 0 and common([1], [1, 2]) == 1
    assert cut([3, 4, 5], 3, {4}) == [3, 4] and cut([3], 1, frozenset()) == [3]
