"""A preallocated key/value cache for targets and heads: new rows are written in place, accepted rows are gathered to
the front.

All layers share one tensor [2 * layers, B, kv_heads, capacity, head_dim], so that a commit is one gather. Every batch
row has its own length; a forward of T tokens writes slots length .. length + T - 1 of each row and reads the first
`visible` slots.
"""

from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One decoder layer's view of the cache. `update` returns the first `visible` slots, to be used with a 4-D mask."""

    is_sliding = False
    is_croppable = False

    def __init__(self, cache: "SlotCache", keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.cache, self.keys, self.values = cache, keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        pass  # allocated by SlotCache

    def update(self, key_states, value_states, *args, **kwargs):
        cache, new = self.cache, key_states.size(2)
        if cache.start is not None:
            self.keys[:, :, cache.start : cache.start + new] = key_states
            self.values[:, :, cache.start : cache.start + new] = value_states
        else:
            self.keys[cache.rows, :, cache.slots] = key_states.transpose(1, 2)
            self.values[cache.rows, :, cache.slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : cache.visible], self.values[:, :, : cache.visible]

    def get_seq_length(self):
        return 0  # positions and masks are always passed explicitly

    def get_mask_sizes(self, query_length):
        return self.cache.visible, 0

    def get_max_length(self):
        return self.keys.size(2)

    get_max_cache_shape = get_max_length


class SlotCache(Cache):
    """lengths [B] int64 are the committed rows, set anew and never changed in place; `place(T)` chooses where the next
    forward writes.

    `store` is the part of the tensor that the B requests have. What `select` gives up stays allocated, for those that
    `join`. graphs: captured passes that write to this tensor (models/graphs.py).
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype, device):
        self.whole = torch.zeros(2 * layers, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.store, self.standing_visible, self.graphs = self.whole, None, {}
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        super().__init__(layers=[SlotLayer(self, self.store[2 * i], self.store[2 * i + 1]) for i in range(layers)])

    @property
    def lengths(self) -> torch.Tensor:
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: torch.Tensor) -> None:
        self._lengths, self._known = lengths, None

    @property
    def known_lengths(self) -> list[int]:
        """`lengths` on the host. The device is waited for once, however many forwards stand behind the same rows."""
        if self._known is None:
            self._known = self._lengths.tolist()
        return self._known

    def _bind(self):
        """Points the store and the layers at the rows of the requests that there are now."""
        self.store = self.whole[:, : len(self.lengths)]
        for i, layer in enumerate(self.layers):
            layer.keys, layer.values = self.store[2 * i], self.store[2 * i + 1]

    def _make_room(self, batch: int, slots: int) -> None:
        """A larger tensor where there is no room for `batch` requests of `slots` slots, at least twice as large."""
        (_, rows, heads, capacity, width), layers = self.whole.shape, len(self.whole)
        if batch <= rows and slots <= capacity:
            return
        wider = self.whole.new_zeros(
            layers,
            rows if batch <= rows else max(batch, 2 * rows),
            heads,
            capacity if slots <= capacity else max(slots, 2 * capacity),
            width,
        )
        wider[:, : len(self.lengths), :, :capacity] = self.store
        self.whole, self.graphs = wider, {}
        self._bind()

    @property
    def capacity(self) -> int:
        return self.store.size(3)

    def place(self, new: int, offset: int = 0) -> None:
        """Chooses the slots of the next forward of `new` tokens a row, `offset` slots behind the committed rows.

        `start` is set when all rows agree (a plain slice). The store grows when it is too small.
        """
        if self.standing_visible is None:
            shortest, longest = min(self.known_lengths) + offset, max(self.known_lengths) + offset
            self.visible = longest + new
            self._make_room(len(self.lengths), self.visible)
            self.start = shortest if shortest == longest else None
        else:
            self.visible, self.start = self.standing_visible, None
        if self.start is None:
            self.rows = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
            self.slots = self.lengths[:, None] + offset + torch.arange(new, device=self.lengths.device)

    @contextmanager
    def standing(self, lengths: torch.Tensor, visible: int):
        """Forwards inside stand behind `lengths` [B] and read `visible` slots, whatever the lengths are: shapes are
        static and the host reads nothing. The cache has its own lengths again behind it.
        """
        before = self._lengths, self._known
        self.lengths, self.standing_visible = lengths, visible
        try:
            yield
        finally:
            (self._lengths, self._known), self.standing_visible = before, None

    def hold(self, visible: int) -> None:
        """Makes room for `visible` slots of each row."""
        self._make_room(len(self.lengths), visible)

    def reset(self, batch: int) -> None:
        """Empty, for `batch` other requests, of which there is room for."""
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.whole.device)
        self._bind()

    def commit(self, path: torch.Tensor, counts: torch.Tensor, told: tuple[list, list] | None = None) -> None:
        """Keeps the rows path [B, M] (offsets into the last forward, ascending; padding after counts [B] is
        ignored). They move to the front at once: a move costs less than the dead rows that a later one would have
        passes read (tests/benchmarks/compaction.py). told: both on the host, where they are known there.
        """
        width, steps = path.size(1), torch.arange(path.size(1), device=path.device)
        paths, many = told or (path.tolist(), counts.tolist())
        lengths = [length + count for length, count in zip(self.known_lengths, many)]
        if any(row[:count] != list(range(count)) for row, count in zip(paths, many)):
            if len(self.lengths) == 1:
                start = self.known_lengths[0]
                self.store[:, 0, :, start : start + width] = self.store[:, 0].index_select(2, start + path[0])
            else:
                rows = torch.arange(len(self.lengths), device=path.device)[:, None]
                kept = self.store[:, rows, :, self.lengths[:, None] + path]
                self.store[:, rows, :, self.lengths[:, None] + steps] = kept
        self.lengths = self.lengths + counts
        self._known = lengths

    def forget(self, counts: torch.Tensor) -> None:
        """Gives up the first counts [B] committed rows of each request; the others move to the front."""
        left = self.lengths - counts
        rows = torch.arange(len(left), device=left.device)[:, None]
        slots = torch.arange(int(left.max()), device=left.device)
        kept = self.store[:, rows, :, (counts[:, None] + slots).clamp(max=self.capacity - 1)]
        self.store[:, rows, :, slots.expand(len(left), -1)] = kept
        self.lengths = left

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only the given batch rows, in this order; rows that stay in place are not copied."""
        moved, used = (rows != torch.arange(len(rows), device=rows.device)).nonzero().flatten(), max(self.known_lengths)
        if len(moved):
            self.store[:, moved, :, :used] = self.store[:, rows[moved], :, :used]
        self.lengths = self.lengths[rows]
        self._bind()

    def join(self, other: "SlotCache") -> None:
        """Takes the requests of another cache of the same shape behind its own."""
        before, used = len(self.lengths), max(other.known_lengths)
        self._make_room(before + len(other.lengths), used)
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._bind()
        self.store[:, before:, :, :used] = other.store[:, :, :, :used]
