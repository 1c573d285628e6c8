"""Robust speed: made-up passes on made-up machines, where the true ratio is known, and what decoding records of its
passes.
"""

import json
import os
import random

import pytest
import torch

from draftsmith.eval.decode import Clock, Pass, generate
from draftsmith.eval.measurement import speed
from draftsmith.eval.measurement.baselines import Generate
from draftsmith.eval.measurement.journal import Journal, settings_before
from draftsmith.eval.measurement.measure import Looped, interleaved, summary
from draftsmith.eval.measurement.speed import LEAST, groups, in_words, low, robust_figures, robust_ms, robust_seconds
from draftsmith.eval.measurement.threads import WORTH, chosen_threads
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.grow import DynamicTree
from tests.conftest import tiny_target, trained_head
from tests.eval.measurement.test_measure import PROMPTS

TOKENS, TAU, UNITS = 60, 3, 20
PLAIN, TREE = (1e-5, 6e-3, 3e-4), (2.6e-3, 8.2e-3, 4e-4)  # seconds of draft, verify and overhead
RATIO = TAU * sum(PLAIN) / sum(TREE)


class Machine:
    """Seconds of work -> wall seconds, beside a neighbour that comes for `on` and goes for `off` seconds (means of
    exponential laws) and slows all work down while it is there. Without one it is quiet.
    """

    def __init__(self, seed: int = 0, on: float = 0.0, off: float = 0.0, slower: float = 1.0):
        self.random, self.on, self.off, self.slower, self.there = random.Random(seed), on, off, slower, False
        self.left = self.random.expovariate(1 / off) if on else float("inf")

    def run(self, work: float) -> float:
        took = 0.0
        while work > 0:
            rate = 1 / self.slower if self.there else 1.0
            step = min(self.left, work / rate)
            took, work, self.left = took + step, work - step * rate, self.left - step
            if self.left <= 0:
                self.there = not self.there
                self.left = self.random.expovariate(1 / (self.on if self.there else self.off))
            if work < 1e-12:
                break
        return took


def unit(machine: Machine, passes: int, parts, nodes: int, length: int = 50, growth: float = 0.0, begin: float = 0.0):
    """What a run records of one text; growth: by how much a token of context makes passes longer."""
    begin, found = machine.run(begin), []
    for number in range(passes):
        at = length + number * TOKENS // passes
        found.append(Pass(1, nodes, nodes - 1, at, *(machine.run(part * (1 + growth * at)) for part in parts)))
    seconds = {part: sum(getattr(p, part) for p in found) for part in speed.PARTS}
    seconds["draft"] += begin
    return seconds | {"total": sum(seconds.values()), "begin": begin, "passes": found}


def measured(machine: Machine, **more):
    """(robust figures, wall speedup) of a drafter beside plain decoding, in turn on UNITS texts."""
    plain, drafted = [], []
    for number in range(UNITS):
        plain.append(unit(machine, TOKENS, PLAIN, 1, 50 + number, **more))
        drafted.append(unit(machine, TOKENS // TAU, TREE, 10, 50 + number, **more))
    tokens, total = [TOKENS] * UNITS, lambda units: sum(seconds["total"] for seconds in units)
    return robust_figures(tokens, drafted, (tokens, plain)), total(plain) / total(drafted)


def test_on_a_quiet_machine_robust_speed_is_that_of_the_wall():
    figures, wall = measured(Machine())
    assert figures["robust_speedup"] == pytest.approx(wall, rel=1e-9) == pytest.approx(RATIO, rel=1e-9)
    assert figures["disturbance"] == pytest.approx(1) and figures["robust_ms_per_pass"]["verify"] == pytest.approx(8.2)
    figures, wall = measured(Machine(), growth=0.005, begin=2e-3)  # passes cost 25 to 70 % more as texts grow
    assert figures["robust_speedup"] == pytest.approx(wall, rel=0.01), (figures, wall)
    assert figures["robust_tokens_per_second"] == pytest.approx(TAU / sum(figures["robust_ms_per_pass"].values()) * 1e3)


@pytest.mark.parametrize(
    ("on", "off", "slower"), [(0.02, 0.02, 4), (0.3, 0.3, 5), (2, 2, 8), (1, 4, 30)], ids=lambda value: f"{value:g}"
)
def test_beside_a_neighbour_robust_speed_stays_where_totals_do_not(on, off, slower):
    found = [measured(Machine(seed, on, off, slower), growth=0.002) for seed in range(4)]
    robust, wall = (
        [value / RATIO - 1 for value in values] for values in zip(*((f["robust_speedup"], w) for f, w in found))
    )
    assert max(map(abs, robust)) < 0.04, (robust, wall)
    assert all(f["disturbance"] > 1.1 for f, _ in found)
    if on > 0.1:  # shorter visits hit all methods alike
        assert max(map(abs, wall)) > 0.1, (robust, wall)


def test_a_neighbour_that_meets_one_method_alone_moves_totals_only():
    quiet, plain = Machine(), [unit(Machine(), TOKENS, PLAIN, 1, 50 + n) for n in range(UNITS)]
    hit = random.Random(1)
    drafted = [unit(quiet, TOKENS // TAU, TREE, 10, 50 + n) for n in range(UNITS)]
    for seconds in drafted:
        times = [hit.choice((1, 1, 5, 9, 40)) for _ in seconds["passes"]]
        seconds["passes"] = [Pass(*p[:4], *(s * t for s in p[4:])) for p, t in zip(seconds["passes"], times)]
    tokens = [TOKENS] * UNITS
    figures = robust_figures(tokens, drafted, (tokens, plain))
    total = sum(sum(p[4:]) for seconds in drafted for p in seconds["passes"])
    assert figures["robust_speedup"] == pytest.approx(RATIO, rel=0.01)
    assert UNITS * TOKENS * sum(PLAIN) / total < 0.2 * RATIO  # 1.8x shown as 0.2x


def test_passes_that_do_different_work_are_not_compared():
    """A lookup that finds something in every second pass: without groups the cheap passes would stand for all."""
    cost = lambda nodes: 6e-3 + 3e-4 * (nodes - 1)  # noqa: E731
    sizes = [1 if number % 2 else 11 for number in range(200)]
    passes = [Pass(1, nodes, nodes - 1, 60, 0.0, cost(nodes), 0.0) for nodes in sizes]
    assert robust_ms([{"begin": 0.0, "passes": passes}])["verify"] == pytest.approx(7.5)
    alike = [p._replace(nodes=1, levels=0) for p in passes]
    assert robust_ms([{"begin": 0.0, "passes": alike}])["verify"] == pytest.approx(6)
    # rows of a batch that end: a pass over 4 rows costs more than one over 1
    rows = [Pass(4 - number // 25, 1, 0, 60 + number, 0.0, (4 - number // 25) * 1e-3, 0.0) for number in range(100)]
    assert robust_ms([{"begin": 0.0, "passes": rows}])["verify"] == pytest.approx(2.5)


def test_groups_hold_every_pass_once_and_few_kinds():
    generator = random.Random(0)
    kinds = [(1, *generator.choice(((1, 0), (1, 0), (8, 3), (60, 7))), generator.randint(30, 400)) for _ in range(900)]
    kinds += [(2, 5, 4, 70)] * 3  # too few for a group
    found = groups(kinds)
    assert sorted(i for group in found for i in group) == list(range(len(kinds)))
    assert min(map(len, found)) >= LEAST
    mixed = [group for group in found if len({kinds[i][:3] for i in group}) > 1]
    assert len(mixed) <= 3  # at the borders of kinds, and the three that have none of their own
    apart = [max(kinds[i][3] for i in group) / min(kinds[i][3] for i in group) for group in found if group not in mixed]
    assert sorted(apart)[len(apart) // 2] < speed.NEAR
    assert groups([]) == [] and groups([(1, 5)] * 3) == [[0, 1, 2]]


def test_low_is_a_weighted_quantile():
    values = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0], dtype=torch.float64)
    repeated = torch.tensor([[4.0, 1.0, 5.0, 0.0, 10.0], [1.0, 0.0, 0.0, 0.0, 0.0], [9.0, 1.0, 1.0, 1.0, 1.0]])
    for row, weights in zip(low(values, repeated), repeated):
        copies = sorted(v for v, count in zip(values.tolist(), weights.tolist()) for _ in range(int(count)))
        assert row == next(v for i, v in enumerate(copies, 1) if i >= speed.LOW * len(copies) - 1e-9)


def test_a_unit_drawn_twice_counts_twice_and_intervals_cover_the_truth():
    one, two = unit(Machine(), 40, PLAIN, 1), unit(Machine(), 40, tuple(3 * part for part in PLAIN), 1)
    drawn = robust_seconds([one, two], torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    assert sum(drawn.values()).tolist() == pytest.approx([80 * sum(PLAIN), 240 * sum(PLAIN)])
    covered = 0
    for seed in range(10):
        low_, high = measured(Machine(seed, 0.3, 0.3, 5))[0]["robust_speedup_interval"]
        covered += low_ - 0.01 <= RATIO <= high + 0.01
    assert covered >= 9, covered


def test_words_say_whether_totals_can_be_trusted():
    assert in_words(1.03) == "the machine was quiet: plain passes took 1.0 times their best on average"
    assert "busy: plain passes took 2.3 times their best" in in_words(2.3) and "not to be trusted" in in_words(2.3)


@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_records_every_pass_over_a_batch(target, threads):
    """Their seconds are all of the phases' seconds: the thread's own where it is alone, else the wall's."""
    head, usual = trained_head(target, 50), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        clock = Clock(target.device)
        drafter = HeadDrafter(head, DynamicTree(4, 3, 12))
        traces = generate(target, drafter, PROMPTS, Sampling(), 12, {7}, clock=clock)
    finally:
        torch.set_num_threads(usual)
    assert len(clock.passes) == max(len(trace.emitted) for trace in traces)
    for number, found in enumerate(clock.passes):
        going = [i for i, trace in enumerate(traces) if len(trace.emitted) > number]
        lengths = [len(PROMPTS[i]) + sum(traces[i].emitted[:number]) for i in going]
        assert found[:4] == (len(going), 12, max(traces[i].drafted[number] for i in going), max(lengths))
        assert min(found[4:]) > 0
    assert {found.rows for found in clock.passes} > {1} and clock.begin > 0
    own = clock.busy if threads == 1 else clock.seconds
    for part in speed.PARTS:
        total = sum(getattr(found, part) for found in clock.passes) + clock.begin * (part == "draft")
        assert total == pytest.approx(own[part], abs=1e-6 * (1 + len(clock.passes))), part


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}, {"assistant": 2}], ids=str)
def test_passes_of_the_library_are_recorded_too(target, options):
    if "assistant" in options:
        options = {"assistant": tiny_target(options["assistant"], seed=0)}
    (trace,), seconds = Generate(target, **options)([PROMPTS[0]], [0], Sampling(), 24, set())
    assert [(p.rows, p.nodes - 1) for p in seconds["passes"]] == [(1, drafted) for drafted in trace.drafted]
    lengths = [len(PROMPTS[0]) + sum(trace.emitted[:number]) for number in range(len(trace.emitted))]
    assert [p.length for p in seconds["passes"]] == lengths
    took = sum(sum(p[4:]) for p in seconds["passes"])
    assert took == pytest.approx(seconds["busy"]["total"], rel=1e-6)  # one thread (tests run on one)
    assert (sum(p.draft for p in seconds["passes"]) > 0) == ("assistant" in options)


def test_figures_of_a_journal_read_again_are_the_same(target, tmp_path):
    decoders = {"plain": Looped(target, NoDrafter()), "lib": Generate(target, prompt_lookup_num_tokens=4)}
    arguments = decoders, PROMPTS[:3], Sampling(), 12, {7}
    runs, again = (interleaved(*arguments, journal=Journal(tmp_path / "j", {"threads": 1})) for _ in range(2))
    for name in decoders:
        first, second = (summary(found[name], None, found["plain"]) for found in (runs, again))
        assert first == second and first["robust_speedup"] > 0 and first["disturbance"] > 0
    assert summary(runs["plain"], None, runs["plain"])["robust_speedup"] == 1
    assert settings_before(tmp_path / "j") == {"threads": 1} and settings_before(tmp_path / "none") == {}
    (tmp_path / "torn").write_text(json.dumps({"threads": 1}))
    assert settings_before(tmp_path / "torn") == {}


def test_threads_are_those_asked_for_or_of_the_run_that_goes_on_or_tried(monkeypatch):
    target, usual = tiny_target(1), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for asked, before, expected in ((3, 1, 3), (None, 1, 1), (None, None, 2)):  # OMP_NUM_THREADS is set in tests
            with chosen_threads(target, asked, before) as tried:
                assert torch.get_num_threads() == expected and tried == {}
            assert torch.get_num_threads() == 2
        assert "OMP_NUM_THREADS" in os.environ
        monkeypatch.delenv("OMP_NUM_THREADS")
        said = []
        with chosen_threads(target, report=said.append) as tried:
            assert tried.keys() == {1, 2} and min(tried.values()) > 0
            assert torch.get_num_threads() == (2 if tried[2] < WORTH * tried[1] else 1)
        assert len(said) == 1 and said[0].startswith("threads: ")
    finally:
        torch.set_num_threads(usual)
