"""What followed the end of a text where it stood before, grown into draft trees by expected throughput.

Occurrences come from an index: of the text itself (`SuffixIndex`) or of a datastore. A candidate is a token behind a
node of the tree; its chance is the node's own, times the share of occurrences that it follows, times what candidates
of its kind (`Estimates`) lately achieved. Nodes are added by their chances P, the greatest first, as long as each pays
for its row: with t the cost of a pass,

    P > dt/dn (1 + sum of all P) / t(n)

which is where tokens per second stop growing (the best n nodes are a tree, since no child is likelier than its parent).
"""

import heapq
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from draftsmith.models.drafters.datastore import LONGEST, Datastore
from draftsmith.models.drafters.suffix_index import NONE, SuffixIndex
from draftsmith.models.tree import Kind

SHORTEST = 1  # tokens that must agree
LENGTHS = (1, 2, 3, 5, 9)  # where classes of lengths begin
LEVELS, RANKS = 4, 4  # from which on levels and ranks are one class
# How likely candidates are taken to be at first: retrieved ones by length and level, from the text (smollm2 on
# Spec-Bench) and from a datastore; others by rank
RETRIEVED = (
    (
        (0.5, 0.6, 0.72, 0.8),
        (0.57, 0.7, 0.8, 0.82),
        (0.62, 0.76, 0.83, 0.85),
        (0.74, 0.78, 0.85, 0.9),
        (0.9, 0.9, 0.92, 0.92),
    ),
    ((0.2, 0.4, 0.5, 0.6), (0.3, 0.5, 0.6, 0.7), (0.4, 0.6, 0.7, 0.8), (0.6, 0.7, 0.8, 0.85), (0.8, 0.85, 0.9, 0.9)),
)
DRAFTED = (0.6, 0.15, 0.08, 0.05)
WEIGHT, SUREST = 4.0, 0.98
CONTINUATIONS = 8  # of one string, the most frequent


class Estimates:
    """How often candidates of each kind were what followed, over how often they claimed to be: running counts of one
    request. Kinds are numbered: those of retrieved candidates by source, length of the string that they follow and
    level behind it; those of other nodes by level and rank.
    """

    PRIOR = [share for source in RETRIEVED for shares in source for share in shares] + list(DRAFTED) * LEVELS

    def __init__(self):
        self.hits, self.trials = [0.0] * len(self.PRIOR), [0.0] * len(self.PRIOR)

    @staticmethod
    def retrieved(source: int, length: int, level: int) -> int:
        place = source * len(LENGTHS) + bisect_right(LENGTHS, length) - 1
        return place * LEVELS + min(level, LEVELS - 1)

    @staticmethod
    def drafted(level: int, rank: int) -> int:
        return (len(RETRIEVED) * len(LENGTHS) + min(level, LEVELS - 1)) * RANKS + min(rank, RANKS - 1)

    def of(self, kind: int) -> float:
        found = (WEIGHT * self.PRIOR[kind] + self.hits[kind]) / (WEIGHT + self.trials[kind])
        return min(SUREST, found)

    def note(self, kind: int, claimed: float, hit: bool) -> None:
        self.trials[kind] += claimed
        self.hits[kind] += hit


@dataclass
class Sketch:
    """One tree on the host, parents first. chances: that the target's text passes through each node; claims: of each
    node the kinds of candidate that it is, with the share that each claimed of what follows its parent.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    kinds: list[int] = field(default_factory=lambda: [int(Kind.ONE_HOT)])
    chances: list[float] = field(default_factory=lambda: [1.0])
    claims: list[list[tuple[int, float]]] = field(default_factory=lambda: [[]])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])  # of siblings with one token the first counts

    @classmethod
    def of(cls, tokens: list[int], parents: tuple[int, ...], kinds: tuple[int, ...], estimates: Estimates) -> "Sketch":
        """A row of a `DraftTree`, padding left out: the order of its nodes stays."""
        sketch, place, depths = cls([tokens[0]]), {0: 0}, [0]
        ranks: list[int] = [0]  # children so far
        for node in range(1, len(tokens)):
            if parents[node] < 0:
                continue
            parent = place[parents[node]]
            kind = estimates.drafted(depths[parent], ranks[parent])
            place[node] = sketch.add(tokens[node], parent, sketch.chances[parent] * estimates.of(kind), kinds[node])
            sketch.claims[-1].append((kind, 1.0))
            depths.append(depths[parent] + 1)
            ranks[parent] += 1
            ranks.append(0)
        return sketch

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, chance: float, kind: int = Kind.ONE_HOT) -> int:
        """A new node behind all others -> its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.kinds.append(int(kind))
        self.chances.append(chance)
        self.claims.append([])
        self.children.append({})
        self.children[parent].setdefault(token, len(self) - 1)
        return len(self) - 1

    def path(self, node: int) -> list[int]:
        """The tokens behind the root up to a node."""
        found = []
        while node > 0:
            found.insert(0, self.tokens[node])
            node = self.parents[node]
        return found

    def leaves(self, most: int) -> list[int]:
        """The likeliest nodes without children, the root aside."""
        ends = [node for node in range(1, len(self)) if not self.children[node]]
        return sorted(ends, key=lambda node: -self.chances[node])[:most]

    def learn(self, emitted: list[int], estimates: Estimates) -> None:
        """emitted: what the target's text has behind the root. Every node whose parent is on it was tried."""
        node = 0
        for token in emitted:
            for other, child in self.children[node].items():
                for kind, claimed in self.claims[child]:
                    estimates.note(kind, claimed, other == token)
            if token not in self.children[node]:
                break
            node = self.children[node][token]


@dataclass(frozen=True)
class Match:
    """Places where the last `length` tokens of a context stand, and so many levels behind them."""

    index: SuffixIndex | Datastore
    source: int
    length: int
    places: np.ndarray
    level: int = 0

    @property
    def kind(self) -> int:
        return Estimates.retrieved(self.source, self.length, self.level)

    def behind(self, places: np.ndarray) -> "Match":
        return Match(self.index, self.source, self.length, places, self.level + 1)


def matches(context: list[int], text: SuffixIndex, datastore: Datastore | None) -> list[Match]:
    """Where the context's end stood before: the longest one in the text, one of half its length at most that stood in
    more places, and the longest one in the datastore.
    """
    found, known = [], text.places(context[-LONGEST:])
    for length in range(len(known), SHORTEST - 1, -1):
        places = known[length - 1]
        if found and (2 * length > found[0].length or len(places) <= len(found[0].places)):
            continue
        if (text.behind[places] != NONE).any():
            found.append(Match(text, 0, length, places))
            if len(found) == 2:
                break
    if datastore is not None:
        length, places = datastore.search(context)
        if length >= SHORTEST:
            found.append(Match(datastore, 1, length, places))
    return found


def extend(
    sketch: Sketch,
    starts: dict[int, list[Match]],
    estimates: Estimates,
    most: int,
    fixed: float,
    row: float,
) -> None:
    """Adds at most `most` retrieved nodes to a tree, and lets nodes that are there already count as retrieved too.

    starts: behind which nodes to begin, and what is known to follow them; fixed, row: the cost of a pass is fixed + row
    * nodes, in any unit. New nodes stand behind all siblings that were there.
    """
    heap, order, expected, full = [], count(), sum(sketch.chances), len(sketch) + most

    def offer(node: int, match: Match) -> None:
        groups = match.index.following(match.places)
        total, kind = sum(len(places) for _, places in groups), match.kind
        share = sketch.chances[node] * estimates.of(kind) / max(1, total)
        for token, places in groups[:CONTINUATIONS]:
            claim = (kind, len(places) / total)
            heapq.heappush(heap, (-share * len(places), next(order), node, token, claim, match.behind(places)))

    for node, listed in starts.items():
        for match in listed:
            offer(node, match)
    while heap:
        negative, _, node, token, claim, match = heapq.heappop(heap)
        chance, child = -negative, sketch.children[node].get(token)
        if chance * (fixed + row * len(sketch)) <= row * expected:
            break
        if child is None:
            if len(sketch) == full:
                break
            child = sketch.add(token, node, chance)
            expected += chance
        elif chance > sketch.chances[child]:
            expected += chance - sketch.chances[child]
            sketch.chances[child] = chance
        sketch.claims[child].append(claim)
        offer(child, match)
