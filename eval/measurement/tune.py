"""Tuning a static tree: a large one drafts along calibration texts, and the slots that are accepted most often stay.

An acceptance length is 1 + the sum over slots of the share of passes that accepted their node. Leaving out deeper nodes
and younger siblings changes nothing for the slots that stay (under rules that judge from the root down), so that the
best tree of a size is the closed set with the largest sum (`topology.select`). Only where passes begin differs with
another tree: the chosen one is measured once more.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.measure import tau
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.verifier import Verifier
from draftsmith.models.drafters import Drafter
from draftsmith.models.errors import UserError
from draftsmith.models.grow import StaticTree
from draftsmith.models.targets import TextTarget
from draftsmith.models.topology import Slot, candidates, select


class Counted:
    """A drafter whose accepted slots are counted: accepted {slot: passes}, passes."""

    def __init__(self, drafter: Drafter, accepted: Counter):
        self.drafter, self.accepted, self.passes = drafter, accepted, 0
        self.feature_spec, self.size = drafter.feature_spec, drafter.size
        self.begin, self.select, self.join = drafter.begin, drafter.select, drafter.join

    def propose(self, draw):
        self.tree = self.drafter.propose(draw)
        return self.tree

    def observe(self, features, root):
        tokens, parents = self.tree.tokens.tolist(), self.tree.form.parents
        for row, (path, count) in enumerate(zip(features.tokens.tolist(), features.lengths.tolist())):
            node, slot = 0, ()
            for token in path[1:count]:
                below = [child for child, above in enumerate(parents[row % len(parents)]) if above == node]
                rank = next(rank for rank, child in enumerate(below) if tokens[row][child] == token)
                node, slot = below[rank], (*slot, rank)
                self.accepted[slot] += 1
            self.passes += 1
        self.drafter.observe(features, root)


@dataclass(frozen=True)
class Tuned:
    """slots: of the chosen tree; accepted: how often each candidate was; passes that were counted; expected and
    measured: the acceptance length of the chosen tree, by its slots' counts and by decoding with it; before: that of
    the tree which it replaces, None without one.
    """

    slots: list[Slot]
    accepted: dict[Slot, int]
    passes: int
    expected: float
    measured: float
    before: float | None


def tune(
    target: TextTarget,
    make: Callable[[StaticTree], Drafter],
    rule: Verifier,
    prompts: list[list[int]],
    stops: set[int],
    sampling: Sampling,
    trajectories: int,
    max_new_tokens: int,
    size: int,
    large: list[Slot] | None = None,
    before: StaticTree | None = None,
    report=print,
) -> Tuned:
    """make(tree): a drafter for one prompt, whose trajectories come one after the other; size: drafted nodes at most;
    large: the candidates, closed. Raises UserError where nothing was accepted.
    """
    large = large or candidates()
    accepted, passes = Counter(dict.fromkeys(large, 0)), 0

    def decoded(tree: StaticTree, counter: Counter | None):
        nonlocal passes
        traces = []
        for row, prompt in enumerate(prompts):
            drafter = make(tree) if counter is None else Counted(make(tree), counter)
            for number in range(trajectories):
                requests = [row + number * len(prompts)]
                traces += generate(target, drafter, [prompt], sampling, max_new_tokens, stops, requests, verifier=rule)
            passes += 0 if counter is None else drafter.passes
            report(f"{tree}, prompt {row + 1}/{len(prompts)}: tau {tau(traces):.2f}")
        return tau(traces)

    decoded(StaticTree(tuple(large), f"{len(large)} candidates"), accepted)
    slots = select(accepted, size)
    if not slots:
        raise UserError(
            f"tune-tree: found no drafted token that was accepted in {passes} passes, expected some: more "
            f"trajectories or a lower temperature may give them"
        )
    tree = StaticTree(tuple(slots), f"{len(slots)} chosen")
    return Tuned(
        slots,
        dict(accepted),
        passes,
        1 + sum(accepted[slot] for slot in slots) / max(1, passes),
        decoded(tree, None),
        before and decoded(before, None),
    )
