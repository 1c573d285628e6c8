"""Drafting with a DREAM head (heads/dream.py): committed rows in caches and trees grown behind them, or trees rooted at
inner positions of one packed row.
"""

from dataclasses import dataclass, replace

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, TrainingFeatures
from draftsmith.models.heads.cross import CrossLayer, attend
from draftsmith.models.heads.decoding import Beam
from draftsmith.models.heads.dream_rows import Rows, kept_rows
from draftsmith.models.heads.rooted import RootedTrees, spans_of
from draftsmith.models.slots import SlotCache


@dataclass
class Context:
    """Committed rows of B requests: `own` caches keys and values of the kept rows in blocks 0 and 2; `cross` those of
    the states, one for each row but the first; `pending` states wait for the token behind them; skipped [B] is what
    positions are more than numbers of kept rows.
    """

    own: SlotCache
    cross: SlotCache
    skipped: torch.Tensor
    pending: Features | None

    def mark(self):
        return self.own.lengths, self.cross.lengths, self.pending

    def restore(self, state):
        own, cross, pending = state
        more, self.pending = (0, pending) if self.own.lengths is own else (pending.lengths, None)
        self.own.lengths, self.cross.lengths = own + more, cross + more

    def select(self, rows: torch.Tensor) -> None:
        self.own.select(rows)
        self.cross.select(rows)
        self.skipped, p = self.skipped[rows], self.pending
        self.pending = Features(p.tokens[rows], p.hidden[rows], p.lengths[rows])

    def join(self, other: "Context") -> None:
        self.own.join(other.own)
        self.cross.join(other.cross)
        self.skipped, self.pending = torch.cat([self.skipped, other.skipped]), self.pending.joined(other.pending)


@dataclass(frozen=True)
class RootedBlocks:
    """Trees rooted in a packed row: one `RootedTrees` for each block. hidden [P, k, h]: states that the next nodes go
    on from.
    """

    blocks: tuple[RootedTrees, RootedTrees, RootedTrees]
    hidden: torch.Tensor


def prefill(head, features: Features) -> Context:
    """Keys and values of all rows of the prompts; the last state of each stays pending: the root brings its key."""
    (batch, width), device, c = features.tokens.shape, features.hidden.device, head.config
    embedded, states = head.split(features.hidden)
    shape = (batch, c.num_key_value_heads, width + 64, c.head_dim, states.dtype, device)
    own, cross = SlotCache(2, *shape), SlotCache(1, *shape)
    lengths = torch.zeros_like(features.lengths)
    for b, count in enumerate(features.lengths.tolist()):
        visual, columns = (None if x is None else x[b, :count] for x in (features.visual, features.columns))
        kept = kept_rows(torch.ones(count, dtype=torch.bool, device=device), visual, columns, c.keep_ratio)
        pairs = head.rows(embedded[b, :count], states[b, :count], kept).pairs
        n = lengths[b] = int(kept.sum())
        for layer, pair, stop in (
            (own.layers[0], pairs[0], n),
            (cross.layers[0], pairs[1], count - 1),
            (own.layers[1], pairs[2], n),
        ):
            layer.keys[b, :, :stop], layer.values[b, :, :stop] = (x[:stop].transpose(0, 1) for x in pair)
    own.lengths, cross.lengths = lengths, features.lengths - 1
    skipped = (features.lengths - lengths) * (c.positions == "original")
    rows, last = torch.arange(batch, device=device)[:, None], (features.lengths - 1)[:, None]
    pending = Features(features.tokens[rows, last], features.hidden[rows, last], torch.ones_like(features.lengths))
    return Context(own, cross, skipped, pending)


def root_at(head, features: TrainingFeatures, at: torch.Tensor) -> RootedBlocks:
    """A beam of P roots at the packed indices `at` [P] (each at least 1 inside its document, no piece of an image),
    with the states of its document's rows before.
    """
    device, rows = features.hidden.device, Rows.joined(head.documents(features))
    mine, at = rows.kept.cpu(), at.cpu()
    number = mine.cumsum(0)[at] - 1  # of the root among the kept rows
    if not bool(mine[at].all()):
        raise UserError("found a root that is a piece of an image, expected text")
    turns = rows.positions[number.to(device)]
    _, states = head.split(features.hidden)
    hidden = states[at.to(device) - 1][:, None]
    inner = [
        span._replace(stop=span.stop + 1) for span in spans_of(features.packing.select(mine), number)
    ]  # a root sees the kept rows right up to it
    own = [_rooted(row, inner, number.to(device), hidden, turns) for row in (rows.pairs[0], rows.pairs[2])]
    cross = RootedTrees.at(
        features.packing, at, rows.pairs[1], states
    )  # the state right before a root is the key that the root itself brings
    return RootedBlocks((own[0], cross, own[1]), hidden)


def _rooted(row, spans, limit, hidden, positions) -> RootedTrees:
    none = row[0].new_zeros(len(limit), 0, *row[0].shape[1:])
    return RootedTrees(
        row,
        spans,
        limit,
        hidden,
        (none, none),
        torch.zeros(len(limit), 1, 0, dtype=torch.bool, device=limit.device),
        positions,
    )


def expand(head, beam: Beam | RootedBlocks, tokens: torch.Tensor, parents: torch.Tensor):
    """tokens, parents [B, k] (rows of the last level) -> the head's states [B, k, h], the beam of this level. The first
    level is the root, which also completes the pending rows of a context.
    """
    if isinstance(beam, RootedBlocks):
        return _grow_rooted(head, beam, tokens, parents)
    return _commit_root(head, beam.context, tokens) if beam.depth == 0 else _grow(head, beam, tokens, parents)


def _through(head, tokens, hidden, positions, attentions):
    """New rows through the blocks: tokens and positions [B, T], hidden [B, T, h] the states right before them;
    attentions: for each block what attends(query [B, T, H, D], key, value [B, T, H_kv, D]) -> [B, T, H, D].
    """
    x, turned = head.embed(tokens), head.angles(positions)
    for layer, attends in zip(head.layers, attentions):
        if isinstance(layer, CrossLayer):
            attended = attends(layer.query(x), *layer.cross_attn.key_value(hidden))
        else:
            u = layer.enter(x)
            attended = attends(layer.self_attn.query(u, *turned), *layer.self_attn.key_value(u, *turned))
        x = layer.finish(x, attended)
    return head.norm(x)


def _cached(head, context: Context, visible: tuple[torch.Tensor, torch.Tensor]):
    """The three blocks' attention over caches that are placed; visible: what new rows see [B, T, slots] of `own`
    and of `cross`.
    """

    def over(layer, seen):
        def attends(query, key, value):
            keys, values = layer.update(key.transpose(1, 2), value.transpose(1, 2))
            return attend(query, keys, values, seen, head.config.head_dim**-0.5)

        return attends

    own, cross = context.own.layers, context.cross.layers
    return [over(own[0], visible[0]), over(cross[0], visible[1]), over(own[1], visible[0])]


def _commit_root(head, context: Context, root: torch.Tensor):
    pending, caches = context.pending, (context.own, context.cross)
    if pending is None:
        raise RuntimeError(
            "this context has no pending row: a root was already expanded and nothing was observed since"
        )
    batch, width = pending.tokens.shape
    last, steps = (pending.lengths - 1)[:, None], torch.arange(width, device=root.device)
    following = torch.cat([pending.tokens[:, 1:], root], 1).scatter(1, last, root)
    positions = context.skipped[:, None] + context.own.lengths[:, None] + steps
    visible = []
    for cache in caches:
        cache.place(width)
        visible.append(torch.arange(cache.visible, device=root.device) <= (cache.lengths[:, None] + steps)[..., None])
    output = _through(head, following, head.split(pending.hidden)[1], positions, _cached(head, context, tuple(visible)))
    for cache in caches:
        cache.lengths = cache.lengths + pending.lengths
    context.pending = None
    output = output.gather(1, last[..., None].expand(-1, -1, output.size(-1)))
    return output, Beam(context, output, torch.zeros(batch, 1, 0, dtype=torch.bool, device=root.device), 1)


def _grow(head, beam: Beam, tokens: torch.Tensor, parents: torch.Tensor):
    context, (batch, new), before = beam.context, tokens.shape, beam.seen.size(2)
    rows = torch.arange(batch, device=tokens.device)[:, None]
    itself = torch.eye(new, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
    seen, visible = torch.cat([beam.seen[rows, parents], itself], -1), []
    for cache in (context.own, context.cross):
        cache.place(new, offset=before)
        committed = (torch.arange(cache.visible, device=tokens.device) < cache.lengths[:, None])[:, None].repeat(
            1, new, 1
        )
        slots = cache.lengths[:, None] + torch.arange(before + new, device=tokens.device)
        visible.append(committed.scatter_(2, slots[:, None].expand(-1, new, -1), seen))
    positions = (context.skipped + context.own.lengths + beam.depth - 1)[:, None].expand(-1, new)
    output = _through(head, tokens, beam.hidden[rows, parents], positions, _cached(head, context, tuple(visible)))
    return output, replace(beam, hidden=output, seen=seen, depth=beam.depth + 1)


def _grow_rooted(head, beam: RootedBlocks, tokens: torch.Tensor, parents: torch.Tensor):
    grown, rows = [], torch.arange(len(tokens), device=tokens.device)[:, None]

    def over(block: RootedTrees):
        def attends(query, key, value):
            attended, new = block.attend(query, key, value, parents, head.config.head_dim**-0.5)
            grown.append(replace(block, **new, positions=block.positions + 1))
            return attended

        return attends

    positions = beam.blocks[0].positions[:, None].expand(-1, tokens.size(1))
    output = _through(head, tokens, beam.hidden[rows, parents], positions, [over(block) for block in beam.blocks])
    return output, RootedBlocks(tuple(grown), output)
