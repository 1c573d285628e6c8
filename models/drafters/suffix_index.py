"""Texts that grow, and what followed their strings, by counts (suffix decoding; Oliaro et al., 2024).

C(w) is how often the string w (up to `depth` tokens) occurs in the indexed texts, an occurrence at the very end of a
text included, and P(t | w) = C(wt) / C(w). Every suffix of the text drafts a path or a tree; the one with the highest
sum of path probabilities, which is the number of drafted tokens expected to be accepted, is verified. Counts are taken
over lists of occurrences: the reference's suffix tree holds the same numbers. Occurrences of the last two tokens are
found by their bigram and narrowed token by token.
"""

import heapq
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

NONE = -1


@dataclass(frozen=True)
class Draft:
    """tokens, parents (-1 = the root) and path probabilities of drafted nodes, parents first; match: tokens of the
    suffix they follow.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    probs: tuple[float, ...] = ()
    match: int = 0

    @property
    def score(self) -> float:
        """The number of drafted tokens expected to be accepted."""
        return sum(self.probs)

    def levels(self, emitted: list[int]) -> int:
        """How many of the tokens behind the root are drafted, one level after the other."""
        children = {(parent, token): node for node, (parent, token) in enumerate(zip(self.parents, self.tokens))}
        node = NONE
        for level, token in enumerate(emitted):
            if (node, token) not in children:
                return level
            node = children[node, token]
        return len(emitted)


@dataclass(frozen=True)
class SuffixRule:
    """How a suffix of m tokens drafts: at most floor(m * factor + offset) nodes whose path probability is at least
    `min_prob`.

    depth: tokens of suffix and path together. norm: P(t | w) by the count of w (`node`, as served by ArcticInference),
    or by the counts of all continuations of w (`siblings`, as in the paper), which does not count an occurrence at the
    end of a text.
    """

    form: Literal["path", "tree"] = "path"
    depth: int = 64
    factor: float = 1.0
    offset: float = 0.0
    min_prob: float = 0.1
    norm: Literal["node", "siblings"] = "node"

    def budget(self, match: int, limit: int) -> int:
        return max(0, min(limit, int(match * self.factor + self.offset + 1e-6)))


def grouped(tokens: np.ndarray, places: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """tokens, places [n] -> (token, its places) of each, the most frequent first, among equals the one met last."""
    if not len(tokens):
        return []
    if (tokens == tokens[0]).all():
        return [(int(tokens[0]), places)]
    listed = tokens.tolist()
    latest = {token: place for place, token in enumerate(listed)}
    order = sorted(Counter(listed).items(), key=lambda pair: (-pair[1], -latest[pair[0]]))
    return [(token, places[tokens == token]) for token, _ in order]


class SuffixIndex:
    """Texts that grow token by token, and the places where their strings of up to two tokens end.

    A slot holds one token, its text's slot before it and the one behind it. Memory is bounded: beyond `max_tokens` the
    oldest half of all slots is forgotten, and of a string only the latest `occurrences` places are counted.
    """

    def __init__(self, max_tokens: int = 1_000_000, occurrences: int = 2000):
        self.max_tokens, self.occurrences = max_tokens, occurrences
        self.last: dict[int, int] = {}  # text -> its last slot
        self._reset(0)

    def _reset(self, capacity: int) -> None:
        self.size, self.dead = 0, 0
        self.tokens, self.before, self.behind = (np.full(max(1024, capacity), NONE, dtype=np.int64) for _ in range(3))
        self.ones: dict[int, array] = {}
        self.twos: dict[tuple[int, int], array] = {}

    def __len__(self) -> int:
        """Tokens that are indexed."""
        return self.size - self.dead

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        lists = (*self.ones.values(), *self.twos.values())
        return sum(x.nbytes for x in (self.tokens, self.before, self.behind)) + sum(x.itemsize * len(x) for x in lists)

    def append(self, text: int, tokens: list[int]) -> None:
        """Adds tokens to the end of a text; an unknown number starts a new one."""
        if self.size + len(tokens) > self.max_tokens:
            self._forget(len(tokens))
            tokens = tokens[-self.max_tokens :]
        first, last, count = self.size, self.last.get(text, NONE), len(tokens)
        if not count:
            return
        while first + count > len(self.tokens):
            self.tokens, self.before, self.behind = (
                np.concatenate([x, np.full(len(x), NONE)]) for x in (self.tokens, self.before, self.behind)
            )
        self.tokens[first : first + count] = tokens
        self.before[first : first + count] = np.arange(first - 1, first + count - 1)
        self.before[first] = last
        self.behind[first : first + count - 1] = np.arange(first + 1, first + count)
        self.behind[first + count - 1] = NONE
        if last != NONE:
            self.behind[last] = first
        self._index(first, tokens, int(self.tokens[last]) if last != NONE else None)
        self.last[text], self.size = first + count - 1, first + count

    def _index(self, slot: int, tokens: list[int], before: int | None) -> None:
        ones, twos = self.ones, self.twos
        for token in tokens:
            places = ones.get(token)
            if places is None:
                places = ones[token] = array("q")
            places.append(slot)
            if before is not None:
                pair = twos.get((before, token))
                if pair is None:
                    pair = twos[before, token] = array("q")
                pair.append(slot)
            before, slot = token, slot + 1

    def drop(self, text: int) -> None:
        """Forgets a text."""
        slot = self.last.pop(text, NONE)
        while slot != NONE:
            self.tokens[slot] = NONE
            self.dead += 1
            slot = int(self.before[slot])
        if self.dead * 2 > self.size:
            self._rebuild(0)

    def _forget(self, room: int) -> None:
        """Makes room for so many tokens: the latest slots stay, at most half of what may be kept."""
        kept = max(0, min(self.max_tokens // 2, self.max_tokens - room))
        self._rebuild(max(0, self.size - kept))

    def _rebuild(self, start: int) -> None:
        """Keeps the live slots from `start` on."""
        kept = start + np.flatnonzero(self.tokens[start : self.size] != NONE)
        number = np.full(self.size + 1, NONE)  # the last entry stands for no slot
        number[kept] = np.arange(len(kept))
        tokens, before, behind = self.tokens[kept], number[self.before[kept]], number[self.behind[kept]]
        self.last = {text: int(number[slot]) for text, slot in self.last.items() if number[slot] != NONE}
        self._reset(2 * len(kept))
        self.size = len(kept)
        for own, new in ((self.tokens, tokens), (self.before, before), (self.behind, behind)):
            own[: len(kept)] = new
        for slot, (token, previous) in enumerate(zip(tokens.tolist(), before.tolist())):
            self._index(slot, [token], int(tokens[previous]) if previous != NONE else None)

    def places(self, context: list[int]) -> list[np.ndarray]:
        """The slots where the last 1, 2, ... tokens of `context` end, the latest slot last, as long as there are
        any.
        """
        found = [self._live(self.ones.get(context[-1]))] if context else []
        if len(context) > 1:
            found.append(self._live(self.twos.get((context[-2], context[-1]))))
            start = self.before[found[-1]]
        for wanted in reversed(context[:-2]):
            if not len(start):
                break
            start = self.before[start]
            if len(start) == 1:
                slot = start.item()
                if slot == NONE or self.tokens.item(slot) != wanted:
                    break
                found.append(found[-1])
                continue
            same = (start != NONE) & (self.tokens[start] == wanted)
            if same.all():
                found.append(found[-1])  # the very same places: what they draft is drafted once
            else:
                start = start[same]
                found.append(found[-1][same])
        return [slots for slots in found if len(slots)]

    def _live(self, places: array | None) -> np.ndarray:
        if places is None:
            return np.empty(0, dtype=np.int64)
        slots = np.frombuffer(places[-self.occurrences :], dtype=np.int64)
        return slots[self.tokens[slots] != NONE] if self.dead else slots

    def following(self, slots: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """What stands behind the slots, grouped: (token, its slots), the most frequent first, among equals the one that
        stood there last.
        """
        behind = self.behind[slots]
        behind = behind[behind != NONE]
        return grouped(self.tokens[behind], behind)

    def speculate(self, context: list[int], rule: SuffixRule, limit: int) -> Draft:
        """The best draft of at most `limit` nodes behind `context`, of which the last `rule.depth` tokens count; empty
        without a match.

        Among equal scores the longer suffix wins. A suffix is strictly shorter than the context.
        """
        context, best, most = context[-rule.depth :], Draft(), 0.0
        found, drawn, nodes = self.places(context)[: len(context) - 1], None, []
        for match in range(len(found), 0, -1):
            slots, budget, depth = found[match - 1], rule.budget(match, limit), rule.depth - match
            if min(budget, depth if rule.form == "path" else budget) <= most:
                continue  # cannot be better
            if rule.form == "path":
                if slots is not drawn:
                    nodes = self._path(slots, rule, limit)
                chosen = nodes[: min(budget, depth)]
            else:
                if slots is not drawn or depth < limit:
                    nodes = self._tree(slots, rule, limit, depth)
                chosen = nodes[:budget]
            drawn, score = slots, sum(prob for _, _, prob in chosen)
            if score > most:
                most, best = score, Draft(*(tuple(column) for column in zip(*chosen)), match=match)
        return best

    def _path(self, slots, rule, limit) -> list[tuple[int, int, float]]:
        """(token, parent, path probability) of the most frequent continuations, one behind the other."""
        nodes, prob = [], 1.0
        while len(nodes) < limit:
            groups = self.following(slots)
            if not groups:
                break
            token, next_slots = groups[0]
            prob *= len(next_slots) / self._total(slots, groups, rule)
            if prob < rule.min_prob:
                break
            nodes.append((token, len(nodes) - 1, prob))
            slots = next_slots
            if len(slots) == 1:  # what follows the only place that is left is certain
                slot = self.behind.item(slots.item())
                while slot != NONE and len(nodes) < limit:
                    nodes.append((self.tokens.item(slot), len(nodes) - 1, prob))
                    slot = self.behind.item(slot)
                break
        return nodes

    def _tree(self, slots, rule, limit, depth) -> list[tuple[int, int, float]]:
        """The most probable nodes, best first; equal ones in the order in which they were met."""
        nodes, met = [], 1
        heap = [(-1.0, 0, NONE, NONE, slots, 0)]  # -probability, order, token, parent, slots, level
        while heap and len(nodes) < limit:
            negative, _, token, parent, slots, level = heapq.heappop(heap)
            if level:
                nodes.append((token, parent, -negative))
            groups = self.following(slots) if level < depth else []
            for token, next_slots in groups:
                prob = -negative * len(next_slots) / self._total(slots, groups, rule)
                if prob >= rule.min_prob:
                    heapq.heappush(heap, (-prob, met, token, len(nodes) - 1, next_slots, level + 1))
                    met += 1
        return nodes

    def _total(self, slots, groups, rule) -> int:
        return len(slots) if rule.norm == "node" else sum(len(places) for _, places in groups)
