"""Shapes of static draft trees as data: slots, closure, a heuristic shape, and the best shape under a budget.

A slot is the path of sibling ranks that leads to a node: (0, 2) is the third child of the root's first child. A set of
slots is closed if with every slot it holds its parent and its previous sibling: nodes that were drawn without
replacement may be left out from the end only, or the draws would no longer follow the distribution that they claim.
"""

import heapq
import json
from pathlib import Path

import numpy as np

from draftsmith.models.errors import UserError

Slot = tuple[int, ...]
# 25 drafted nodes of EAGLE-1, as child ranks level by level.
EAGLE_PATHS = [
    (0,),
    (1,),
    (2,),
    (3,),
    (0, 0),
    (0, 1),
    (0, 2),
    (1, 0),
    (1, 1),
    (2, 0),
    (2, 1),
    (3, 0),
    (0, 0, 0),
    (0, 0, 1),
    (0, 0, 2),
    (0, 1, 0),
    (0, 1, 1),
    (0, 2, 0),
    (0, 2, 1),
    (1, 0, 0),
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 0, 0, 2),
    (0, 0, 0, 0, 0),
    (0, 0, 0, 0, 1),
]
# Drafted nodes on each level of the tree of Token Recycling (Luo et al., 2024): 80 in all.
RECYCLING_LEVELS = (8, 21, 25, 15, 8, 3)
CHAIN = 12  # of first children, in the heuristic shape
# How likely the child of each rank is to be accepted, as long as nothing is known.
PRIOR = (0.6, 0.15, 0.08, 0.05, 0.03, 0.02, 0.02, 0.015, 0.015, 0.01)


def ordered(slots) -> list[Slot]:
    """Level by level, siblings together in the order of their ranks: the order of a tree's nodes behind the root."""
    return sorted(slots, key=lambda slot: (len(slot), slot))


def before(slot: Slot) -> Slot:
    """What must be there before a slot: its previous sibling, or for a first child its parent (() is the root)."""
    return (*slot[:-1], slot[-1] - 1) if slot[-1] else slot[:-1]


def missing(slots) -> Slot | None:
    """The first slot that a closed set would have beside these, None if they are closed."""
    known = {(), *slots}
    return next((before(slot) for slot in ordered(slots) if before(slot) not in known), None)


def chance(slot: Slot) -> float:
    return float(np.prod([PRIOR[rank] for rank in slot]))


def candidates(count: int = 625, depth: int = 20) -> list[Slot]:
    """The `count` slots of most prior weight, at most `depth` deep, and in any case the chain of first children to that
    depth: what `select` chooses from once it is known how often each is accepted.
    """
    found = {(0,) * level for level in range(1, depth + 1)}
    heap = [(-PRIOR[0], (0,))]
    while heap and len(found) < count:
        negative, slot = heapq.heappop(heap)
        found.add(slot)
        if slot[-1] + 1 < len(PRIOR):
            heapq.heappush(heap, (negative / PRIOR[slot[-1]] * PRIOR[slot[-1] + 1], (*slot[:-1], slot[-1] + 1)))
        if len(slot) < depth:
            heapq.heappush(heap, (negative * PRIOR[0], (*slot, 0)))
    return ordered(found)


def recycling() -> list[Slot]:
    """80 slots with the levels of Token Recycling's tree, on each of them those of most prior weight."""
    found, level = [], [()]
    for count in RECYCLING_LEVELS:
        below = [(*slot, rank) for slot in level for rank in range(8)]
        level = sorted(below, key=lambda slot: (-chance(slot), slot))[:count]
        found += level
    return ordered(found)


def heuristic() -> list[Slot]:
    """The 80 slots of `recycling` with the chain of first children made `CHAIN` deep in place of the weakest leaves."""
    chain = {(0,) * level for level in range(1, CHAIN + 1)}
    found, kept = set(recycling()), len(recycling())
    found |= chain
    while len(found) > kept:
        needed = {before(slot) for slot in found}
        found.remove(min(found - needed - chain, key=lambda slot: (chance(slot), slot)))
    return ordered(found)


def select(accepted: dict[Slot, float], size: int) -> list[Slot]:
    """The closed set of at most `size` slots with the largest sum of `accepted`, exactly. accepted: how often each slot
    of a closed set was accepted; its sum over a shape, per pass, is what the shape adds to an acceptance length of 1.

    Over pairs (first child, next sibling) a closed set is a binary tree with its root, and the best one of m nodes is
    the best split of m - 1 over the two.
    """
    slots = ordered(accepted)
    best: dict[Slot, np.ndarray] = {}  # the most that m = 0 .. size nodes at and behind a slot can hold
    split: dict[Slot, np.ndarray] = {}  # how many of them are at and below its first child
    nothing = np.zeros(size + 1)
    for slot in reversed(slots):
        below, beside = best.get((*slot, 0), nothing), best.get((*slot[:-1], slot[-1] + 1), nothing)
        sums = np.full((size + 1, size), -1.0)  # [m, nodes below]
        for m in range(1, size + 1):
            sums[m, :m] = below[:m] + beside[m - 1 :: -1][:m]
        split[slot] = sums.argmax(1)
        best[slot] = np.where(np.arange(size + 1) > 0, sums.max(1) + accepted[slot], 0.0)
    found, open_ = [], [((0,), size)]
    while open_:
        slot, m = open_.pop()
        if slot in best and best[slot][m] > 0:
            found.append(slot)
            below = int(split[slot][m])
            open_ += [((*slot, 0), below), ((*slot[:-1], slot[-1] + 1), m - 1 - below)]
    return ordered(found)


def read_slots(file: str | Path) -> list[Slot]:
    """The slots of a JSON object {"slots": [[0], [1], [0, 0], ...]}. Raises UserError for what is no closed set."""
    try:
        slots = json.loads(Path(file).read_text("utf-8"))["slots"]
    except OSError as error:
        raise UserError(f"tree {file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'tree {file}: found no JSON object with "slots", expected what `tune-tree` wrote') from None
    if not isinstance(slots, list) or not slots:
        raise UserError(f"tree {file}: slots: found none, expected at least one")
    for slot in slots:
        if not isinstance(slot, list) or not slot or not all(type(rank) is int and rank >= 0 for rank in slot):
            raise UserError(f"tree {file}: slots: found {slot!r}, expected ranks from 0 on")
    found = ordered({tuple(slot) for slot in slots})
    if len(found) < len(slots) or missing(found) is not None:
        what = f"no {list(missing(found))}" if len(found) == len(slots) else "a slot twice"
        raise UserError(f"tree {file}: slots: found {what}, expected every slot once with its parent and elder sibling")
    return found
