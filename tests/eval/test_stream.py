"""Continuous batching: whoever shares a batch with a request, and whenever it joins, its text and its drafts are those
of the request alone.
"""

from collections import deque

import pytest
import torch

from draftsmith.eval.decode import generate, stream
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.howl import HowlDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import SuffixRule
from draftsmith.models.errors import UserError
from draftsmith.models.grow import parse_tree
from tests.conftest import tiny_head, tiny_target
from tests.models.heads.test_dream import dream_head
from tests.models.heads.test_eagle import eagle_head
from tests.models.heads.test_hivis import hivis_head
from tests.models.heads.test_owl import tiny_owl
from tests.models.heads.test_spec import spec_owl
from tests.models.targets.test_vision import prompts_of
from tests.tiny_vision import tiny_vision

PROMPTS = [[5, 9] * 7, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [1, 5, 9, 2, 6, 5, 3, 5], [4, 8, 15, 4, 8, 15, 4], [9, 7, 9, 3]]
PROMPTS += [[8, 2, 8], [1, 2], [6], [11]]
NEW, EOS = 20, {7, 19, 23, 31, 40, 55}


class Noted:
    """A drafter whose proposals are kept: {(request, place of the root): tokens of the tree}."""

    def __init__(self, drafter):
        self.drafter, self.feature_spec, self.size = drafter, drafter.feature_spec, drafter.size
        self.begin, self.join, self.observe = drafter.begin, drafter.join, drafter.observe
        self.select, self.trees, self.rows = drafter.select, {}, []

    def propose(self, draw):
        tree = self.drafter.propose(draw)
        self.rows.append(len(draw.requests))
        for request, position, tokens, real in zip(draw.requests, draw.positions, tree.tokens, tree.real):
            self.trees[request, position] = tokens[real].tolist()
        return tree


def streamed(target, drafter, prompts, batch, sampling, new=NEW, eos=EOS):
    waiting, asked = deque(enumerate(prompts)), []

    def take(count):
        asked.append(count)
        return [waiting.popleft() for _ in range(min(count, len(waiting)))]

    return dict(stream(target, drafter, take, batch, sampling, new, eos)), asked


def check(target, drafter, prompts, batch, sampling):
    together, alone = Noted(drafter), Noted(drafter)
    traces, _ = streamed(target, together, prompts, batch, sampling)
    want = [generate(target, alone, [p], sampling, NEW, EOS, [r])[0] for r, p in enumerate(prompts)]
    assert [traces[r].tokens for r in range(len(prompts))] == [t.tokens for t in want]
    assert [traces[r].emitted for r in range(len(prompts))] == [t.emitted for t in want]
    assert together.trees == alone.trees and max(together.rows) <= batch < len(prompts)
    assert len({len(t.tokens) for t in want}) > 2  # requests end at different times


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=3), Sampling(repetition_penalty=1.3)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_plain_texts_are_those_of_every_request_alone(target, sampling, batch):
    check(target, NoDrafter(), PROMPTS, batch, sampling)


@pytest.mark.parametrize(
    "head",
    [tiny_head, eagle_head, lambda target: dream_head(target, 0.75), tiny_owl, spec_owl],
    ids=["eagle3", "eagle", "dream", "owl", "owl with a probe"],
)
@pytest.mark.parametrize("tree", ["chain:3", "dynamic:3x3x8"])
def test_drafts_of_every_head_are_those_of_the_request_alone(target, head, tree):
    check(target, HeadDrafter(head(target), parse_tree(tree)), PROMPTS, 3, Sampling(0.8, seed=3))


def test_drafts_from_text_are_those_of_the_request_alone(target):
    for drafter in (LookupDrafter(4, (2, 1)), SuffixDrafter(8, SuffixRule(factor=4))):
        check(target, drafter, PROMPTS, 3, Sampling())
    howl = HowlDrafter(HeadDrafter(tiny_head(target), parse_tree("chain:3")), SuffixDrafter(8, SuffixRule(factor=4)))
    check(target, howl, PROMPTS, 3, Sampling())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prompts_with_pictures_join_too(family):
    """Qwen's positions run ahead of the places: those of a request that joins must come with it."""
    target = tiny_vision(family)
    prompts = [prompt for prompt in prompts_of(family) for _ in range(2)]
    for head in (dream_head(target), hivis_head(target, family, positions="original")):
        drafter = HeadDrafter(head, parse_tree("chain:3"))
        traces, _ = streamed(target, Noted(drafter), prompts, 2, Sampling(), 12, {7})
        want = [generate(target, NoDrafter(), [p], Sampling(), 12, {7}, [r])[0] for r, p in enumerate(prompts)]
        assert [traces[r].tokens for r in range(len(prompts))] == [t.tokens for t in want]


def test_places_that_become_free_are_taken():
    """In batches that run to their ends most places are idle before the last request of each is done."""
    target, prompts = tiny_target(layers=2), [[1 + i % 60] for i in range(96)]
    noted = Noted(NoDrafter())
    traces, asked = streamed(target, noted, prompts, 16, Sampling(1.0, seed=1), 48)
    lengths = [len(traces[r].tokens) for r in range(96)]
    in_groups = sum(max(lengths[start : start + 16]) - 1 for start in range(0, 96, 16))
    assert len(noted.rows) < 0.7 * in_groups and max(noted.rows) == 16
    assert set(asked) == {2}  # an eighth of the places: one prefill for several requests
    assert not torch.is_inference_mode_enabled()


def test_a_prompt_that_does_not_fit_is_refused_when_its_turn_comes(target):
    with pytest.raises(UserError, match="prompt 0: found 250 tokens, expected at most 235"):
        streamed(target, NoDrafter(), [[1, 2], [1] * 250], 1, Sampling())
    assert streamed(target, NoDrafter(), [], 4, Sampling()) == ({}, [1])
