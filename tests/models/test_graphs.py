"""Passes of static shapes give the texts of the usual ones, read nothing on the host, and are given up where they do
not.

Without CUDA a replay is a call: the shapes, masks and caches are tested here, the capture itself on a GPU.
"""

import gc
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from draftsmith.eval.decode import generate, stream
from draftsmith.eval.sampling import Sampling
from draftsmith.models import graphs
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.graphs import Captured, Graphs, bucket
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import captured
from draftsmith.models.slots import SlotCache
from draftsmith.models.targets import TextTarget, session
from tests.benchmarks.decoding import reads_per_pass
from tests.conftest import tiny_head, tiny_target, trained_head

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]
TREES = ["dynamic:3x3x9", "chain:4", "binary:2", "rows:1=dynamic:2x3x5,2=chain:2,4=none", "none"]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Buckets of 16 slots, so that short texts cross several."""
    for module in (graphs, session, captured):
        monkeypatch.setattr(module, "STEP", 16)


@pytest.fixture
def pair():
    target = tiny_target()
    return target, trained_head(target, 40)


def drafter_of(head, tree: str):
    return NoDrafter() if tree == "none" else HeadDrafter(head, parse_tree(tree))


def switched(target, head, on: bool) -> None:
    target.graphs.on = head.graphs.on = on


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree", TREES)
def test_texts_are_those_of_eager_passes(pair, tree, temperature):
    target, head = pair
    found = {}
    for on in (False, True):
        switched(target, head, on)
        drafter = drafter_of(head, tree)
        found[on] = generate(target, drafter, PROMPTS, Sampling(temperature, seed=3), 40)
        alone = [generate(target, drafter, [p], Sampling(temperature, seed=3), 40, requests=[i])[0]
                 for i, p in enumerate(PROMPTS)]  # fmt: skip
        assert [t.tokens for t in alone] == [t.tokens for t in found[on]]
    assert [(t.tokens, t.accepted) for t in found[True]] == [(t.tokens, t.accepted) for t in found[False]]
    assert target.graphs.on and head.graphs.on  # nothing was given up
    keys = [key for cache in target.graphs.spare.caches for key in cache.graphs]
    assert len({visible for *_, visible in keys}) > 1
    if tree not in ("none",):
        assert [key for cache in head.graphs.spare.caches for key in cache.graphs]


def test_sliding_window_and_continuous_batches():
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=7, head_dim=8)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=7, initializer_range=0.3)
    config = MistralConfig(**shape)
    target = TextTarget(MistralForCausalLM(config).float(), "mistral")
    head, found = trained_head(target), {}
    for on in (False, True):
        switched(target, head, on)
        waiting = list(enumerate(PROMPTS * 3))
        take = lambda count: [waiting.pop(0) for _ in range(min(count, len(waiting)))]  # noqa: E731, B023
        drafter = HeadDrafter(head, parse_tree("dynamic:3x3x9"))
        found[on] = {request: t.tokens for request, t in stream(target, drafter, take, 3, Sampling(), 25)}
    assert found[True] == found[False]
    assert target.graphs.on and head.graphs.on


def test_later_requests_find_the_graphs_of_earlier_ones(pair):
    target, head = pair
    switched(target, head, True)
    drafter = HeadDrafter(head, parse_tree("dynamic:3x3x9"))
    counts = []
    for prompt in ([3, 1, 4], [1, 5, 9], [2, 6, 5]):
        generate(target, drafter, [prompt], Sampling(), 40)
        gc.collect()
        counts.append([sum(len(c.graphs) for c in one.graphs.spare.caches) for one in (target, head)])
        drafter.context = None  # the drafter holds on to its last request
        gc.collect()
    assert counts[1] == counts[2]
    caches = target.graphs.spare.caches
    assert len(caches) <= graphs.KEPT and all(type(cache) is SlotCache for cache in caches)


class Reads(TorchDispatchMode):
    """Operations that a capture forbids: reads by the host, and tensors that come from it."""

    FORBIDDEN = ("_local_scalar_dense", "equal", "nonzero", "lift_fresh", "is_nonzero", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.FORBIDDEN, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tree", ["dynamic:3x3x9", "chain:4", "binary:2"])
def test_captured_passes_read_nothing_on_the_host(pair, tree, monkeypatch):
    target, head = pair
    switched(target, head, True)
    seen, call = [], Captured.__call__

    def watched(self, inputs):
        seen.append(1)
        with Reads():
            return call(self, inputs)

    monkeypatch.setattr(Captured, "__call__", watched)
    generate(target, HeadDrafter(head, parse_tree(tree)), PROMPTS, Sampling(), 20)
    assert len(seen) > 10 and target.graphs.on and head.graphs.on
    with pytest.raises(AssertionError), Reads():
        torch.tensor([1])


def test_the_host_waits_once_a_pass(pair):
    """For what was accepted; an eager pass once more, for the lengths of the head's cache."""
    target, head = pair
    drafter = HeadDrafter(head, parse_tree("dynamic:3x3x9"))
    for on, most in ((False, 2), (True, 1)):
        switched(target, head, on)
        for _ in range(4):  # two caches, each of which grows once: the first use of a shape compares
            generate(target, drafter, PROMPTS[:1], Sampling(), 80)
        assert 0 < reads_per_pass(target, drafter, PROMPTS[0]) <= most


def test_other_figures_are_told_once_and_eager_from_then_on(caplog):
    cache, one = SlotCache(1, 1, 1, 8, 4, torch.float32, "cpu"), torch.ones(2, 3)
    passes = Graphs(torch.device("cpu"))
    passes.on = True
    with caplog.at_level(logging.WARNING, "draftsmith"):
        assert passes(cache, ("right",), lambda x: (x + 1,), lambda: (one + 1,), {"x": one})[0].equal(one + 1)
        assert passes(cache, ("wrong",), lambda x: (x + 1.1,), lambda: (one + 1,), {"x": one}) is None
    assert not passes.on and caplog.text.count("no CUDA graphs") == 1 and "differ" in caplog.text
    assert list(cache.graphs) == [("right",)]


def test_a_capture_that_fails_is_told(caplog):
    def broken(x):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    cache, passes = SlotCache(1, 1, 1, 8, 4, torch.float32, "cpu"), Graphs(torch.device("cpu"))
    with caplog.at_level(logging.WARNING, "draftsmith"):
        assert passes(cache, (), broken, lambda: (torch.ones(1),), {"x": torch.ones(1)}) is None
    assert "not permitted when stream is capturing" in caplog.text and "more" not in caplog.text


def test_not_a_number_is_another_figure():
    assert not graphs.agree((torch.tensor([float("nan")]),), (torch.tensor([1.0]),))
    assert graphs.agree((torch.tensor([1.0, 9.0]), torch.tensor([1])), (torch.tensor([1.0]), torch.tensor([2])))


def test_windowed_heads_and_drawn_trees_stay_eager(target):
    head = tiny_head(target, sliding_window=6)
    switched(target, head, True)
    generate(target, HeadDrafter(head, parse_tree("chain:3")), PROMPTS, Sampling(), 20)
    drawn = tiny_head(target)
    drawn.graphs.on = True
    generate(target, HeadDrafter(drawn, parse_tree("sampled:chain:3")), PROMPTS, Sampling(1.0), 20)
    for one in (head, drawn):
        assert not [key for cache in one.graphs.spare.caches for key in cache.graphs]


def test_growth_of_a_cache_drops_graphs():
    cache = SlotCache(1, 2, 1, 8, 4, torch.float32, "cpu")
    cache.graphs["key"] = None
    cache.hold(8)
    assert cache.graphs
    cache.hold(9)
    assert not cache.graphs and cache.capacity == 16


def test_buckets():
    assert [bucket(n, 8) for n in (1, 8, 9, 60, 100, 257)] == [8, 8, 16, 64, 112, 320]
    for count in range(1, 5000, 7):
        assert count <= bucket(count, 16) <= max(count + 15, 1.25 * count)
