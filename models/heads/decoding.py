"""Drafting with a head of one decoder layer that reads its own output back: committed rows in a cache and trees grown
behind them, or trees rooted at inner positions of one packed row.

Such a head has `layer` (heads/layer.py), `first(hidden) -> H` for the target's states, `enter(tokens, H, step) ->
(residual base, attention input)`, step being 0 for rows of the target's own states and k for nodes k levels below the
root, `angles(positions)`, and `window`: how many rows a row attends to, its own included (None: all before it); a row's
output is the H of its children. With a window of W rows no prompt is computed farther back than decoding can see, and a
request's cache never holds more than 2 W complete rows before a round.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from draftsmith.models.features import Features, TrainingFeatures
from draftsmith.models.graphs import Graphs
from draftsmith.models.heads.head import DraftHead
from draftsmith.models.heads.rooted import RootedTrees
from draftsmith.models.slots import SlotCache


@dataclass
class Context:
    """Committed rows of B requests. `cache` holds the keys and values of complete rows; `pending` are features whose
    rows wait for the next token (the last one waits for the root). shift [B]: how far positions of rows from the last
    one on lie ahead of slots.
    """

    cache: SlotCache
    pending: Features | None
    shift: torch.Tensor

    def mark(self) -> tuple:
        """What `restore` goes back to: rows behind it are overwritten. No `select` and no `join` between the two."""
        return self.cache.lengths, self.pending

    def restore(self, state: tuple) -> None:
        """Rows that were pending stay complete if a root was expanded since: it was the token behind them."""
        lengths, pending = state
        complete = self.cache.lengths is not lengths
        self.cache.lengths, self.pending = (lengths + pending.lengths, None) if complete else state

    def select(self, rows: torch.Tensor) -> None:
        self.cache.select(rows)
        p, self.shift = self.pending, self.shift[rows]
        self.pending = Features(p.tokens[rows], p.hidden[rows], p.lengths[rows])

    def join(self, other: "Context") -> None:
        self.cache.join(other.cache)
        self.pending, self.shift = self.pending.joined(other.pending), torch.cat([self.shift, other.shift])


def pending_rows(before: Features | None, features: Features) -> Features:
    """Committed rows behind those that are still pending, where no root was expanded since."""
    return features if before is None else before.then(features)


def prefill(head, features: Features, places: torch.Tensor | None = None) -> Context:
    """Keys and values of all rows whose next token is known; the last row of each request stays pending. places [B, S]:
    positions of the rows where they are not 0, 1, ...; rows behind the last go on from it.
    """
    if head.window is not None and features.tokens.size(1) > head.window:
        features, places = latest(features, places, head.window)
    attention, batch, width = head.layer.self_attn, *features.tokens.shape
    dtype, device = attention.o_proj.weight.dtype, features.hidden.device
    form = 1, batch, attention.kv_heads, width + 64, attention.head_dim, dtype, device
    last = (features.lengths - 1)[:, None]
    rows = torch.arange(batch, device=device)[:, None]
    places = torch.arange(width, device=device).expand(batch, -1) if places is None else places
    pending = Features(features.tokens[rows, last], features.hidden[rows, last], torch.ones_like(features.lengths))
    context = Context(None, pending, (places.gather(1, last) - last)[:, 0])
    cache = context.cache = head.graphs.spare.take(context, *form) if head.graphs.on else SlotCache(*form)
    if width > 1:
        _, u = head.enter(features.tokens[:, 1:], head.first(features.hidden[:, :-1]), 0)
        key, value = attention.key_value(u, *head.angles(places[:, :-1]))
        cache.place(width - 1)
        cache.layers[0].update(key.transpose(1, 2), value.transpose(1, 2))
    cache.lengths = features.lengths - 1
    return context


def latest(features: Features, places: torch.Tensor | None, window: int) -> tuple[Features, torch.Tensor]:
    """The last `window` rows of each request (all of a shorter one) and their positions."""
    tokens, hidden, lengths = features.tokens, features.hidden, features.lengths
    rows = (lengths - window).clamp(min=0)[:, None] + torch.arange(window, device=tokens.device)
    rows = rows.clamp(max=tokens.size(1) - 1)
    found = tokens.gather(1, rows), hidden.gather(1, rows[..., None].expand(-1, -1, hidden.size(-1)))
    return Features(*found, lengths.clamp(max=window)), rows if places is None else places.gather(1, rows)


@dataclass(frozen=True)
class Beam:
    """Expanded nodes of B trees. hidden [B, k, h]: layer outputs of the last level; seen [B, k, nodes]: which expanded
    nodes each of them has among its ancestors (itself included); depth: levels drafted so far; levels: of each
    expanded node.
    """

    context: Context
    hidden: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    depth: int = 0
    levels: tuple[int, ...] = ()


def expand(
    head, beam: Beam | RootedTrees, tokens: torch.Tensor, parents: torch.Tensor
) -> tuple[torch.Tensor, Beam | RootedTrees]:
    """tokens, parents [B, k] (rows of the last level) -> layer outputs [B, k, h], the beam of this level. The first
    level is the root, which also completes the pending rows of a context; these stay.
    """
    if isinstance(beam, RootedTrees):
        return _grow_rooted(head, beam, tokens, parents)
    return _commit_root(head, beam.context, tokens) if beam.depth == 0 else _grow(head, beam, tokens, parents)


def root_at(head, features: TrainingFeatures, at: torch.Tensor, places: torch.Tensor | None = None) -> RootedTrees:
    """A beam of P roots at packed indices at [P], each at least 1 inside its document; root p sees features of its
    document before at[p] only. places [T]: positions of the rows where they are not 0, 1, ... in each document.
    """
    hidden = head.first(features.hidden)
    places = (features.packing.positions if places is None else places).to(hidden.device)
    _, u = head.enter(
        features.tokens.roll(-1), hidden, 0
    )  # a document's last row meets the next one's first token; no root sees it
    row = head.layer.self_attn.key_value(u, *head.angles(places))
    trees = RootedTrees.at(features.packing, at, row, hidden, head.window)
    return replace(trees, positions=places[at.to(hidden.device) - 1])


def _grow_rooted(head, beam: RootedTrees, tokens, parents):
    attention, rows = head.layer.self_attn, torch.arange(len(tokens), device=tokens.device)[:, None]
    base, u = head.enter(tokens, beam.hidden[rows, parents], beam.depth)
    cos, sin = head.angles(beam.positions[:, None])
    attended, new = beam.attend(
        attention.query(u, cos, sin), *attention.key_value(u, cos, sin), parents, attention.scale
    )
    output = head.layer.finish(base, attended)
    return output, replace(beam, **new, hidden=output, positions=beam.positions + 1, depth=beam.depth + 1)


def follow(head, context: Context, root: torch.Tensor) -> tuple[torch.Tensor, Beam]:
    """As the first `expand` with the roots [B], for all pending rows: layer outputs [B, M, h], those behind each
    request's pending rows being padding, and the beam of the roots.
    """
    return _commit_root(head, context, root[:, None], every=True)


def _commit_root(head, context: Context, root, every: bool = False):
    pending, cache = context.pending, context.cache
    if pending is None:
        raise RuntimeError(
            "this context has no pending row: a root was already expanded and nothing was observed since"
        )
    if head.window is not None and int(cache.lengths.max()) > 2 * head.window:
        forgotten = (cache.lengths - head.window).clamp(min=0)
        cache.forget(forgotten)
        context.shift = context.shift + forgotten
    batch, width = pending.tokens.shape
    last = (pending.lengths - 1)[:, None]
    following = torch.cat([pending.tokens[:, 1:], root], 1).scatter(1, last, root)
    positions = cache.lengths[:, None] + torch.arange(width, device=root.device)
    cache.place(width)
    slots = torch.arange(cache.visible, device=root.device)
    seen = slots <= positions[..., None]
    if head.window is not None:
        seen &= slots > positions[..., None] - head.window
    output = _attend(head, head.first(pending.hidden), following, positions + context.shift[:, None], 0, cache, seen)
    cache.lengths, context.pending = cache.lengths + pending.lengths, None
    ending = output if width == 1 else output.gather(1, last[..., None].expand(-1, -1, output.size(-1)))
    beam = Beam(context, ending, torch.zeros(batch, 1, 0, dtype=torch.bool, device=root.device), 1)
    return output if every else ending, beam


def _grow(head, beam: Beam, tokens, parents):
    cache, (batch, new), before = beam.context.cache, tokens.shape, beam.seen.size(2)
    rows = torch.arange(batch, device=tokens.device)[:, None]
    own = torch.eye(new, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
    seen = torch.cat([beam.seen[rows, parents], own], -1)
    positions = (cache.lengths + beam.context.shift + beam.depth - 1)[:, None].expand(-1, new)
    cache.place(new, offset=before)
    levels, slots = (*beam.levels, *(beam.depth,) * new), torch.arange(cache.visible, device=tokens.device)
    committed, nodes = slots < cache.lengths[:, None], seen
    if head.window is not None:
        committed = committed & (slots >= cache.lengths[:, None] + beam.depth - head.window)
        nodes = seen & (torch.tensor(levels, device=tokens.device) > beam.depth - head.window)
    visible = committed[:, None].repeat(1, new, 1)
    slots = cache.lengths[:, None] + torch.arange(before + new, device=tokens.device)
    visible.scatter_(2, slots[:, None].expand(-1, new, -1), nodes)
    output = _attend(head, beam.hidden[rows, parents], tokens, positions, beam.depth, cache, visible)
    return output, replace(beam, hidden=output, seen=seen, depth=beam.depth + 1, levels=levels)


def _attend(head, hidden, tokens, positions, step: int, cache: SlotCache, seen):
    """The layer over new rows [B, T] placed in the cache; seen [B, T, visible] -> layer output [B, T, h]."""
    attention = head.layer.self_attn
    base, u = head.enter(tokens, hidden, step)
    cos, sin = head.angles(positions)
    key, value = attention.key_value(u, cos, sin)
    keys, values = cache.layers[0].update(key.transpose(1, 2), value.transpose(1, 2))
    attended = F.scaled_dot_product_attention(
        attention.query(u, cos, sin).transpose(1, 2),
        keys,
        values,
        attn_mask=seen[:, None],
        scale=attention.scale,
        enable_gqa=attention.heads != attention.kv_heads,
    )
    return head.layer.finish(base, attended.transpose(1, 2))


class LayerHead(DraftHead):
    """The part of a head's contract that is decoding, for heads of this form."""

    window: int | None = None

    @cached_property
    def graphs(self) -> Graphs:
        return Graphs(self.layer.self_attn.o_proj.weight.device)

    def prefill(self, features: Features) -> Context:
        """Keys and values of all rows whose next token is known; the last row of each request stays pending."""
        return prefill(self, features)

    def extend(self, context: Context, features: Features) -> None:
        """Adds newly committed tokens (the last root and the accepted nodes); computed with the next root."""
        context.pending = pending_rows(context.pending, features)

    def roots(self, context: Context) -> Beam:
        """A beam that waits for the root tokens."""
        return Beam(context)

    def root_at(self, features: TrainingFeatures, at: torch.Tensor) -> RootedTrees:
        """A beam of P roots at packed indices at [P], each at least 1 inside its document: root p is tokens[at[p]]
        (whatever `expand` is given first) and sees features of its document before at[p] only, as in decoding. With
        gradient where it is enabled.
        """
        return root_at(self, features, at)

    def follow(self, context: Context, root: torch.Tensor) -> tuple[torch.Tensor, Beam]:
        """root [B] -> log-probs [B, M, Vd] fp32 behind each of the M pending rows and the token that follows it, the
        root behind the last; and the beam that the first `expand` would give. The rows are complete then.
        """
        output, beam = follow(self, context, root)
        return torch.log_softmax(self.logits(output).float(), -1), beam

    def expand(
        self, beam: Beam | RootedTrees, tokens: torch.Tensor, parents: torch.Tensor
    ) -> tuple[torch.Tensor, Beam | RootedTrees]:
        """tokens [B, k] (target ids), parents [B, k] (rows of the last expand) -> log-probs [B, k, Vd] fp32, beam.

        The first call consumes the root tokens [B, 1]; it also completes the pending rows, which stay.
        """
        output, beam = expand(self, beam, tokens, parents)
        return torch.log_softmax(self.logits(output).float(), -1), beam
