"""HOWL: one source a request and step, by the rule of methods/owl.md section 6; greedy and sampled texts are those of
plain decoding.
"""

import json
from pathlib import Path

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.proof import verify
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.howl import HowlDrafter, merge
from draftsmith.models.drafters.suffix import SuffixDrafter, SuffixRule
from draftsmith.models.formats import save_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.targets import TextTarget
from draftsmith.models.tree import DraftTree
from tests.conftest import tiny_head, tiny_target, trained_head
from tests.eval.test_decode import PROMPTS

LOOPING = [[4, 8, 15, 16, 23, 42] * 3, [9, 7, 9, 3, 2], [1, 2] * 6, [8]]


@pytest.fixture(scope="module")
def pair():
    target = tiny_target()
    return target, trained_head(target)


def howl(head, tree="dynamic:4x3x10", threshold=None, **rule):
    return HowlDrafter(HeadDrafter(head, parse_tree(tree)), SuffixDrafter(12, SuffixRule(factor=4, **rule)), threshold)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, seed=3)], ids=str)
@pytest.mark.parametrize("form", ["path", "tree"])
def test_suffix_decoding_and_howl_emit_what_plain_decoding_emits(pair, sampling, form):
    target, head = pair
    plain = [t.tokens for t in generate(target, NoDrafter(), LOOPING, sampling, 60, {7})]
    suffix = SuffixDrafter(12, SuffixRule(form=form, factor=4), cached_requests=3)
    assert [t.tokens for t in generate(target, suffix, LOOPING, sampling, 60, {7})] == plain
    drafter = howl(head, threshold=1.0, form=form)
    assert [t.tokens for t in generate(target, drafter, LOOPING, sampling, 60, {7})] == plain
    assert {step.source for step in drafter.steps} == {"suffix", "head"}


def test_sampled_head_trees_stay_lossless_beside_suffix_paths(pair):
    target, head = pair
    sampling = Sampling(0.8, seed=5)
    plain = [t.tokens for t in generate(target, NoDrafter(), LOOPING, sampling, 40, {7})]
    drafter = howl(head, "sampled:chain:3", threshold=0.5)
    assert [t.tokens for t in generate(target, drafter, LOOPING, sampling, 40, {7})] == plain
    assert {step.source for step in drafter.steps} == {"suffix", "head"}


def test_the_rule_and_the_log(pair):
    """Step by step: the source follows from score and threshold, the threshold from the head's accepted tokens."""
    target, head = pair
    drafter = howl(head)
    trace = generate(target, drafter, [LOOPING[0]], Sampling(), 60)[0]
    assert [step.accepted for step in drafter.steps] == trace.accepted
    mean = 3.0
    for step in drafter.steps:
        assert step.source == ("suffix" if step.score > mean else "head"), (step, mean)
        if step.source == "head":
            mean = 0.9 * mean + 0.1 * step.accepted
    assert drafter.means == [pytest.approx(mean)]


def test_thresholds_at_the_ends_are_the_single_methods(pair):
    target, head = pair
    never = howl(head, threshold=float("inf"))
    alone = generate(target, HeadDrafter(head, parse_tree("dynamic:4x3x10")), PROMPTS, Sampling(), 30)
    assert [t.accepted for t in generate(target, never, PROMPTS, Sampling(), 30)] == [t.accepted for t in alone]
    always = howl(head, threshold=-1.0)
    suffix = generate(target, SuffixDrafter(12, SuffixRule(factor=4)), PROMPTS, Sampling(), 30)
    assert [t.accepted for t in generate(target, always, PROMPTS, Sampling(), 30)] == [t.accepted for t in suffix]


def test_merged_trees_are_padded():
    path = DraftTree.of(torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0]]), torch.tensor([[-1, 0, 1, 2], [-1, -1, -1, -1]]))
    tree = DraftTree.of(torch.tensor([[5, 1, 2], [9, 3, 4]]), torch.tensor([[-1, 0, 0], [-1, 0, 1]]))
    both = merge(torch.tensor([True, False]), path, tree)
    assert both.tokens.tolist() == [[5, 6, 7, 8], [9, 3, 4, 0]] and both.parents.tolist() == [
        [-1, 0, 1, 2],
        [-1, 0, 1, -1],
    ]
    assert both.real.tolist() == [[True] * 4, [True, True, True, False]]


def test_both_are_methods_of_the_command_line(folder, tmp_path):
    """`draftsmith verify suffix howl:DRAFTER`: the drafter names the target, all texts are those of plain decoding."""
    target = TextTarget.load(folder / "target")
    save_drafter(tiny_head(target), tmp_path / "drafter", {"target": str(folder / "target")})
    (tmp_path / "suite.jsonl").write_text('{"prompt": "import os import os"}\n{"prompt": "fox"}\n')
    names = ["suffix", f"howl:{tmp_path}/drafter"]
    assert verify(
        names,
        str(tmp_path / "suite.jsonl"),
        [],
        ["fp32"],
        ["chain:2"],
        [1, 2],
        [0.0, 0.9],
        24,
        2,
        0,
        tmp_path / "out",
        lambda line: None,
    )
    found = json.loads(Path(tmp_path / "out" / "lossless.json").read_text())["comparisons"]
    assert set(names) < {
        comparison["method"] for comparison in found if comparison["claimed"] and comparison["lossless"]
    }
