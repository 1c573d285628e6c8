"""Shapes of static trees: closure, the selection under a budget against all closed sets, files."""

import json
import random
from collections import Counter

import pytest

from draftsmith.models.errors import UserError
from draftsmith.models.grow import StaticTree, parse_tree
from draftsmith.models.topology import (
    RECYCLING_LEVELS,
    before,
    candidates,
    heuristic,
    missing,
    ordered,
    read_slots,
    recycling,
    select,
)


def test_shapes_that_are_given_are_closed():
    assert len(recycling()) == len(heuristic()) == 80 and len(candidates()) == 625
    levels = Counter(map(len, recycling()))
    assert tuple(levels[depth] for depth in range(1, 7)) == RECYCLING_LEVELS
    for slots, depth in ((recycling(), 6), (heuristic(), 12), (candidates(), 20), (candidates(40, 9), 9)):
        assert missing(slots) is None and max(map(len, slots)) == depth and (0,) * depth in slots
    assert missing([(0,), (2,), (0, 0)]) == (1,) and missing([(0,), (1, 0)]) == (1,)


def closed_sets(slots, size):
    """All of them, of at most `size` slots."""
    sets = {frozenset()}
    for slot in ordered(slots):
        sets |= {s | {slot} for s in sets if len(s) < size and (before(slot) == () or before(slot) in s)}
    return sets


@pytest.mark.parametrize("seed", range(20))
def test_the_selection_is_the_best_of_all_closed_sets(seed):
    rng = random.Random(seed)
    slots = [(0,)]
    while len(slots) < 12:
        slot = rng.choice(slots)
        slots = list({*slots, (*slot, 0), (*slot[:-1], slot[-1] + 1)})
    slots = ordered(slots)[:12] if missing(ordered(slots)[:12]) is None else ordered(slots)
    accepted = {slot: rng.choice([0, 0, rng.random(), 3 * rng.random()]) for slot in slots}
    for size in (1, 3, 5, 9, 20):
        found = select(accepted, size)
        best = max(sum(accepted[s] for s in chosen) for chosen in closed_sets(slots, size))
        assert missing(found) is None and len(found) <= size
        assert sum(accepted[s] for s in found) == pytest.approx(best), (accepted, size, found)


def test_elder_siblings_and_parents_come_along():
    accepted = {(0,): 1.0, (1,): 9.0, (0, 0): 0.5, (1, 0): 5.0}
    assert select(accepted, 1) == [(0,)] and select(accepted, 2) == [(0,), (1,)]
    assert select(accepted, 3) == [(0,), (1,), (1, 0)] and len(select(accepted, 9)) == 4
    assert select({(0,): 1.0, (1,): 0.0}, 2) == [(0,)]  # what was never accepted is not drafted


def test_a_written_tree_is_read_by_its_name(tmp_path):
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"slots": [list(slot) for slot in heuristic()]}))
    tree = parse_tree(str(file))
    assert tree == StaticTree(tuple(heuristic()), str(file)) and tree.size == 81 and tree.depth == 12
    assert parse_tree(f"sampled:{file}").shape == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[1]", "expected what `tune-tree` wrote"),
        ("{", 'no JSON object with "slots"'),
        ('{"slots": []}', "found none"),
        ('{"slots": [[0], [0, -1]]}', r"found \[0, -1\], expected ranks"),
        ('{"slots": [[0], "x"]}', "found 'x', expected ranks"),
        ('{"slots": [[0], [0, 1]]}', r"found no \[0, 0\]"),
        ('{"slots": [[0], [2]]}', r"found no \[1\]"),
        ('{"slots": [[0], [0]]}', "a slot twice"),
    ],
)
def test_a_tree_that_is_none_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "tree.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_slots(tmp_path / "tree.json")


def test_children_of_a_static_tree_are_numbered_together():
    widths, first = StaticTree(((0,), (1,), (0, 0), (1, 0), (1, 1)), "").children
    assert widths.tolist() == [2, 1, 2, 0, 0, 0] and first.tolist() == [1, 3, 4, 0, 0, 0]
