"""Choosing a tree: the recorded search gives every smaller tree's acceptance length exactly, and costs are read off
timed runs.
"""

import pytest
import torch

from draftsmith.eval.decode import Clock, Pass, Trace, generate
from draftsmith.eval.measurement.choose import Costs, best_by_rows, expected_tau, fit, ranking, record, walk
from draftsmith.eval.measurement.interval import difference_interval, quotient_interval, ratio_interval
from draftsmith.eval.measurement.measure import Run, decode_batches, tau
from draftsmith.eval.measurement.suite import Plan, Suite
from draftsmith.eval.measurement.sweep import sweep
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter, drafting
from draftsmith.models.errors import UserError
from draftsmith.models.grow import NONE, DynamicTree, chain, parse_tree
from tests.conftest import tiny_target, trained_head
from tests.eval.measurement.test_measure import PROMPTS


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, seed=3)], ids=["T=0", "T=0.7"])
def test_expected_tau_is_the_measured_one(target, sampling):
    head = trained_head(target, 50)
    recording = record(target, head, PROMPTS, sampling, 30, {7}, DynamicTree(6, 4, 115))
    table = expected_tau(recording)
    assert (
        chain(4) in table and DynamicTree(6, 4, 60) in table and DynamicTree(3, 1, 6) not in table
    )  # it has 4 nodes at most
    for tree in (
        chain(1),
        chain(3),
        DynamicTree(2, 2, 6),
        DynamicTree(3, 3, 8),
        DynamicTree(4, 4, 16),
        DynamicTree(6, 4, 24),
        DynamicTree(6, 3, 60),
    ):
        measured = tau(decode_batches(target, HeadDrafter(head, tree), PROMPTS, sampling, 30, {7}, 4))
        # a narrow search may meet a node that the recorded one dropped; it is never the other way round
        assert table[tree] <= measured + 1e-9 and table[tree] == pytest.approx(measured, rel=0.02), str(tree)
    assert table[DynamicTree(6, 4, 60)] > 1.1


def test_walk_goes_from_root_to_root():
    # levels 2, ., ., 0, 5: roots 0, 3, 4 -> 3 passes for 5 tokens; a second text of one draft
    assert walk([[0, 1, 2, 3, 4], [5]], [2, 9, 9, 0, 5, 1]) == 6 / 4


def test_costs_are_read_off_timed_runs():
    def run(draft, verify, overhead, passes=4):
        parts = [part / 1e3 for part in (draft, verify, overhead)]
        return Run(
            [Trace(emitted=[1] * passes)] * 3,
            [[0], [1], [2]],
            [
                {"begin": 0.0, "passes": [Pass(1, 1, 0, 9, *(part * noise for part in parts))] * passes}
                for noise in (1, 9, 9)
            ],
        )  # two disturbed batches

    drafting = lambda t: 2 + (t.depth - 1) * (1 + 0.1 * t.top_k)  # noqa: E731
    dynamic = [DynamicTree(3, 2, 5), DynamicTree(4, 4, 12), DynamicTree(10, 7, 60)]
    runs = {None: run(0, 10, 1)} | {t: run(0.5 + t.depth, 12 + t.size / 4, 1) for t in (chain(2), chain(6))}
    costs = fit(runs | {t: run(drafting(t), 12 + t.size / 4, 1) for t in dynamic})
    assert costs.plain == pytest.approx(11)
    assert costs.of(DynamicTree(8, 5, 36)) == pytest.approx(2 + 4 * 1.8 + 12 + 9 + 1)
    assert costs.of(chain(4)) == pytest.approx(4.5 + 12 + 5 / 4 + 1)


def test_ranking_prefers_tokens_a_second_over_tokens_a_pass():
    costs = Costs(10.0, (9.0, 1.0), (1.0, 1.0), (1.0, 1.0, 0.0))
    best, *rest = ranking({chain(2): 2.0, DynamicTree(10, 7, 60): 4.0}, costs)
    assert best == (chain(2), 2.0, pytest.approx(20 / 14))
    assert [(tree, speedup) for tree, _, speedup in rest] == [
        (NONE, 1.0),
        (DynamicTree(10, 7, 60), pytest.approx(40 / 76)),
    ]


def test_where_no_tree_pays_nothing_is_drafted(target):
    """As in batches on a processor whose passes cost what their rows do."""
    head, dear = trained_head(target, 50), Costs(1.0, (0.0, 1.0), (1.0, 1.0), (1.0, 1.0, 0.0))
    plan = Plan(DynamicTree(4, 3, 12), 3, None, 2, (0.0,), ((0.0, 2),), 12, 0)
    costs = {("head", False, rows, 1): dear for rows in (1, 2)}  # prompts of 3 tokens in the median
    suite = Suite("", target, {"head": head}, {}, PROMPTS[:3], {7}, plan, report=lambda line: None, costs=costs)
    results, cells, _ = suite.measure()
    timed = next(cell for cell in cells if cell["method"] == "head")
    assert results["head"]["tree"] == str(NONE) and next(iter(results["head"]["sweep"])) == str(NONE)
    assert timed["tau"] == 1.0 and timed["lossless"] and timed["acceptance_by_depth"] == []
    assert isinstance(drafting(head, parse_tree("none")), NoDrafter)  # the head is not even asked


def test_the_tree_changes_while_a_batch_shrinks(target):
    """Where rows cost nothing for one request and much for three; texts stay those of plain decoding."""
    head, free = trained_head(target, 50), Costs(1.0, (1.0, 0.0), (0.0, 0.0), (0.0, 0.0, 0.0))
    dear = Costs(1.0, (0.0, 1.0), (1.0, 1.0), (1.0, 1.0, 0.0))
    taus = {chain(2): 1.5, DynamicTree(4, 3, 12): 2.0}
    tree = best_by_rows(taus, free, dear, 3)
    assert str(tree) == "rows:1=dynamic:4x3x12,2=none" and parse_tree(str(tree)) == tree
    assert best_by_rows(taus, free, free, 3) == DynamicTree(4, 3, 12) == best_by_rows(taus, dear, free, 1)
    middle = free.towards(dear, 0.5)
    assert middle.plain == 1.0 and middle.of(chain(2)) == pytest.approx((free.of(chain(2)) + dear.of(chain(2))) / 2)
    drafter = HeadDrafter(head, tree)
    prompts = PROMPTS[:3]
    texts = generate(target, NoDrafter(), prompts, Sampling(), 30)
    stops = {texts[0].tokens[4], texts[1].tokens[8]}  # two end before the third
    plain = generate(target, NoDrafter(), prompts, Sampling(), 30, stops)
    clock = Clock(target.device)
    traces = generate(target, drafter, prompts, Sampling(), 30, stops, clock=clock)
    assert [t.tokens for t in traces] == [t.tokens for t in plain]
    assert {(one.rows > 1, one.nodes) for one in clock.passes} == {(True, 1), (False, 12)}


@pytest.mark.parametrize(
    "text", ["rows:2=chain:2", "rows:1=chain:2,1=none", "rows:1=sampled:chain:2", "rows:", "rows:1"]
)
def test_trees_by_rows_that_are_none(text):
    with pytest.raises(UserError, match="rows:1=TREE"):
        parse_tree(text)


def test_suites_of_like_length_share_their_costs(target):
    """What another suite has measured is not measured again; prompts of six times the length are others."""
    head, found = trained_head(target, 50), []
    short, long = Costs(1.0, (1.0, 0.0), (0.0, 0.0), (0.0, 0.0, 0.0)), Costs(2.0, (1.0, 0.0), (0.0, 0.0), (0.0,) * 3)
    costs = {("head", False, 1, 1): short, ("head", False, 1, 2): long}
    plan = Plan(DynamicTree(4, 3, 12), 3, None, 1, (0.0,), ((0.0, 1),), 8, 0)
    for prompts in (PROMPTS[:3], PROMPTS[:3:2], [p * 6 for p in PROMPTS[:3]]):
        suite = Suite("", target, {"head": head}, {}, prompts, {7}, plan, report=lambda line: None, costs=costs)
        found.append(suite.cost("head", 0.0, 1))
    assert found == [short, short, long] and len(costs) == 2


def test_sweep_times_the_chosen_tree_among_the_others(target):
    head = trained_head(target, 50)
    result = sweep(
        target, head, PROMPTS[:3], {7}, [chain(2), DynamicTree(3, 2, 6)], Sampling(), 2, 12, lambda line: None
    )
    assert (
        result["auto"] in result["trees"]
        and {"chain:2", "dynamic:3x2x6"} <= result["trees"].keys()
        and 0.2 < result["auto_over_best"] < 5
    )
    for figures in result["trees"].values():
        assert figures["expected_tau"] == pytest.approx(figures["tau"], rel=0.02) and figures["speedup"] > 0


def test_intervals_cover_the_true_ratio_and_pairing_narrows_differences():
    generator, covered, seeds = torch.Generator().manual_seed(0), 0, 200
    for seed in range(seeds):
        passes = torch.randint(5, 30, (40,), generator=generator)
        tokens = passes * (1 + torch.rand(40, generator=generator))  # true ratio 1.5
        low, high = ratio_interval(tokens.tolist(), passes.tolist(), seed)
        covered += low <= 1.5 <= high
    assert 0.90 <= covered / seeds <= 0.99, covered / seeds
    low, high = difference_interval(((tokens + passes).tolist(), passes.tolist()), (tokens.tolist(), passes.tolist()))
    assert low == pytest.approx(1) and high == pytest.approx(1)  # one more token in every pass, whatever the prompt
    assert quotient_interval(
        (tokens.tolist(), passes.tolist()), ((tokens / 2).tolist(), passes.tolist())
    ) == pytest.approx([2, 2])
    assert ratio_interval([1.0, 2.0], [1.0, 1.0], 3) == ratio_interval([1.0, 2.0], [1.0, 1.0], 3) and ratio_interval(
        [0], [0]
    ) == [0.0, 0.0]


def test_a_batch_of_ragged_rows_equals_single_runs():
    target = tiny_target()
    head, prompts = trained_head(target, 50), [[(7 * i + j) % 60 + 1 for j in range(3 + 5 * i)] for i in range(8)]
    for sampling in (Sampling(), Sampling(0.8, seed=1)):
        single = decode_batches(target, HeadDrafter(head, DynamicTree(4, 3, 12)), prompts, sampling, 24, {7, 11}, 1)
        ragged = decode_batches(target, HeadDrafter(head, DynamicTree(4, 3, 12)), prompts, sampling, 24, {7, 11}, 8)
        assert len({len(t.emitted) for t in ragged}) > 2  # they finish at different times
        assert [(t.tokens, t.emitted) for t in single] == [(t.tokens, t.emitted) for t in ragged]
