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
from draftsmith.models.drafters.howl import Calibration, HowlDrafter, merge
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import Draft, SuffixRule
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


class Logged(HowlDrafter):
    """Keeps what the paths were worth when the source was chosen."""

    def begin(self, features, root):
        super().begin(features, root)
        self.worth, self.paths = [], []

    def propose(self, draw):
        tree = super().propose(draw)
        self.worth.append(self.calibrations[0].of(self.drafts[0].score))
        self.paths.append(self.drafts[0])
        return tree


def test_the_rule_and_the_log(pair):
    """Step by step: the source follows from the calibrated score and the head's accepted tokens, the calibration from
    what paths of its class of scores achieved, verified or not.
    """
    target, head = pair
    drafter = Logged(HeadDrafter(head, parse_tree("dynamic:4x3x10")), SuffixDrafter(12, SuffixRule(factor=4)))
    trace = generate(target, drafter, [LOOPING[0]], Sampling(), 60)[0]
    assert [step.accepted for step in drafter.steps] == trace.accepted
    mean, known, at = 3.0, Calibration(), 1
    for step, worth, path in zip(drafter.steps, drafter.worth, drafter.paths):
        assert worth == pytest.approx(known.of(step.score))
        assert step.source == ("suffix" if worth > mean else "head"), (step, worth, mean)
        if step.source == "head":
            mean = 0.9 * mean + 0.1 * step.accepted
        emitted = trace.tokens[at : at + step.accepted + 1]
        known.note(path, emitted)
        at += len(emitted)
    assert drafter.means == [pytest.approx(mean)] and {step.source for step in drafter.steps} == {"suffix", "head"}


def test_scores_count_for_what_paths_of_their_class_achieved():
    known = Calibration()
    before = known.of(2.5)
    assert before == pytest.approx(2.5 * 0.55)
    path = Draft((1, 2, 3), (-1, 0, 1), (1.0, 1.0, 0.5))
    known.note(path, [1, 9])  # one of three
    assert known.of(2.5) == pytest.approx(2.5 * (6 * 0.55 + 1) / (6 + 2.5)) and known.of(7) == pytest.approx(5.95)
    known.note(path, [1, 2])  # the text follows the path as far as it is known: how far it would have gone is not
    assert known.of(2.5) == pytest.approx(2.5 * (6 * 0.55 + 1) / (6 + 2.5))
    for _ in range(100):
        known.note(path, [1, 2, 3, 4])
    assert known.of(2.5) > 2.5


def test_levels_of_a_path_and_a_tree():
    tree = Draft((1, 2, 3, 2), (-1, -1, 0, 2), (0.9, 0.1, 0.5, 0.4))
    assert [tree.levels(text) for text in ([1, 3, 2, 7], [2, 3], [1, 2], [4], [1, 3])] == [3, 1, 1, 0, 2]
    assert Draft().levels([5]) == 0


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
