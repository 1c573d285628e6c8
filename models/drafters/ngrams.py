"""The n-gram memory of STAND (Song et al., 2025): what the target predicted behind the strings that it wrote.

A string of 1 to `orders` tokens has an entry: the running average of the target's distributions behind it, cut to the
most probable ids, and how many there were. The mass that a cut drops is not made up for:

    P <- (k P + P_new) / (k + 1) over the ids of both (a missing one counts as 0), the largest `top` stay, k <- k + 1

Entries lie in packed arrays behind an open hash table; strings are known by 64-bit hashes (two strings that share one
would share an entry, which costs acceptance and never correctness).
"""

import numpy as np

NONE = -1


def mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection in which every bit depends on every other (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def averaged(
    ids: np.ndarray, probs: np.ndarray, counts: np.ndarray, more: np.ndarray, new: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ids, probs [n, top] of entries that average counts [n] distributions, and one further distribution each, more and
    new [n, top] -> ids, probs of the average, the most probable first; NONE and 0 where there are fewer.
    """
    share = (1 / (counts + 1.0)).astype(np.float32)[:, None]
    old, add = probs * (1 - share), new * share
    same = (ids[:, :, None] == more[:, None]) & (more != NONE)[:, None]
    old = old + np.where(same, add[:, None], 0).sum(2, dtype=np.float32)
    both = np.concatenate([old, np.where(same.any(1), 0, add)], 1)
    order = np.argsort(-both, axis=1, kind="stable")[:, : ids.shape[1]]
    found = np.take_along_axis(both, order, 1)
    return np.where(found > 0, np.take_along_axis(np.concatenate([ids, more], 1), order, 1), NONE), found


class NgramMemory:
    """Entries of strings in several spaces (one a problem or request), which know nothing of one another.

    top: ids of an entry; max_entries: when they are reached, the half that was updated longest ago is forgotten. ids
    [entries, top] int32 and probs [entries, top] fp32 hold the averages, the most probable first.
    """

    def __init__(self, orders: int = 4, top: int = 10, max_entries: int = 1_000_000):
        if max_entries < 2 * orders:
            raise ValueError(f"max_entries: found {max_entries}, expected at least {2 * orders}")
        self.orders, self.top, self.max_entries = orders, top, max_entries
        self.size, self.clock = 0, 0
        self._allocate(min(1024, max_entries))

    def _allocate(self, capacity: int) -> None:
        """Arrays for so many entries; those that there are stay."""
        shapes = {"keys": ((), np.uint64), "counts": ((), np.int32), "touched": ((), np.int64)}
        shapes |= {"ids": ((self.top,), np.int32), "probs": ((self.top,), np.float32)}
        for name, (shape, dtype) in shapes.items():
            wider = np.zeros((capacity, *shape), dtype)
            if self.size:
                wider[: self.size] = getattr(self, name)[: self.size]
            setattr(self, name, wider)
        slots = 1 << (2 * capacity - 1).bit_length()  # at most half of them are taken
        self.table, self.mask = np.full(slots, NONE, np.int32), np.uint64(slots - 1)
        self._place(np.arange(self.size))

    def __len__(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in (self.keys, self.counts, self.touched, self.ids, self.probs, self.table))

    def _keys(self, contexts: np.ndarray, spaces: np.ndarray) -> np.ndarray:
        """contexts [n, orders] (the last token last, NONE where the text is shorter), spaces [n] -> uint64 [n, orders]:
        of the last 1, 2, ... tokens; 0 where there are not so many.
        """
        tokens = contexts[:, ::-1]
        places = np.arange(1, self.orders + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        sums = mix(tokens.astype(np.uint64) + places).cumsum(1, dtype=np.uint64)  # of tokens that know their places
        keys = mix(sums + mix(spaces.astype(np.uint64) + np.uint64(1))[:, None])
        return np.where(tokens == NONE, np.uint64(0), keys)

    def _entries(self, keys: np.ndarray) -> np.ndarray:
        """keys [m] -> the entry of each, NONE without one."""
        found, at, going = np.full(len(keys), NONE), keys & self.mask, np.flatnonzero(keys)
        while len(going):
            entries = self.table[at[going]]
            hit = (entries != NONE) & (self.keys[entries] == keys[going])
            found[going[hit]] = entries[hit]
            going = going[(entries != NONE) & ~hit]
            at[going] = (at[going] + np.uint64(1)) & self.mask
        return found

    def _place(self, entries: np.ndarray) -> None:
        """Writes entries, none of them there yet, into the table."""
        at = self.keys[entries] & self.mask
        while len(entries):
            free = self.table[at] == NONE
            self.table[at[free]] = entries[free]  # of several in one slot the last stays
            left = self.table[at] != entries
            entries, at = entries[left], (at[left] + np.uint64(1)) & self.mask

    def find(self, contexts: np.ndarray, spaces: np.ndarray) -> np.ndarray:
        """contexts [n, orders], spaces [n] -> the entry [n] of the longest string that has one, NONE without any."""
        found = self._entries(self._keys(contexts, spaces).ravel()).reshape(len(contexts), -1)
        longest = found.shape[1] - 1 - (found[:, ::-1] != NONE).argmax(1)
        return np.take_along_axis(found, longest[:, None], 1)[:, 0]

    def update(self, contexts: np.ndarray, spaces: np.ndarray, ids: np.ndarray, probs: np.ndarray) -> None:
        """contexts [n, orders], spaces [n]: the strings that end with each observed row, in the order of the text; ids,
        probs [n, at most top]: the target's distribution behind the row. The strings of all orders learn it.
        """
        missing = self.top - ids.shape[1]
        ids = np.pad(np.where(probs > 0, ids, NONE).astype(np.int32), ((0, 0), (0, missing)), constant_values=NONE)
        probs, step = np.pad(probs.astype(np.float32), ((0, 0), (0, missing))), self.max_entries // 2 // self.orders
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            keys = self._keys(contexts[part], spaces[part])
            rows, used = np.repeat(np.arange(start, start + len(keys)), self.orders), keys.ravel() != 0
            self._learn(keys.ravel()[used], ids[rows[used]], probs[rows[used]])

    def _learn(self, keys, ids, probs):
        """One row a key, in order; the n-th rows of all keys are learned together."""
        if not len(keys):
            return
        self._make_room(len(keys))
        order, turns = np.argsort(keys, kind="stable"), np.empty(len(keys), np.int64)
        starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
        turns[order] = np.arange(len(keys)) - np.repeat(starts, np.diff([*starts, len(keys)]))
        for turn in range(turns.max() + 1):
            rows = np.flatnonzero(turns == turn)
            entries = self._entries(keys[rows])
            new = entries == NONE
            entries[new] = self._add(keys[rows[new]])
            self.ids[entries], self.probs[entries] = averaged(
                self.ids[entries], self.probs[entries], self.counts[entries], ids[rows], probs[rows]
            )
            self.counts[entries] += 1
            self.touched[entries] = self.clock
        self.clock += 1

    def _add(self, keys: np.ndarray) -> np.ndarray:
        """New entries that average nothing yet."""
        entries = np.arange(self.size, self.size + len(keys))
        self.keys[entries], self.ids[entries], self.probs[entries], self.counts[entries] = keys, NONE, 0, 0
        self.size += len(keys)
        self._place(entries)
        return entries

    def _make_room(self, new: int) -> None:
        if self.size + new > self.max_entries:
            kept = np.sort(np.argsort(self.touched[: self.size], kind="stable")[self.size - self.max_entries // 2 :])
            for name in ("keys", "counts", "touched", "ids", "probs"):
                values = getattr(self, name)
                values[: len(kept)] = values[kept]
            self.size = len(kept)
            self.table.fill(NONE)
            self._place(np.arange(self.size))
        if self.size + new > len(self.keys):
            self._allocate(min(self.max_entries, max(2 * len(self.keys), self.size + new)))

    def clear(self) -> None:
        self.size, self.clock = 0, 0
        self.table.fill(NONE)
